"""A workload: requests with their arrival times, and a name for the table."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from pagedlab.engine.request import Request
from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt

_SHOWN = 8


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which results list them; each says when it arrives.

    A request brings ``text``, to be tokenised by the model that serves it, or token ids. With ``content_ids`` the ids
    merely say which tokens are equal, and a run maps them into its model's vocabulary (modulo its size).

    ``outputs`` holds the tokens that were generated, by request id, where a trace or a generator knows them: a
    simulation can say them again, so that the next turn finds them in the cache. A reader that was told to skip bad
    lines counts them in ``num_skipped`` and keeps the first few as ``skipped``: (line, what was wrong with it).
    """

    name: str
    requests: tuple[Request, ...]
    description: str = ""
    content_ids: bool = False
    outputs: Mapping[str, Sequence[int]] | None = field(default=None, hash=False)
    skipped: tuple[tuple[int, str], ...] = ()
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def head(self, n: int) -> Workload:
        """Return the first ``n`` requests.

        One that followed a request which is cut off comes at its own arrival instead.
        """
        if n < 1:
            raise WorkloadError(f"head({n}): at least 1 request is needed")
        return self._only(self.requests[:n])

    def sessions(self, which: int | Callable[[str], bool]) -> Workload:
        """Return the requests of the first ``which`` sessions, or of those whose name it is true for.

        Sessions count in the order of their first requests; a request without one is a session by itself, called by its
        id. One that followed a request of a session which is left out comes at its own arrival instead.
        """
        names = dict.fromkeys(map(_session, self.requests))
        if callable(which):
            kept = {name for name in names if which(name)}
        elif isinstance(which, bool) or not isinstance(which, int) or which < 1:
            raise WorkloadError(f"sessions({which!r}): a whole number of at least 1 or a function is needed")
        else:
            kept = set(list(names)[:which])
        if not kept:
            raise WorkloadError(f"sessions: none of {len(names)} is left")
        return self._only(tuple(r for r in self.requests if _session(r) in kept))

    def scale_rate(self, factor: float, *, think_times: bool = False) -> Workload:
        """Return the same requests arriving ``factor`` times as fast: 2.0 halves every arrival time.

        Think times stay what they are, since people and tools do not hurry because there are more of them; with
        ``think_times`` they are divided too. (A request that follows another one does not look at its arrival.)
        """
        if not 0 < factor < float("inf"):
            raise WorkloadError(f"scale_rate({factor}): the factor must be above 0")
        pauses = factor if think_times else 1.0
        return replace(
            self,
            requests=tuple(
                replace(r, arrival=r.arrival / factor, think_time=r.think_time / pauses)
                for r in self.requests
            ),
        )

    def jitter(self, seconds: float, seed: int = 0) -> Workload:
        """Return the same requests with time stamps of ``seconds`` resolution spread over their steps, in order.

        Requests that share a stamp get uniform times from it up to ``seconds`` later, and never later than the next
        stamp: no request overtakes another. Sorted by arrival. (Mooncake's stamps are 3 s apart.)
        """
        if not 0 <= seconds < float("inf"):
            raise WorkloadError(f"jitter({seconds}): a number of seconds is needed, at least 0")
        rng = random.Random(seed)
        ordered = sorted(self.requests, key=operator.attrgetter("arrival"))
        spread: list[Request] = []
        at = 0
        while at < len(ordered):
            stamp, end = ordered[at].arrival, at
            while end < len(ordered) and ordered[end].arrival == stamp:
                end += 1
            room = seconds if end == len(ordered) else min(seconds, ordered[end].arrival - stamp)
            late = sorted(rng.random() * room for _ in range(at, end))
            spread += (
                replace(r, arrival=stamp + more) for r, more in zip(ordered[at:end], late, strict=True)
            )
            at = end
        return replace(self, requests=tuple(spread))

    def describe(self, block_size: int = 16) -> dict[str, Any]:
        """Return what is in it: numbers of requests, sessions, tokens and blocks, and ``duration_s``.

        ``input_tokens`` (sum) and ``mean_input`` are None if prompts are texts that nobody has tokenised. Outputs are
        counted as asked for (``max_tokens`` of every sample). ``blocks`` counts accesses: the ids of a hashed prompt as
        they were published, the partial last one included, and the full blocks of ``block_size`` of any other;
        ``repeated_blocks`` is the share of accesses to a block (with all before it) that was accessed earlier, so
        the hit ratio of a cache that never evicts.
        """
        if block_size < 1:
            raise WorkloadError(f"describe({block_size}): a block has at least 1 token")
        tokenised = all(r.text is None or len(r.prompt) for r in self.requests)
        inputs = sum(len(r.prompt) for r in self.requests) if tokenised else None
        outputs = sum(r.sampling.max_tokens * r.sampling.n for r in self.requests)
        seen: set[Hashable] = set()
        blocks = 0
        for r in self.requests:
            for key in _blocks(r, block_size):
                blocks += 1
                seen.add(key)
        arrivals = [r.arrival for r in self.requests] or [0.0]
        count = len(self) or 1
        return {
            "requests": len(self),
            "sessions": len(set(map(_session, self.requests))),
            "duration_s": max(arrivals) - min(arrivals),
            "input_tokens": inputs,
            "mean_input": None if inputs is None else inputs / count,
            "output_tokens": outputs,
            "mean_output": outputs / count,
            "blocks": blocks,
            "unique_blocks": len(seen),
            "repeated_blocks": 1 - len(seen) / blocks if blocks else 0.0,
            "follow_others": sum(r.follows is not None for r in self.requests),
        }

    @property
    def num_sequences(self) -> int:
        """Outputs that it asks for: parallel samples count one by one."""
        return sum(r.sampling.n for r in self.requests)

    def _only(self, requests: tuple[Request, ...]) -> Workload:
        kept = {r.request_id for r in requests}
        free = tuple(
            r if r.follows is None or r.follows in kept else replace(r, follows=None, think_time=0.0)
            for r in requests
        )
        outputs = self.outputs and {name: ids for name, ids in self.outputs.items() if name in kept}
        return replace(self, requests=free, outputs=outputs)

    def __repr__(self) -> str:
        last = max((r.arrival for r in self.requests), default=0.0)
        return f"<workload {self.name!r}: {len(self)} requests in {last:.3g} s>"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{t}</th>" for t in ("request", "arrival (s)", "prompt", "max tokens", "samples"))
        rows = "".join(_row(r) for r in self.requests[:_SHOWN])
        if len(self) > _SHOWN:
            rows += f"<tr><td colspan='5'>… and {len(self) - _SHOWN} more</td></tr>"
        about = f"{self.name}: {len(self)} requests. {self.description}"
        return f"<table><caption>{escape(about)}</caption><tr>{head}</tr>{rows}</table>"


