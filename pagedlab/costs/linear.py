"""The form that the cost models here share, and its evaluation in integers.

With P prefill tokens, D decoding sequences and T = P + D tokens in a step::

    t = overhead                                      # host: scheduling, launches
      + knee(weights(T), T * token)                   # matrix products: bandwidth or compute, whichever is slower
      + [samples > 0] * max(head, samples * logits)   # output head
      + T * link                                      # all-reduces of tensor parallelism
      + D * sequence                                  # what each decoding sequence costs beside its keys
      + pairs * pair                                  # attention of the chunks: compute
      + [P > 0] * prefill                             # kernels that no captured graph covers
      + C * context                                   # attention of the decoding sequences: keys and values read

``knee(a, b)`` is ``max(a, b)``, or the softer ``hypot(a, b)``. ``weights(T)`` is constant for a dense model; of a
mixture of experts it reads the share ``1 - (1 - k/E) ** T``. All but the last line is added up in floats and rounded
once, and the last is an integer product, so a step is linear in C to the picosecond: see `pagedlab.costs.base`. A step
without tokens (copies only) costs the overhead.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from math import sqrt
from typing import Any, NamedTuple

from pagedlab.costs.base import CostModel, StepWork
from pagedlab.errors import ConfigError, nearest

PS = 1e12
"""Picoseconds in a second."""


class Terms(NamedTuple):
    """The form's coefficients, in picoseconds."""

    overhead: float
    weights: float
    experts: float
    """Reading all routed experts."""
    coverage: tuple[float, ...]
    """Share of the experts that T tokens reach, by T; 1 beyond its end."""
    token: float
    head: float
    logits: float
    link: float
    sequence: float
    pair: float
    prefill: float
    soft: bool
    """The knee is ``hypot``."""
    context: int


def coverage_table(experts: int, experts_per_token: int) -> tuple[float, ...]:
    """Return ``1 - (1 - k/E) ** T`` for T = 0, 1, ... until it is 1 to the last bit."""
    table, missed = [], 1.0
    share = 1.0 - experts_per_token / experts
    while missed > 2.0**-54:
        table.append(1.0 - missed)
        missed *= share
    return tuple(table)


class LinearCost(CostModel):
    """A cost model of the form above; a subclass says what its `Terms` are and how fast the links between tiers are.

    Terms are worked out when they are first needed and again after a parameter is set.
    """

    @abstractmethod
    def terms(self) -> Terms:
        """Return the coefficients that the parameters stand for."""

    @abstractmethod
    def links(self) -> dict[str, tuple[float, int]]:
        """Return bytes per picosecond and latency in picoseconds for each link between tiers."""

    @cached_property
    def _terms(self) -> Terms:
        return self.terms()

    @cached_property
    def _links(self) -> dict[str, tuple[float, int]]:
        return self.links()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._terms, self._links  # noqa: B018  (a bad combination of parameters is to fail here, not in a run)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        self.__dict__.pop("_terms", None)
        self.__dict__.pop("_links", None)

    def step_ps(self, work: StepWork) -> int:
        """Return the duration of one step in picoseconds, at least 1. Cost: under a microsecond."""
        return self._fixed(work) + self._terms[-1] * work.context_tokens

    def linear(self, work: StepWork) -> tuple[int, int]:
        """Return (fixed, slope): what a step costs whatever its contexts, and per token of context."""
        return self._fixed(work), self._terms[-1]

    def _fixed(self, work: StepWork) -> int:
        overhead, weights, experts, coverage, token, head, logits, link, sequence, pair, prefill, soft, _ = (
            self._terms
        )
        chunked, decoding = work.prefill_tokens, work.decode_seqs
        tokens = chunked + decoding
        if not tokens:  # copies only: the model does not run
            return int(overhead + 0.5) or 1
        if experts:
            weights += experts * coverage[tokens] if tokens < len(coverage) else experts
        compute = tokens * token
        if soft:
            ps = overhead + sqrt(weights * weights + compute * compute)
        else:
            ps = overhead + (weights if weights > compute else compute)
        ps += tokens * link + decoding * sequence + work.prefill_pairs * pair
        if chunked:
            ps += prefill
        samples = work.samples
        if samples:
            rows = samples * logits
            ps += head if head > rows else rows
        return int(ps + 0.5) or 1

    def transfer_ps(self, num_bytes: int, link: str) -> int:
        """Return picoseconds to move ``num_bytes`` of all accelerators together over ``link`` (``"host"``,
        ``"disk-read"``, ``"disk-write"``).

        With tensor parallelism each accelerator moves its part over a host link of its own; all share one disk.
        Nothing takes no time.
        """
        if link not in self._links:
            known = ", ".join(self._links)
            raise ConfigError(
                f"{self.name} knows no link {link!r}; known: {known}{nearest(link, self._links)}"
            )
        if num_bytes <= 0:
            return 0
        rate, latency = self._links[link]
        return latency + int(num_bytes / rate + 0.5)
