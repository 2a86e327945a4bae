"""S3-FIFO: three FIFO queues instead of an LRU list."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Hashable, Iterator
from itertools import islice
from math import inf
from typing import Any

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.shelf.parts import Ghosts, Places, choose, first
from pagedlab.registry import register

_MARKS = 3
"""Two bits count the hits of a block."""


@register("eviction", "s3-fifo")
class S3FIFO(Eviction):
    """A small FIFO for new blocks, a main FIFO for those hit twice there, and a memory of those that were not.

    The small queue gives up blocks while it has its share; what was hit ``hits`` times meanwhile goes on to the main
    queue. A miss whose key is remembered goes to the main queue at once. There a block that was hit (up to three times
    count) is put back to the end instead of given up, once for each hit. O(1) an operation, O(log cached) for a hit.

    Yang, Zhang, Qiu, Yue, Rashmi, FIFO queues are all you need for cache eviction, SOSP 2023.
    ``variant="libcachesim"`` lets new blocks go to the main queue while the cache fills and the small queue has its
    share.
    """

    small: float = param(0.1, low=0.0, high=1.0, help="share of the blocks for the small queue")
    ghost: float = param(
        0.9, low=0.0, high=16.0, unit="capacities", help="keys remembered after the small queue"
    )
    hits: int = param(2, low=1, high=_MARKS, help="hits in the small queue that lead to the main queue")
    variant: str = param(
        "paper", choices=("paper", "libcachesim"), help="where new blocks go while the cache fills"
    )

    def reset(self, *, capacity: int) -> None:
        self._share = max(1, int(capacity * self.small))
        self._new: set[Block] = set()
        """Blocks of the small queue, in use or not."""
        self._cold, self._warm = Places(), Places()
        """The small queue: released blocks that would be given up, and those that would go on."""
        self._main: OrderedDict[Block, int] = OrderedDict()
        self._marked = [Places() for _ in range(_MARKS)]
        """The main queue: released blocks without and with 1, 2, 3 marks, with their places."""
        self._marks: dict[Block, int] = {}
        self._held: dict[Block, int] = {}
        """Places of blocks that were hit and are in use."""
        self._end = 0
        self._ghosts: Ghosts[bool] = Ghosts(int(capacity * self.ghost))
        self._filling = self.variant == "libcachesim"

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        if self._ghosts.find(key) and not readmitted:
            self._ghosts.put_aside(key, True)

    def insert(self, block: Block) -> None:
        if not self._ghosts.claim(block.key) and not (self._filling and len(self._new) >= self._share):
            self._new.add(block)
        self._marks[block] = 0

    def _take(self, block: Block) -> int:
        """Take a released block out of its queue and return its place; 0 if it is in use."""
        if block in self._new:
            return self._cold.take(block) or self._warm.take(block)
        marks = self._marks[block]
        return self._marked[marks - 1].take(block) if marks else self._main.pop(block, 0)

    def hit(self, block: Block) -> None:
        if place := self._take(block):
            self._held[block] = place
        self._marks[block] = min(_MARKS, self._marks[block] + 1)

    def release(self, block: Block) -> None:
        place = self._held.pop(block, 0)
        if not place:
            self._end = place = self._end + 1
        if block in self._new:
            (self._warm if self._marks[block] >= self.hits else self._cold).put(block, place)
        else:
            self._join_main(block, place)

    def _join_main(self, block: Block, place: int) -> None:
        if marks := self._marks[block]:
            self._marked[marks - 1].put(block, place)
        else:
            self._main[block] = place

    def _from_small(self) -> Block | None:
        """Let the small queue go on to its first cold block, or to its end, and take that."""
        block = self._cold.first()
        place = inf if block is None else self._cold.take(block)
        for _, hot in self._warm.take_below(place):
            self._new.discard(hot)
            self._marks[hot] = 0
            self._end += 1
            self._main[hot] = self._end
        return block

    def _from_main(self) -> Block | None:
        """Let the main queue go on to its first block without a mark, and take that."""
        while not self._main and any(self._marked):
            self._put_back(inf)
        if not self._main:
            return None
        block, place = self._main.popitem(last=False)
        self._put_back(place)
        return block

    def _put_back(self, below: float) -> None:
        passed = [entry for queue in self._marked for entry in queue.take_below(below)]
        for _, block in sorted(passed):
            self._marks[block] -= 1
            self._end += 1
            self._join_main(block, self._end)

    def _take_first(self) -> Block | None:
        small, main = self._from_small, self._from_main
        if len(self._new) >= self._share:
            return small() or main()
        return main() or small() or main()

    def _first(self) -> Block | None:
        main = first(self._main)
        marked = (queue.first() for queue in self._marked)
        if len(self._new) >= self._share:
            block = self._cold.first() or main or self._warm.first()
            return block or next(filter(None, marked), None)
        return main or next(filter(None, marked), None) or self._cold.first() or self._warm.first()

    def evict(self) -> Block | None:
        block = self._take_first()
        if block is not None:
            self._forget(block)
        return block

    def _forget(self, block: Block) -> None:
        del self._marks[block]
        self._held.pop(block, None)
        if block in self._new:
            self._new.discard(block)
            self._ghosts.add(block.key, True)
        self._filling = False

    def remove(self, block: Block) -> None:
        if block is self._first():
            self._take_first()
        else:
            self._take(block)
        self._forget(block)

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return choose(n, (), self._order(n + len(protected), protected))

    def _order(self, most: int, protected: Collection[Block]) -> Iterator[Block]:
        """What `_take_first` would take, again and again, if it passed over protected blocks."""
        cold = self._cold.lowest(most)
        warm = deque(self._warm.lowest(len(self._warm), cold[-1][0] if len(cold) == most else inf))
        small = iter([entry for entry in cold if entry[1] not in protected])
        main = iter([block for block in islice(self._main, most) if block not in protected])
        late: deque[Block] = deque()
        marked = (b for queue in self._marked for _, b in queue.lowest(most) if b not in protected)
        left = len(self._new)

        def from_main() -> Block | None:
            return next(main, None) or (late.popleft() if late else next(marked, None))

        while True:
            block = None if left >= self._share else from_main()
            if block is None:
                place, block = next(small, (inf, None))
                left -= block is not None
                while warm and warm[0][0] < place:
                    left -= 1
                    if (hot := warm.popleft()[1]) not in protected:
                        late.append(hot)
                if block is None and (block := from_main()) is None:
                    return
            yield block

    def stats(self) -> dict[str, Any]:
        main = len(self._main) + sum(len(queue) for queue in self._marked)
        return {"small": len(self._new), "main": main, "ghosts": len(self._ghosts)}