def _row(request: Request) -> str:
    text = request.text
    prompt = f"{len(request.prompt)} tokens" if text is None else text[-80:]
    cells = (
        request.request_id,
        f"{request.arrival:.3f}",
        prompt,
        str(request.sampling.max_tokens),
        str(request.sampling.n),
    )
    return "<tr>" + "".join(f"<td style='text-align:left'>{escape(c)}</td>" for c in cells) + "</tr>"


def _session(request: Request) -> str:
    return request.request_id if request.session is None else request.session


def _blocks(request: Request, block_size: int) -> Iterator[Hashable]:
    """Yield one key for every block: equal for equal blocks with equal beginnings under the same salt."""
    prompt, salt = request.prompt, request.salt
    if isinstance(prompt, HashedPrompt):
        for i in prompt.hash_ids:
            yield (i, prompt.hash_block, salt)
        return
    key = hash(salt)
    for start in range(0, len(prompt) - block_size + 1, block_size):
        key = hash((key, *prompt[start : start + block_size]))
        yield key


def prompts(
    given: Sequence[str | Sequence[int]], *, name: str = "prompts", description: str = "Prompts as given."
) -> Workload:
    """Return one request for each text or list of token ids, all arriving at once.

    >>> len(prompts(["def add(a, b):", [1, 2, 3]]))
    2
    """
    if isinstance(given, str):
        raise WorkloadError("prompts must be a list; for one prompt write [prompt]")
    requests = []
    for i, prompt in enumerate(given):
        if isinstance(prompt, str):
            requests.append(Request(request_id=f"prompt-{i}", prompt=(), text=prompt))
        elif (ids := _token_ids(prompt)) is not None:
            requests.append(Request(request_id=f"prompt-{i}", prompt=ids))
        else:
            raise WorkloadError(f"prompt {i} must be a text or a list of token ids, not {prompt!r}"[:200])
    return Workload(name, tuple(requests), description)


def _token_ids(prompt: Any) -> tuple[int, ...] | None:
    """Return ``prompt`` as token ids, or None if it is no list of whole numbers (numpy's and torch's are some)."""
    if isinstance(prompt, Request) or not hasattr(prompt, "__iter__"):
        return None
    try:
        return tuple(operator.index(t) for t in prompt)
    except TypeError:
        return None
