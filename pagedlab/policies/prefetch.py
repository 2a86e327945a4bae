"""Slot `prefetch`: what to bring up the tiers before it is asked for.

Asked once a step, after scheduling. ``waiting`` is the queue in order, ``residency`` answers where a waiting
sequence's prefix lies, ``link_budget`` how many blocks may be moved this step. The plan is a list of `Load`s
in order of worth. The engine carries out what fits into *free* device blocks (a prefetch never evicts) and
reports each load's fate to `feedback`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

from pagedlab.policies.base import Policy, param
from pagedlab.policies.block import DEVICE, Block
from pagedlab.registry import register


class Load(NamedTuple):
    """Bring the content of ``block`` from its tier to ``to_tier``."""

    block: Block
    to_tier: int = DEVICE


class Waiting(Protocol):
    """What a prefetcher sees of a waiting sequence."""

    @property
    def request_id(self) -> str:
        """The request it belongs to."""

    @property
    def session(self) -> str | None:
        """Conversation or agent it belongs to."""


class Residency(Protocol):
    """Read-only answers about where prefixes lie."""

    def prefix(self, sequence: Waiting) -> list[Block]:
        """Return the cached blocks of the sequence's prefix in order, each in the highest tier that holds
        it.
        """


class Prefetch(Policy):
    """Contract. ``enabled`` False spares the engine the question."""

    slot: ClassVar[str] = "prefetch"
    enabled: ClassVar[bool] = True

    def reset(self) -> None:
        """Forget the last run."""

    @abstractmethod
    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        """Return loads in order of worth; more than ``link_budget`` are cut off."""

    def feedback(self, block: Block, fate: Literal["done", "refused", "useful", "useless"]) -> None:
        """Hear what became of a load: carried out, refused for lack of room; later hit, or evicted unused."""


@register("prefetch", "none")
class NoPrefetch(Prefetch):
    """Bring nothing up before it is asked for."""

    enabled: ClassVar[bool] = False

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        return []


@register("prefetch", "queue-lookahead")
class QueueLookahead(Prefetch):
    """Load the prefixes of the next waiting requests, in queue order (CachedAttention, USENIX ATC 2024)."""

    depth: int = param(8, low=1, unit="requests", help="how far to look down the queue")

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        loads: dict[int, Load] = {}
        for sequence in waiting[: self.depth]:
            for block in residency.prefix(sequence):
                if block.tier != DEVICE:
                    loads.setdefault(block.serial, Load(block))
            if len(loads) >= link_budget:
                break
        return list(loads.values())
