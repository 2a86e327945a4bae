"""Slot `eviction`: which unused cached block to give up.

The protocol, one observation per admission and block::

    miss(key) ──▶ insert(block) ─┐
                  hit(block)  ───┴─▶ in use ──release(block)──▶ may be a victim ──▶ remove(block)

`miss` tells of a block that a prompt wanted and nobody had (ghost lists learn here), `insert` that its
content is now cached, `hit` that an admission found it. From `insert` or `hit` until `release` a block is in
use and must not be named. `remove` says that it is gone, evicted or forgotten, whoever chose it. A finished
request releases its blocks tail first, so that children go before parents. Looking (`match`) is not using: it
is not reported. A failed admission reports nothing.

Two ways to write one:

* simple: give `priority(block)`, lowest goes first, ties in the order of release. The library keeps a heap;
  the score is read at insert, hit and release (set ``dynamic = True`` for one that changes with time: it is
  then read again for every candidate whenever a victim is needed, O(cached)).
* full: override the observations and `victims`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any, ClassVar

from pagedlab.policies.base import Policy
from pagedlab.policies.block import Block
from pagedlab.registry import register

Score = float | tuple[float, ...]


class Eviction(Policy):
    """Contract, and the order that a `priority` implies."""

    slot: ClassVar[str] = "eviction"
    dynamic: ClassVar[bool] = False

    def reset(self, *, capacity: int) -> None:
        """Start empty, for a tier of ``capacity`` blocks."""
        self._scores: dict[Block, tuple[Score, int]] = {}
        self._heap: list[tuple[Score, int, Block]] = []
        self._clock = 0

    def priority(self, block: Block) -> Score:
        """Return the block's worth; the lowest is given up first."""
        raise NotImplementedError(f"{type(self).__name__} defines neither priority() nor victims()")

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        """A prompt wanted this content and it was not cached. ``readmitted``: asked before, then
        preempted.
        """

    def insert(self, block: Block) -> None:
        """The block's content is cached from now on; it is in use."""

    def hit(self, block: Block) -> None:
        """An admission uses the cached block; it is in use."""
        self._scores.pop(block, None)

    def release(self, block: Block) -> None:
        """Nobody uses the block any more; it may be named as a victim. O(log cached)."""
        self._clock += 1
        score = self.priority(block)
        self._scores[block] = score, self._clock
        heappush(self._heap, (score, self._clock, block))

    def remove(self, block: Block) -> None:
        """The block's content is gone."""
        self._scores.pop(block, None)

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        """Return ``n`` released blocks to give up, none of them protected; all or nothing (an empty list).

        Changes nothing that another call could see: `remove` follows for each block that was really given up.
        """
        scores = self._scores
        if self.dynamic or len(self._heap) > 2 * len(scores) + 64:
            if self.dynamic:
                for block, (_, released) in scores.items():
                    scores[block] = self.priority(block), released
            self._heap = [(score, released, block) for block, (score, released) in scores.items()]
            heapify(self._heap)
        chosen: list[Block] = []
        kept: list[tuple[Score, int, Block]] = []
        while self._heap and len(chosen) < n:
            entry = heappop(self._heap)
            score, released, block = entry
            if scores.get(block) != (score, released):
                continue
            kept.append(entry)
            if block not in protected:
                chosen.append(block)
        for entry in kept:
            heappush(self._heap, entry)
        return chosen if len(chosen) == n else []

    def stats(self) -> dict[str, Any]:
        """Return what the policy wants shown of its inner state (sizes of its lists, say)."""
        return {}


@register("eviction", "lru")
class LRU(Eviction):
    """Give up the block released longest ago (vLLM). O(1) an operation."""

    def reset(self, *, capacity: int) -> None:
        self._order: OrderedDict[Block, None] = OrderedDict()

    def hit(self, block: Block) -> None:
        self._order.pop(block, None)

    def release(self, block: Block) -> None:
        self._order[block] = None

    def remove(self, block: Block) -> None:
        self._order.pop(block, None)

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        order = (b for b in self._order if b not in protected) if protected else iter(self._order)
        chosen = list(islice(order, n))
        return chosen if len(chosen) == n else []


@register("eviction", "fifo")
class FIFO(Eviction):
    """Give up the block stored longest ago, however often it was used. O(log cached)."""

    def priority(self, block: Block) -> Score:
        return block.born


@register("eviction", "lfu")
class LFU(Eviction):
    """Give up the block with the fewest hits; among equals the one stored first. O(log cached)."""

    def priority(self, block: Block) -> Score:
        return block.hits, block.born
