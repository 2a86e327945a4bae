"""Slot `swap`: what becomes of a block that the device gives up.

Asked when the eviction policy has chosen a cached block. `Drop` forgets it; `HostTier` keeps a copy in host
memory, where lookups still find it and whence it is brought back when it is hit or prefetched. The host tier
also holds the blocks of sequences preempted by swapping, which are pinned there; cached copies make room for
them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pagedlab.policies.base import Policy, param
from pagedlab.policies.block import Block
from pagedlab.registry import register


class Swap(Policy):
    """Contract. ``uses_host`` says whether a host tier exists at all."""

    slot: ClassVar[str] = "swap"
    uses_host: ClassVar[bool] = False

    @abstractmethod
    def store(self, block: Block) -> bool:
        """Whether to copy this victim to the host tier. Its identity and hits can still be read."""

    def host_eviction(self) -> str:
        """Name of the eviction policy that orders the host tier's cached copies."""
        return "lru"


@register("swap", "drop")
class Drop(Swap):
    """Forget evicted blocks; preempted sequences are recomputed."""

    def store(self, block: Block) -> bool:
        return False


@register("swap", "host")
class HostTier(Swap):
    """Keep evicted blocks in host memory, and preempted sequences if preemption asks for it."""

    uses_host: ClassVar[bool] = True
    min_hits: int = param(0, low=0, unit="hits", help="store only blocks that were hit at least this often")
    eviction: str = param("lru", help="eviction policy of the host tier, any name of that slot")

    def store(self, block: Block) -> bool:
        return block.hits >= self.min_hits

    def host_eviction(self) -> str:
        return self.eviction
