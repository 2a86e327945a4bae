"""What several policies of the shelf are made of: queues whose places are kept, and memories of what is gone.

Rules that hold for the whole shelf:

* An access counts when it ends. A new block joins its queue at its first release, so that of one request, released
  tail first, the children stand before their parents; which queue that is was decided when it was stored.
* A block in use is in no queue that is searched. Where an algorithm leaves a hit block in its place, it comes back to
  this place when it is released, and if the search has been past it by then, it is the first that is met.
* A removal of the block that would be named next is an eviction, and the search that led to it happens (marks are
  taken off, hands move). Any other removal only takes the block out. So asking for victims is seen by nobody.
* Ghosts learn of every removal: whether a block was given up or forgotten, its content was here and is gone.
* A readmitted miss (the request was preempted) is no new reference: it finds no ghost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator
from heapq import heapify, heappop, heappush, merge
from itertools import chain, islice, takewhile
from math import inf
from typing import Generic, TypeVar

from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction

V = TypeVar("V")


def choose(n: int, protected: Collection[Block], *queues: Iterable[Block]) -> list[Block]:
    """Return the first ``n`` blocks of the queues, one queue after the other, without protected ones; all or none."""
    blocks: Iterable[Block] = chain(*queues) if len(queues) > 1 else queues[0]
    if protected:
        blocks = (block for block in blocks if block not in protected)
    chosen = list(islice(blocks, n))
    return chosen if len(chosen) == n else []


def first(queue: OrderedDict[Block, V]) -> Block | None:
    """Return the oldest block of a queue."""
    return next(iter(queue), None)


class Ranked(Eviction):
    """The order of `priority` as read at release; the first can be seen and taken without further ado."""

    def _first(self) -> Block | None:
        heap, front, released = self._heap, self._front, self._released
        while heap and released.get(heap[0][2]) != heap[0][1]:
            heappop(heap)
        if front:
            self._forget_the_past()
        if front and not (heap and heap[0] < front[0]):
            return front[0][2]
        return heap[0][2] if heap else None

    def evict(self) -> Block | None:
        block = self._first()
        if block is not None:
            self.remove(block)
        return block


class Places:
    """Blocks in the order of numbers (from 1) that they keep: what is taken out can be put back where it was.

    O(1) at the end of the queue and for what comes back before the search has been past its place, else O(log n).
    """

    def __init__(self) -> None:
        self._line: OrderedDict[Block, int] = OrderedDict()
        """Numbers that rise; negative for blocks that are out."""
        self._last = 0
        self._at: dict[Block, int] = {}
        # Below the line: those that came back late. An entry counts if `_at` says the same.
        self._heap: list[tuple[int, Block]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, block: Block, number: int) -> None:
        """Put the block at this place."""
        line = self._line
        self._size += 1
        if number > self._last:
            if block in line:
                del line[block]
            line[block] = self._last = number
        elif line.get(block) == -number:
            line[block] = number
        else:
            self._at[block] = number
            if len(self._heap) > 2 * len(self._at) + 64:
                self._heap = [(at, b) for b, at in self._at.items()]
                heapify(self._heap)
            else:
                heappush(self._heap, (number, block))

    def take(self, block: Block) -> int:
        """Take the block out and return its place; 0 if it is not here."""
        number = self._line.get(block, 0)
        if number > 0:
            self._line[block] = -number
        elif not (number := self._at.pop(block, 0)):
            return 0
        self._size -= 1
        return number

    def _heads(self) -> tuple[float, float]:
        """Return the lowest number of either kind, and drop what does not count before it."""
        line, heap, at = self._line, self._heap, self._at
        while heap and at.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        while line and line[block := next(iter(line))] < 0:
            del line[block]
        return heap[0][0] if heap else inf, line[next(iter(line))] if line else inf

    def first(self) -> Block | None:
        """Return the block with the lowest number."""
        early, late = self._heads()
        if early < late:
            return self._heap[0][1]
        return next(iter(self._line), None)

    def take_below(self, number: float) -> list[tuple[int, Block]]:
        """Take out all that are before ``number``, lowest first, and return them with their places."""
        taken: list[tuple[int, Block]] = []
        while self._size:
            early, late = self._heads()
            if min(early, late) >= number:
                break
            if early < late:
                entry = heappop(self._heap)
                del self._at[entry[1]]
            else:
                block, at = self._line.popitem(last=False)
                entry = (at, block)
            self._size -= 1
            taken.append(entry)
        return taken

    def lowest(self, n: int, below: float = inf) -> list[tuple[int, Block]]:
        """Return up to ``n`` of those before ``below``, lowest first, with their places. They stay."""
        self._heads()
        heap, at = self._heap, self._at
        early: list[tuple[int, Block]] = []
        while heap and len(early) < n and heap[0][0] < below:
            entry = heappop(heap)
            if at.get(entry[1]) == entry[0] and (not early or early[-1] != entry):
                early.append(entry)
        for entry in early:
            heappush(heap, entry)
        inside = ((number, block) for block, number in self._line.items() if number > 0)
        line: Iterator[tuple[int, Block]] = takewhile(lambda entry: entry[0] < below, inside)
        return list(islice(merge(early, line) if early else line, n))


class Ghosts(Generic[V]):
    """Keys of blocks that are gone, with what is remembered of them; beyond ``limit`` the oldest is forgotten.

    A miss comes before the insert of the same key, and other blocks may go in between. So what a miss finds is put
    aside for its insert; no more than ``limit`` of those either, since some inserts never come.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.gone: OrderedDict[Hashable, V] = OrderedDict()
        self._aside: OrderedDict[Hashable, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self.gone)

    def add(self, key: Hashable, memory: V) -> None:
        """Remember a key."""
        gone = self.gone
        gone[key] = memory
        if len(gone) > self.limit:
            gone.popitem(last=False)

    def find(self, key: Hashable) -> V | None:
        """Return what is remembered of the key, and forget it."""
        return self.gone.pop(key, None)

    def put_aside(self, key: Hashable, memory: V) -> None:
        """Keep something for the insert of this key."""
        self._aside[key] = memory
        if len(self._aside) > self.limit:
            self._aside.popitem(last=False)

    def claim(self, key: Hashable) -> V | None:
        """Return what was put aside for this key, or, where nobody was told of a miss, what is remembered of it."""
        memory = self._aside.pop(key, None)
        return self.gone.pop(key, None) if memory is None else memory
