"""Slot `preemption`: whom to stop when memory is short, and how.

Asked when a running sequence needs a block and none can be had. The engine offers the running sequences in order of
admission, never the one that arrived first (so that finite work ends), and asks again until there is room or the
asking sequence itself was chosen. How: ``"recompute"`` gives the blocks back and prefills again later (what other
requests can share stays cached); ``"swap"`` copies them to the host tier and back, and falls back to recomputing when
the host tier has no room.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, TypeVar

from pagedlab.policies.base import Policy, param
from pagedlab.registry import register


class Candidate(Protocol):
    """What a preemption policy sees of a running sequence."""

    @property
    def priority(self) -> int:
        """Higher runs first."""

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values would have to be recomputed or moved."""

    @property
    def request_id(self) -> str:
        """The request (group) it belongs to; parallel samples have the same."""


C = TypeVar("C", bound=Candidate)


class Preemption(Policy):
    """Contract: choose one of the candidates, and the way back."""

    slot: ClassVar[str] = "preemption"
    wants_host: ClassVar[bool] = False

    @abstractmethod
    def choose(self, candidates: Sequence[C]) -> C:
        """Return one of ``candidates`` (at least one, oldest admission first)."""

    @abstractmethod
    def mode(self, victim: Candidate) -> Literal["recompute", "swap"]:
        """Return how the victim gives up its blocks."""


class _ByOrder(Preemption):
    victim: str = param(
        "last-in",
        choices=("last-in", "priority"),
        help="the one admitted last, or the lowest priority (then last)",
    )

    def choose(self, candidates: Sequence[C]) -> C:
        if self.victim == "priority":
            return min(reversed(candidates), key=lambda c: c.priority)
        return candidates[-1]


@register("preemption", "recompute")
class Recompute(_ByOrder):
    """Give the victim's blocks back and prefill it again later (vLLM)."""

    def mode(self, victim: Candidate) -> Literal["recompute", "swap"]:
        return "recompute"


@register("preemption", "swap")
class SwapOut(_ByOrder):
    """Copy the victim's blocks to the host tier and back (PagedAttention, section 4.5)."""

    wants_host: ClassVar[bool] = True

    def mode(self, victim: Candidate) -> Literal["recompute", "swap"]:
        return "swap"
