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
from pagedlab.policies.view import NOTHING_KNOWN, View
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
    def num_shared(self) -> int:
        """Of these, tokens at the beginning in cached blocks that others hold too: a lookup will find them again."""

    @property
    def request_id(self) -> str:
        """The request (group) it belongs to; parallel samples have the same."""


C = TypeVar("C", bound=Candidate)


class Preemption(Policy):
    """Contract: choose one of the candidates, and the way back."""

    slot: ClassVar[str] = "preemption"
    wants_host: ClassVar[bool] = False

    _view = NOTHING_KNOWN

    @property
    def view(self) -> View:
        """What tokens cost to compute and weigh on a link, as far as this run knows."""
        return self._view

    def attach(self, view: View) -> None:
        """See the world through ``view`` from now on."""
        self._view = view

    @abstractmethod
    def choose(self, candidates: Sequence[C]) -> C:
        """Return one of ``candidates`` (at least one, oldest admission first)."""

    @abstractmethod
    def mode(self, victim: Candidate) -> Literal["recompute", "swap"]:
        """Return how the victim gives up its blocks."""


class _ByOrder(Preemption):
    victim: str = param(
        "last-in",
        choices=("last-in", "priority", "cheapest"),
        help="the one admitted last, the lowest priority, or the least work to bring back (then last)",
    )

    @abstractmethod
    def cost(self, victim: Candidate) -> float:
        """Return what it costs to bring the victim back, in the unit of the way back."""

    def choose(self, candidates: Sequence[C]) -> C:
        if self.victim == "priority":
            return min(reversed(candidates), key=lambda c: c.priority)
        if self.victim == "cheapest":
            return min(reversed(candidates), key=self.cost)
        return candidates[-1]


@register("preemption", "recompute")
class Recompute(_ByOrder):
    """Give the victim's blocks back and prefill it again later (vLLM). Costs FLOPs, but for what others share."""

    def cost(self, victim: Candidate) -> float:
        return _recompute_flops(self.view, victim)

    def mode(self, victim: Candidate) -> Literal["recompute", "swap"]:
        return "recompute"


@register("preemption", "swap")
class SwapOut(_ByOrder):
    """Copy the victim's blocks to the host tier and back (PagedAttention, section 4.5). Costs bytes on the link."""

    wants_host: ClassVar[bool] = True

    def cost(self, victim: Candidate) -> float:
        return _swap_bytes(self.view, victim)

    def mode(self, victim: Candidate) -> Literal["recompute", "swap"]:
        return "swap"


@register("preemption", "cheaper")
class Cheaper(_ByOrder):
    """Swap or recompute, whichever is less work for this victim: ``flops_per_byte`` makes one unit of both.

    Recomputing costs the FLOPs of the tokens that nobody else holds and grows with the square of their number; swapping
    costs all the victim's bytes twice. The default is an H100 at half of its peak over its PCIe link (989 TFLOP/s,
    64 GB/s). A model whose shape is not known computes a token for 1 FLOP and stores it in 1 byte.
    """

    wants_host: ClassVar[bool] = True
    flops_per_byte: float = param(
        8000.0,
        low=0.0,
        high=1e9,
        unit="FLOP/byte",
        help="what the device computes while the link to the host moves one byte",
    )

    def cost(self, victim: Candidate) -> float:
        return min(_recompute_flops(self.view, victim), self.flops_per_byte * _swap_bytes(self.view, victim))

    def mode(self, victim: Candidate) -> Literal["recompute", "swap"]:
        moving = self.flops_per_byte * _swap_bytes(self.view, victim)
        return "swap" if moving < _recompute_flops(self.view, victim) else "recompute"


def _recompute_flops(view: View, victim: Candidate) -> float:
    return view.prefill_flops(victim.num_shared, victim.num_computed - victim.num_shared)


def _swap_bytes(view: View, victim: Candidate) -> float:
    """Bytes out and back."""
    return 2 * victim.num_computed * view.bytes_per_token
