"""One output in the making: the tokens known so far, where its blocks are, and how it is doing."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pagedlab.cache.table import BlockTable
from pagedlab.engine.request import Request
from pagedlab.policies.lookup import Prefix


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
    sequences: list[Sequence] = field(default_factory=list)


class Sequence:
    """A sample of a request. Scheduler, preemption and prefetch policies see it read-only."""

    __slots__ = (
        "admitted_at",
        "error",
        "finish_reason",
        "finished_at",
        "first_token_at",
        "group",
        "hit_tokens",
        "max_len",
        "num_preemptions",
        "prompt_len",
        "recomputed_tokens",
        "sample_index",
        "seq_id",
        "status",
        "table",
        "text",
        "to_fork",
        "token_times",
        "tokens",
    )

    def __init__(
        self, seq_id: int, group: Group, sample_index: int, tokens: list[int], max_len: int, block_size: int
    ) -> None:
        request = group.request
        self.seq_id = seq_id
        self.group = group
        self.sample_index = sample_index
        self.tokens = tokens
        """Prompt and output so far."""
        self.prompt_len = len(request.prompt)
        self.max_len = max_len
        self.table = BlockTable(
            seq_id,
            Prefix(tokens, block_size, request.salt),
            # The last token that is generated is never fed back, so it is never stored.
            max(self.prompt_len, max_len - 1),
            session=request.session,
            request_class=request.request_class,
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
        self.token_times: list[int] = []
        self.num_preemptions = 0
        self.hit_tokens = 0
        self.recomputed_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output so far."""
        return len(self.tokens)

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self.table.num_tokens

    @property
    def remaining(self) -> int:
        """Known tokens not yet computed: 1 while decoding."""
        return len(self.tokens) - self.table.num_tokens

    @property
    def expected_len(self) -> int:
        """Prompt and expected output where the request hints at it, else the longest possible."""
        hint = self.group.request.hints.output_len
        return self.max_len if hint is None else min(self.prompt_len + hint, self.max_len)

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.prompt_len :]

    @property
    def priority(self) -> int:
        """The request's priority; higher runs first."""
        return self.group.request.priority

    @property
    def request_id(self) -> str:
        """The request that it belongs to."""
        return self.group.request.request_id

    @property
    def session(self) -> str | None:
        """The request's session."""
        return self.group.request.session

    def __repr__(self) -> str:
        progress = f"{self.num_computed}/{self.num_tokens} tokens"
        return f"<sequence {self.seq_id} of {self.request_id!r}: {self.status.value}, {progress}>"
