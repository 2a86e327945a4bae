"""A workload: requests with their arrival times, and a name for the table."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from pagedlab.engine.request import Request
from pagedlab.errors import WorkloadError

_SHOWN = 8


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which results list them; each says when it arrives.

    A request brings ``text``, to be tokenised by the model that serves it, or token ids. With ``content_ids`` the ids
    merely say which tokens are equal, and a run maps them into its model's vocabulary (modulo its size).
    """

    name: str
    requests: tuple[Request, ...]
    description: str = ""
    content_ids: bool = False

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def head(self, n: int) -> Workload:
        """Return the first ``n`` requests."""
        if n < 1:
            raise WorkloadError(f"head({n}): at least 1 request is needed")
        return replace(self, requests=self.requests[:n])

    def scale_rate(self, factor: float) -> Workload:
        """Return the same requests arriving ``factor`` times as fast: 2.0 halves every arrival time."""
        if not factor > 0:
            raise WorkloadError(f"scale_rate({factor}): the factor must be above 0")
        return replace(self, requests=tuple(replace(r, arrival=r.arrival / factor) for r in self.requests))

    @property
    def num_sequences(self) -> int:
        """Outputs that it asks for: parallel samples count one by one."""
        return sum(r.sampling.n for r in self.requests)

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
