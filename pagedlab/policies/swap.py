"""Slot `swap`: what becomes of a block that a tier gives up, and which tiers there are below the device.

    device ──▶ host ──▶ disk        a copy goes down one tier at a time
      ▲          │        │
      └──────────┴────────┘         a hit comes up at once, whichever tier it lies in

Asked when an eviction policy has chosen a cached block; asked earlier, too, if the policy is eager. `Drop` forgets it;
`HostTier` keeps a copy in host memory, where lookups still find it and whence it is brought back when it is hit or
prefetched; `DiskTier` has a file below that. The host tier also holds the blocks of sequences preempted by swapping,
which are pinned there; cached copies make room for them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pagedlab.policies.base import Policy, param
from pagedlab.policies.block import DISK, Block
from pagedlab.registry import register

ADMISSIONS = ("write-back", "write-through", "on-second-use")


class Swap(Policy):
    """Contract. ``uses_host`` and ``uses_disk`` say which tiers exist at all; a disk needs a host above it."""

    slot: ClassVar[str] = "swap"
    uses_host: ClassVar[bool] = False
    uses_disk: ClassVar[bool] = False

    def reset(self, *, capacities: Sequence[int]) -> None:
        """Start a run in which tier i has ``capacities[i]`` blocks (device, host, disk)."""

    @property
    def eager(self) -> bool:
        """Whether to ask `store` also when a block is stored in its tier, and when it is hit there."""
        return False

    @abstractmethod
    def store(self, block: Block, tier: int) -> bool:
        """Whether to copy this block of the tier above to ``tier``, which has no copy of it; asked when the tier above
        gives it up. Its identity and hits can be read. The copy is not made if nothing in ``tier`` can make room.
        """

    def tier_eviction(self, tier: int) -> str:
        """Name of the eviction policy that orders the cached copies of ``tier``."""
        return "lru"


@register("swap", "drop")
class Drop(Swap):
    """Forget evicted blocks; preempted sequences are recomputed."""

    def store(self, block: Block, tier: int) -> bool:
        return False


@register("swap", "host")
class HostTier(Swap):
    """Keep evicted blocks in host memory, and preempted sequences if preemption asks for it."""

    uses_host: ClassVar[bool] = True
    min_hits: int = param(0, low=0, unit="hits", help="store only blocks that were hit at least this often")
    eviction: str = param("lru", help="eviction policy of the host tier, any name of that slot")

    def store(self, block: Block, tier: int) -> bool:
        return block.hits >= self.min_hits

    def tier_eviction(self, tier: int) -> str:
        return self.eviction


@register("swap", "disk")
class DiskTier(HostTier):
    """Keep evicted blocks in host memory, and what that gives up in a file on disk.

    ``write-back`` stores a block when the tier above gives it up. ``write-through`` stores it as soon as it is stored
    above, or has been hit ``min_hits`` times there, so that giving it up costs nothing. ``on-second-use`` stores what
    the tier above gives up only if it was used twice: it was hit there, or it is the second time that this content is
    given up; keys given up once are remembered, as many as the tier has blocks (Maggs and Sitaraman, SIGCOMM CCR 2015:
    cache on second hit). O(1) a block.
    """

    uses_disk: ClassVar[bool] = True
    admission: str = param("write-back", choices=ADMISSIONS, help="when a tier takes a block from above")
    disk_eviction: str = param("lru", help="eviction policy of the disk tier, any name of that slot")

    def reset(self, *, capacities: Sequence[int]) -> None:
        self._capacities = tuple(capacities)
        self._once: list[dict[int, None]] = [{} for _ in capacities]

    @property
    def eager(self) -> bool:
        return self.admission == "write-through"

    def store(self, block: Block, tier: int) -> bool:
        wanted = block.hits >= self.min_hits
        if self.admission != "on-second-use" or block.hits:
            return wanted
        once, key = self._once[tier], block.key
        assert key is not None
        if key in once:
            if wanted:
                del once[key]
            return wanted
        once[key] = None
        if len(once) > self._capacities[tier]:
            del once[next(iter(once))]
        return False

    def tier_eviction(self, tier: int) -> str:
        return self.disk_eviction if tier == DISK else self.eviction
