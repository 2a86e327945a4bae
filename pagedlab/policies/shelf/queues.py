"""Several queues, and a memory of what was given up: 2Q and MQ."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Any

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.shelf.parts import Ghosts, Places, choose
from pagedlab.registry import register


@register("eviction", "2q")
class TwoQ(Eviction):
    """New blocks pass through a FIFO (A1in); only those asked for again soon after it enter the main LRU (Am).

    The FIFO gives up a block while it holds more than its share, and its keys are remembered (A1out); a miss that finds
    its key there goes to Am. Hits in A1in change nothing. O(1) an operation, O(log A1in) for the FIFO.

    Johnson, Shasha, 2Q: a low overhead high performance buffer management replacement algorithm, VLDB 1994. libCacheSim
    does the same.
    """

    a1in: float = param(0.25, low=0.0, high=1.0, help="share of the blocks for the FIFO of new ones")
    a1out: float = param(0.5, low=0.0, high=16.0, unit="capacities", help="keys remembered after the FIFO")

    def reset(self, *, capacity: int) -> None:
        self._share = int(capacity * self.a1in)
        self._in = Places()
        self._places: dict[Block, int] = {}
        """All blocks of A1in, 0 before their first release."""
        self._end = 0
        self._main: OrderedDict[Block, None] = OrderedDict()
        self._out: Ghosts[bool] = Ghosts(int(capacity * self.a1out))

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        if self._out.find(key) and not readmitted:
            self._out.put_aside(key, True)

    def insert(self, block: Block) -> None:
        if not self._out.claim(block.key):
            self._places[block] = 0

    def hit(self, block: Block) -> None:
        if block in self._places:
            self._in.take(block)
        else:
            self._main.pop(block, None)

    def release(self, block: Block) -> None:
        place = self._places.get(block)
        if place is None:
            self._main[block] = None
            return
        if not place:
            self._end = self._places[block] = place = self._end + 1
        self._in.put(block, place)

    def remove(self, block: Block) -> None:
        if self._places.pop(block, None) is None:
            self._main.pop(block, None)
        else:
            self._in.take(block)
            self._out.add(block.key, True)

    def evict(self) -> Block | None:
        block = self._in.first()
        if self._main and (block is None or len(self._places) <= self._share):
            return self._main.popitem(last=False)[0]
        if block is not None:
            TwoQ.remove(self, block)
        return block

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        over = max(0, len(self._places) - self._share)
        waiting = [b for _, b in self._in.lowest(n + len(protected)) if b not in protected]
        return choose(n, protected, waiting[:over], self._main, waiting[over:])

    def stats(self) -> dict[str, Any]:
        return {"A1in": len(self._places), "Am": len(self._main), "A1out": len(self._out)}


@register("eviction", "mq")
class MQ(Eviction):
    """Multi-Queue: LRU queues for 1, 2-3, 4-7, … uses; victims come from the lowest, and unused blocks sink.

    At every access the LRU block of each queue goes down by one if it was not used for ``lifetime`` accesses. The uses
    of a block that is gone are remembered and count on (Qout). O(queues) an operation.

    Zhou, Philbin, Li, The multi-queue replacement algorithm for second level buffer caches, USENIX ATC 2001.
    """

    queues: int = param(8, low=1, high=32, help="LRU queues")
    lifetime: int = param(
        10_000, low=1, unit="accesses", help="a block not used for so long sinks by one queue"
    )
    qout: float = param(4.0, low=0.0, high=16.0, unit="capacities", help="keys remembered with their uses")

    def reset(self, *, capacity: int) -> None:
        self._queues: list[OrderedDict[Block, int]] = [OrderedDict() for _ in range(self.queues)]
        """Released blocks, LRU first, each with the access at which it expires."""
        self._uses: dict[Block, int] = {}
        self._level: dict[Block, int] = {}
        """Where a released block is."""
        self._accesses = 0
        self._soonest = 0
        """No block above the lowest queue expires before."""
        self._out: Ghosts[int] = Ghosts(int(capacity * self.qout))

    def _access(self) -> None:
        self._accesses = now = self._accesses + 1
        if now <= self._soonest:
            return
        self._soonest = now + self.lifetime
        for level in range(1, self.queues):
            queue = self._queues[level]
            if queue and queue[block := next(iter(queue))] < now:
                del queue[block]
                self._queues[level - 1][block] = now + self.lifetime
                self._level[block] = level - 1
            if queue:
                self._soonest = min(self._soonest, queue[next(iter(queue))])

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        self._access()
        if (uses := self._out.find(key)) is not None:
            self._out.put_aside(key, uses - readmitted)

    def insert(self, block: Block) -> None:
        self._uses[block] = (self._out.claim(block.key) or 0) + 1

    def hit(self, block: Block) -> None:
        self._access()
        if (level := self._level.pop(block, None)) is not None:
            del self._queues[level][block]
        self._uses[block] += 1

    def release(self, block: Block) -> None:
        level = min(self.queues, self._uses[block].bit_length()) - 1
        self._queues[level][block] = self._accesses + self.lifetime
        self._level[block] = level

    def remove(self, block: Block) -> None:
        if (level := self._level.pop(block, None)) is not None:
            del self._queues[level][block]
        self._out.add(block.key, self._uses.pop(block))

    def evict(self) -> Block | None:
        for queue in self._queues:
            if queue:
                block, _ = queue.popitem(last=False)
                del self._level[block]
                self._out.add(block.key, self._uses.pop(block))
                return block
        return None

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return choose(n, protected, *self._queues)

    def stats(self) -> dict[str, Any]:
        return {f"queue {i}": len(queue) for i, queue in enumerate(self._queues)} | {"Qout": len(self._out)}
