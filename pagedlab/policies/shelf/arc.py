"""ARC: recency and frequency, balanced by what was missed too soon."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from itertools import islice
from typing import Any

from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.shelf.parts import choose
from pagedlab.registry import register


@register("eviction", "arc")
class ARC(Eviction):
    """Adaptive Replacement Cache: one LRU list for blocks used once (T1), one for those used again (T2).

    A miss whose key was given up by T1 not long ago (in B1) raises T1's share ``p``, one from B2 lowers it, and the
    block goes to T2. T1 gives up blocks while it holds more than its share. Remembered are at most so many keys that
    T1 and B1 make one capacity and all four lists two. O(1) an operation.

    Where several misses come before their victims, B2 is preferred in the tie |T1| = p if the last one was in B2.
    libCacheSim does the same. Megiddo, Modha, ARC: a self-tuning, low overhead replacement cache, FAST 2003.
    """

    def reset(self, *, capacity: int) -> None:
        self._capacity = capacity
        self._once: OrderedDict[Block, None] = OrderedDict()
        self._again: OrderedDict[Block, None] = OrderedDict()
        """Released blocks of T1 and T2, LRU first."""
        self._level: dict[Block, int] = {}
        """1 or 2, for the list of each block, in use or not."""
        self._in_t1 = 0
        self._b1: OrderedDict[Hashable, None] = OrderedDict()
        self._b2: OrderedDict[Hashable, None] = OrderedDict()
        self._share = 0.0
        self._from_b2 = False
        self._returning: OrderedDict[Hashable, int] = OrderedDict()
        """Lists that blocks will join, by the keys of misses that were remembered."""

    def _recall(self, key: Hashable, readmitted: bool = False) -> None:
        b1, b2 = self._b1, self._b2
        self._from_b2 = key in b2
        if self._from_b2:
            if not readmitted:
                self._share = max(0.0, self._share - max(1.0, len(b1) / len(b2)))
            del b2[key]
        elif key in b1:
            if not readmitted:
                self._share = min(float(self._capacity), self._share + max(1.0, len(b2) / len(b1)))
            del b1[key]
        else:
            return
        self._returning[key] = 2 if self._from_b2 or not readmitted else 1
        if len(self._returning) > 2 * self._capacity:
            self._returning.popitem(last=False)

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        self._recall(key, readmitted)

    def insert(self, block: Block) -> None:
        key, b1, b2 = block.key, self._b1, self._b2
        if key in b1 or key in b2:
            self._recall(key)
        level = self._level[block] = self._returning.pop(key, 1)
        self._in_t1 += level == 1
        while b1 and self._in_t1 + len(b1) > self._capacity:
            b1.popitem(last=False)
        while b2 and len(self._level) + len(b1) + len(b2) > 2 * self._capacity:
            b2.popitem(last=False)

    def hit(self, block: Block) -> None:
        if self._level[block] == 1:
            self._once.pop(block, None)
            self._level[block] = 2
            self._in_t1 -= 1
        else:
            self._again.pop(block, None)

    def release(self, block: Block) -> None:
        (self._once if self._level[block] == 1 else self._again)[block] = None

    def remove(self, block: Block) -> None:
        if self._level.pop(block) == 1:
            self._once.pop(block, None)
            self._in_t1 -= 1
            self._b1[block.key] = None
        else:
            self._again.pop(block, None)
            self._b2[block.key] = None

    def _over(self) -> int:
        """How many blocks T1 has to give up before T2 does."""
        # |T1| > p, or in the tie |T1| >= p.
        over = self._in_t1 - int(self._share)
        return max(0, over + 1 if self._from_b2 and self._share == int(self._share) else over)

    def evict(self) -> Block | None:
        queue = self._once if self._once and (self._over() or not self._again) else self._again
        if not queue:
            return None
        block = next(iter(queue))
        ARC.remove(self, block)
        return block

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        over = self._over()
        once = [b for b in islice(self._once, n + len(protected)) if b not in protected]
        return choose(n, protected, once[:over], self._again, once[over:])

    def stats(self) -> dict[str, Any]:
        again = len(self._level) - self._in_t1
        return {"T1": self._in_t1, "T2": again, "B1": len(self._b1), "B2": len(self._b2), "p": self._share}
