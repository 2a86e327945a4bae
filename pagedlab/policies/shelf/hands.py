"""A hand goes round the cached blocks, spares those that were used since it last came by, and takes the first other.

Both policies keep marked and unmarked blocks apart, so the hand need not really walk: the next victim is the first
unmarked block, and when it goes, the marked ones before it have been passed. Each mark is taken off once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from math import inf
from typing import Any

from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.shelf.parts import Places, choose, first
from pagedlab.registry import register


@register("eviction", "clock")
class Clock(Eviction):
    """FIFO with a second chance: a block that was hit since the hand last came by is put back to the end of the queue.

    One bit a block, set by a hit and not by the block's arrival. O(1) an operation, O(log cached) for a hit.

    Corbató, A paging experiment with the Multics system, MIT Project MAC report MAC-M-384, 1968.
    """

    def reset(self, *, capacity: int) -> None:
        self._unmarked: OrderedDict[Block, int] = OrderedDict()
        self._marked = Places()
        self._held: dict[Block, int] = {}
        """Places of blocks that were hit and are in use; 0 for those that have none yet."""
        self._end = 0

    def hit(self, block: Block) -> None:
        place = self._unmarked.pop(block, 0) or self._marked.take(block)
        if place or block not in self._held:
            self._held[block] = place

    def release(self, block: Block) -> None:
        place = self._held.pop(block, None)
        if place:
            self._marked.put(block, place)
            return
        self._end = end = self._end + 1
        if place is None:
            self._unmarked[block] = end
        else:
            self._marked.put(block, end)

    def _pass(self, below: float) -> None:
        """The hand goes on to this place."""
        for _, block in self._marked.take_below(below):
            self._end += 1
            self._unmarked[block] = self._end

    def evict(self) -> Block | None:
        if not self._unmarked:
            self._pass(inf)
            if not self._unmarked:
                return None
        block, place = self._unmarked.popitem(last=False)
        self._pass(place)
        return block

    def remove(self, block: Block) -> None:
        if block is (first(self._unmarked) or self._marked.first()):
            Clock.evict(self)
        elif not (self._unmarked.pop(block, 0) or self._marked.take(block)):
            self._held.pop(block, None)

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        chosen = choose(n, protected, self._unmarked)
        if chosen or len(self._unmarked) + len(self._marked) < n:
            return chosen
        return choose(n, protected, self._unmarked, (b for _, b in self._marked.lowest(n + len(protected))))

    def stats(self) -> dict[str, Any]:
        return {"marked": len(self._marked), "unmarked": len(self._unmarked)}


class _Side:
    """The blocks on one side of the hand."""

    def __init__(self) -> None:
        self.unseen: OrderedDict[Block, int] = OrderedDict()
        self.seen = Places()

    def take(self, block: Block) -> int:
        """Take the block out and return its place; 0 if it is not here."""
        return self.unseen.pop(block, 0) or self.seen.take(block)


@register("eviction", "sieve")
class Sieve(Eviction):
    """A clock whose queue is never reordered: the hand spares visited blocks where they stand.

    New blocks join at the head, the hand moves from the tail towards it and begins again. One bit a block. O(1) an
    operation, O(log cached) for a hit.

    Zhang, Yang, Yue, Vigfusson, Rashmi, SIEVE is simpler than LRU, NSDI 2024.
    """

    def reset(self, *, capacity: int) -> None:
        self._ahead, self._behind = _Side(), _Side()
        self._held: dict[Block, tuple[_Side | None, int]] = {}
        """Where blocks that were hit and are in use belong; no side for those that have no place yet."""
        self._head = 0

    def hit(self, block: Block) -> None:
        for side in (self._ahead, self._behind):
            if place := side.take(block):
                self._held[block] = (side, place)
                return
        self._held.setdefault(block, (None, 0))

    def release(self, block: Block) -> None:
        side, place = self._held.pop(block, (None, -1))
        if side is not None:
            side.seen.put(block, place)
            return
        self._head = head = self._head + 1
        if place:
            self._ahead.unseen[block] = head
        else:
            self._ahead.seen.put(block, head)

    def _pass(self, below: float) -> None:
        """The hand goes on to this place; what it passes is behind it, and no longer visited."""
        for place, block in self._ahead.seen.take_below(below):
            self._behind.unseen[block] = place

    def _turn(self) -> None:
        """The hand passes the head and begins at the tail."""
        self._pass(inf)
        self._ahead, self._behind = self._behind, self._ahead

    def evict(self) -> Block | None:
        # Two turns take the marks off wherever they are.
        for _ in range(2):
            if not self._ahead.unseen:
                self._turn()
        if not self._ahead.unseen:
            return None
        block, place = self._ahead.unseen.popitem(last=False)
        self._pass(place)
        if not self._ahead.unseen and not self._ahead.seen:
            self._turn()
        return block

    def _first(self) -> Block | None:
        ahead, behind = self._ahead, self._behind
        return first(ahead.unseen) or first(behind.unseen) or ahead.seen.first() or behind.seen.first()

    def remove(self, block: Block) -> None:
        if block is self._first():
            Sieve.evict(self)
        elif not (self._ahead.take(block) or self._behind.take(block)):
            self._held.pop(block, None)

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        unseen = (self._ahead.unseen, self._behind.unseen)
        chosen = choose(n, protected, *unseen)
        if chosen:
            return chosen
        sides = (self._ahead.seen, self._behind.seen)
        seen = ((b for _, b in side.lowest(n + len(protected))) for side in sides)
        return choose(n, protected, *unseen, *seen)

    def stats(self) -> dict[str, Any]:
        sides = (self._ahead, self._behind)
        return {"visited": sum(len(s.seen) for s in sides), "unvisited": sum(len(s.unseen) for s in sides)}
