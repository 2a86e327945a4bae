"""An LRU list in segments, in which blocks rise by being used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.shelf.parts import choose
from pagedlab.registry import register


@register("eviction", "slru")
class SLRU(Eviction):
    """Segmented LRU: new blocks are on probation, a hit lifts a block by one segment, a full segment lowers its LRU.

    Victims come from the lowest segment that has some, LRU first. Blocks in use count for their segment. O(1) an
    operation.

    Karedla, Love, Wherry, Caching strategies to improve disk system performance, IEEE Computer 27(3), 1994: two
    segments. ``variant="libcachesim"`` stores a new block in the lowest segment that has room, as that simulator does
    with four equal segments (``segments=4, protected=0.75``); the paper always stores it in the lowest.
    """

    segments: int = param(2, low=2, high=8, help="segments, the one on probation among them")
    protected: float = param(
        0.8, low=0.0, high=1.0, help="share of the blocks for all segments above probation"
    )
    variant: str = param(
        "paper", choices=("paper", "libcachesim"), help="where new blocks go while segments have room"
    )

    def reset(self, *, capacity: int) -> None:
        upper = self.segments - 1
        size = int(capacity * self.protected / upper + 1e-9)
        self._limits = [capacity - upper * size] + upper * [size]
        self._sizes = [0] * self.segments
        self._queues: list[OrderedDict[Block, None]] = [OrderedDict() for _ in self._limits]
        """Released blocks, LRU first."""
        self._level: dict[Block, int] = {}

    def __len__(self) -> int:
        return len(self._level)

    def insert(self, block: Block) -> None:
        level = 0
        if self.variant == "libcachesim":
            free = (i for i, size in enumerate(self._sizes) if size < self._limits[i])
            level = next(free, 0)
        self.store(block, level)

    def store(self, block: Block, level: int) -> None:
        """Let a new block begin in this segment."""
        self._level[block] = level
        self._sizes[level] += 1

    def hit(self, block: Block) -> None:
        level = self._level[block]
        self._queues[level].pop(block, None)
        if level + 1 < self.segments:
            self._sizes[level] -= 1
            self._sizes[level + 1] += 1
            self._level[block] = level + 1
            self._lower(level + 1)

    def release(self, block: Block) -> None:
        level = self._level[block]
        self._queues[level][block] = None
        if self._sizes[level] > self._limits[level]:
            self._lower(level)

    def _lower(self, level: int) -> None:
        """Move what is too much in this segment to the one below, and so on."""
        sizes, queues = self._sizes, self._queues
        while level and sizes[level] > self._limits[level] and queues[level]:
            block, _ = queues[level].popitem(last=False)
            sizes[level] -= 1
            level -= 1
            sizes[level] += 1
            self._level[block] = level
            queues[level][block] = None

    def remove(self, block: Block) -> None:
        level = self._level.pop(block)
        self._sizes[level] -= 1
        self._queues[level].pop(block, None)

    def order(self) -> list[OrderedDict[Block, None]]:
        """Return the segments, lowest first, each with its released blocks, LRU first."""
        return self._queues

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return choose(n, protected, *self._queues)

    def evict(self) -> Block | None:
        for queue in self._queues:
            if queue:
                block = next(iter(queue))
                SLRU.remove(self, block)
                return block
        return None

    def stats(self) -> dict[str, Any]:
        return {f"segment {i}": size for i, size in enumerate(self._sizes)}
