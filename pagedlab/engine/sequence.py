"""One output in the making: the tokens known so far, where its blocks are, and how it is doing."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from pagedlab.cache.table import BlockTable
from pagedlab.engine.decoders import Decoders
from pagedlab.engine.records import StepLog
from pagedlab.engine.request import Request
from pagedlab.engine.script import Script
from pagedlab.policies.block import Origin
from pagedlab.policies.lookup import make_prefix
from pagedlab.policies.prompt import HashedTokens


class Status(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Group:
    """The sequences of one request: parallel samples that share the prompt's blocks."""

    request: Request
    arrival: int
    """Time of arrival in picoseconds."""
    order: int
    """It was the n-th request to arrive."""
    steps: StepLog
    """What the engine has done, by which tokens have their times."""
    sequences: list[Sequence] = field(default_factory=list)
    unfinished: int = 0
    """Sequences of the request that have not ended."""


class Sequence:
    """A sample of a request. Scheduler, preemption and prefetch policies see it read-only."""

    __slots__ = (
        "admitted_at",
        "age",
        "decoders",
        "ends_at",
        "error",
        "finish_reason",
        "finished_at",
        "first_token_at",
        "group",
        "hit_tokens",
        "max_len",
        "num_preemptions",
        "phase",
        "prompt_len",
        "recomputed_tokens",
        "sample_index",
        "script",
        "seq_id",
        "since",
        "spans",
        "status",
        "table",
        "text",
        "to_fork",
        "tokens",
    )

    def __init__(
        self,
        seq_id: int,
        group: Group,
        sample_index: int,
        tokens: list[int] | HashedTokens,
        max_len: int,
        block_size: int,
    ) -> None:
        request = group.request
        self.seq_id = seq_id
        self.group = group
        self.sample_index = sample_index
        self.age = group.order, sample_index
        """The lower, the earlier it came."""
        self.tokens = tokens
        """Prompt and output so far (while it decodes by a script: as far as its table counts)."""
        self.prompt_len = len(request.prompt)
        self.max_len = max_len
        self.table = BlockTable(
            seq_id,
            make_prefix(tokens, block_size, request.salt),
            # The last token that is generated is never fed back, so it is never stored.
            max(self.prompt_len, max_len - 1),
            origin=request.origin,
        )
        self.status = Status.WAITING
        self.to_fork = 0
        """Parallel samples that will part from this one when its prompt is computed."""
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.text: str | None = None
        self.admitted_at: int | None = None
        self.first_token_at: int | None = None
        self.finished_at: int | None = None
        self.spans: list[list[int]] = []
        """Steps that gave it a token each: runs of (first step, how many)."""
        self.num_preemptions = 0
        self.hit_tokens = 0
        self.recomputed_tokens = 0
        self.script: Script | None = None
        """What it will say, if that is known."""
        self.decoders: Decoders | None = None
        """The aggregate that it decodes in."""
        self.since = 0
        self.phase = 0
        self.ends_at = -1

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output so far."""
        return len(self.tokens) if self.decoders is None else self.num_computed + 1

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in the cache."""
        if self.decoders is None:
            return self.table.num_tokens
        return self.table.num_tokens + self.decoders.steps - self.since

    @property
    def num_shared(self) -> int:
        """Tokens at its beginning in cached blocks that others hold too. O(such blocks)."""
        shared = 0
        for block in self.table.blocks:
            if block.ref_count < 2 or block.key is None:
                break
            shared += block.fill
        return min(shared, self.num_computed)

    @property
    def remaining(self) -> int:
        """Known tokens not yet computed: 1 while decoding."""
        return 1 if self.decoders is not None else len(self.tokens) - self.table.num_tokens

    @property
    def num_output(self) -> int:
        """Output tokens so far."""
        return self.num_tokens - self.prompt_len

    @property
    def token_times(self) -> list[int]:
        """When each output token came, in picoseconds."""
        return self.group.steps.ends(self.spans)

    @property
    def last_token_at(self) -> int | None:
        """When the last output token came, in picoseconds."""
        if not self.spans:
            return None
        first, count = self.spans[-1]
        return self.group.steps.ends([[first + count - 1, 1]])[0]

    def took(self, first_step: int, count: int = 1) -> None:
        """Note a token from each of ``count`` steps."""
        last = self.spans[-1] if self.spans else None
        if last is not None and last[0] + last[1] == first_step:
            last[1] += count
        else:
            self.spans.append([first_step, count])

    @property
    def expected_len(self) -> int:
        """Prompt and expected output where the request hints at it, else the longest possible."""
        hint = self.group.request.hints.output_len
        return self.max_len if hint is None else min(self.prompt_len + hint, self.max_len)

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.prompt_len :]

    def fork_tokens(self, unique: int) -> list[int] | HashedTokens:
        """Return a copy of the tokens for a sample that parts from this one."""
        if isinstance(self.tokens, HashedTokens):
            return HashedTokens(self.tokens.prompt, unique, self.tokens.generated)
        return list(self.tokens)

    @property
    def priority(self) -> int:
        """The request's priority; higher runs first."""
        return self.group.request.priority

    @property
    def arrival(self) -> int:
        """When the request arrived, in picoseconds."""
        return self.group.arrival

    @property
    def request_id(self) -> str:
        """The request that it belongs to."""
        return self.group.request.request_id

    @property
    def request_output(self) -> int:
        """Output tokens of the request so far, in all its samples."""
        return sum(s.num_output for s in self.group.sequences)

    @property
    def request_ended(self) -> bool:
        """True once every sample of the request has ended."""
        return not self.group.unfinished

    @property
    def session(self) -> str | None:
        """The request's session."""
        return self.group.request.session

    @property
    def salt(self) -> Hashable:
        """The request's tenant."""
        return self.group.request.salt

    @property
    def origin(self) -> Origin:
        """What its request said of where it comes from."""
        return self.table.origin

    def __repr__(self) -> str:
        progress = f"{self.num_computed}/{self.num_tokens} tokens"
        return f"<sequence {self.seq_id} of {self.request_id!r}: {self.status.value}, {progress}>"
