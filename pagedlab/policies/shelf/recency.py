"""Orders made of the times of past uses: the last one, or the last K."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import LRU, Score
from pagedlab.policies.shelf.parts import Ghosts, Ranked
from pagedlab.registry import register

_LATER = 1 << 62
"""More than any time."""


@register("eviction", "mru")
class MRU(LRU):
    """Give up the block released last: right for a loop that is longer than the cache. O(1) an operation.

    Chou, DeWitt, An evaluation of buffer management strategies for relational database systems, VLDB 1985.
    """

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        blocks, marks = self._blocks, self._marks
        while blocks and blocks[-1].mark != marks[-1]:
            blocks.pop()
            marks.pop()
        chosen: list[Block] = []
        for i in range(len(blocks) - 1, -1, -1):
            block = blocks[i]
            if block.mark == marks[i] and block not in protected:
                chosen.append(block)
                if len(chosen) == n:
                    return chosen
        return []

    def evict(self) -> Block | None:
        while self._blocks:
            block = self._blocks.pop()
            if block.mark == self._marks.pop():
                block.mark = 0
                return block
        return None


@register("eviction", "lru-k")
class LRUK(Ranked):
    """Give up the block whose K-th last use is longest ago; those used less than K times go first, by their last use.

    Time is counted in releases; a use in the middle of a longer one counts when it begins. What is known of a block is
    kept when it is gone (the paper's retained information), for ``history`` times the capacity of keys. O(log cached)
    for a release, else O(1), amortized.

    O'Neil, O'Neil, Weikum, The LRU-K page replacement algorithm for database disk buffering, SIGMOD 1993. libCacheSim
    retains nothing: ``history=0``.
    """

    k: int = param(2, low=1, high=16, unit="uses", help="uses that are looked back")
    history: float = param(
        1.0, low=0.0, high=16.0, unit="capacities", help="keys of gone blocks whose uses are remembered"
    )

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._uses: dict[Block, list[int]] = {}
        """Times of the last K uses, latest last."""
        self._ghosts: Ghosts[list[int]] = Ghosts(int(self.history * capacity))

    def priority(self, block: Block) -> Score:
        uses = self._uses[block]
        return uses[0] + _LATER if len(uses) == self.k else uses[-1]

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        if (uses := self._ghosts.find(key)) is not None:
            # The insert of a readmitted block counts as the use that it had.
            self._ghosts.put_aside(key, uses[:-1] if readmitted else uses)

    def insert(self, block: Block) -> None:
        self._uses[block] = self._ghosts.claim(block.key) or []
        self._use(block)

    def hit(self, block: Block) -> None:
        super().hit(block)
        self._use(block)

    def _use(self, block: Block) -> None:
        uses = self._uses[block]
        uses.append(self._clock)
        if len(uses) > self.k:
            del uses[0]

    def release(self, block: Block) -> None:
        self._uses[block][-1] = self._clock + 1
        super().release(block)

    def remove(self, block: Block) -> None:
        super().remove(block)
        self._ghosts.add(block.key, self._uses.pop(block))

    def stats(self) -> dict[str, Any]:
        return {"remembered": len(self._ghosts)}
