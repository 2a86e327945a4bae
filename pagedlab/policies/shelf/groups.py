"""Blocks in groups: scores that change with time, without scoring every block again.

Many rules for KV caches weigh something that a block keeps while it waits (what it costs to recompute, whose it is)
against something that grows for all alike (how long it has waited). Among blocks that agree in the first, the order
never changes, so it is enough to compare the first block of every group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, ClassVar

from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction, Score

PS_PER_SECOND = 10**12
"""`View.now`, `Block.created` and `Block.last_released` are in picoseconds."""

Entry = tuple[Score, int, Block]
"""Priority, number of the release, block."""


class Grouped(Eviction):
    """Give `group` and `worth`: the lowest worth goes first, ties in the order of release.

    Inside a group the lowest `priority` goes first (left out: the block released longest ago), and `worth` must agree:
    at no time may a block be worth more than one behind it in its group. With ``leaves_only = True`` a block is a
    candidate while no child of it is cached, so that a tree of prefixes loses its leaves first; the rule gives way
    where it leaves too few (a protected child guards all before it).

    `release` and `remove` take O(log cached), `victims` O(groups + n log cached).
    """

    leaves_only: ClassVar[bool] = False

    def group(self, block: Block) -> Hashable:
        """Return what the block keeps while it waits; read when it becomes a candidate."""
        return None

    def priority(self, block: Block) -> Score:
        return 0.0

    def worth(self, group: Any, block: Block) -> Score:
        """Return what the block of ``group`` is worth now; read for the first of each group when victims are needed."""
        raise NotImplementedError(f"{type(self).__name__} does not define worth()")

    def survey(self, firsts: Iterable[tuple[Any, Block]]) -> None:
        """Look at the first block of every group before `worth` is asked: for scales that depend on all of them."""

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._empty()

    def _empty(self) -> None:
        self._groups: dict[Hashable, list[Entry]] = {}
        self._entries = 0
        self._now = 0
        """When victims were last asked for, in picoseconds: what `worth` means by now."""
        self._resident: dict[Hashable, Block] = {}
        self._children: dict[Hashable, int] = {}
        """Cached blocks by the key of their parent, whether that is cached or not."""

    def insert(self, block: Block) -> None:
        if self.leaves_only:
            self._resident[block.key] = block
            if block.parent_key is not None:
                self._children[block.parent_key] = self._children.get(block.parent_key, 0) + 1

    def release(self, block: Block) -> None:
        self._clock += 1
        self._released[block] = self._clock
        if block.key not in self._children:
            self._offer(block)

    def remove(self, block: Block) -> None:
        self._released.pop(block, None)
        if not self.leaves_only:
            return
        if self._resident.get(block.key) is block:
            del self._resident[block.key]
        parent_key = block.parent_key
        siblings = self._children.get(parent_key, 0) - 1
        if siblings > 0:
            self._children[parent_key] = siblings
        elif siblings == 0:
            del self._children[parent_key]
            parent = self._resident.get(parent_key)
            if parent in self._released:
                self._offer(parent)

    def _offer(self, block: Block) -> None:
        if self._entries > 2 * len(self._released) + 64:
            self._tidy()
        entry = (self.priority(block), self._released[block], block)
        heappush(self._groups.setdefault(self.group(block), []), entry)
        self._entries += 1

    def _tidy(self) -> None:
        """Drop entries that no longer count, and all but one of those that say the same."""
        for group, heap in list(self._groups.items()):
            left = {entry[1]: entry for entry in heap if self._counts(entry)}
            heap[:] = left.values()
            heapify(heap)
            if not heap:
                del self._groups[group]
        self._entries = sum(map(len, self._groups.values()))

    def _counts(self, entry: Entry) -> bool:
        """Whether the block has neither been used nor got a child since."""
        return self._released.get(entry[2]) == entry[1] and entry[2].key not in self._children

    def _first(self, heap: list[Entry]) -> Entry | None:
        while heap:
            if self._counts(heap[0]):
                return heap[0]
            heappop(heap)
            self._entries -= 1
        return None

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        if len(self._released) < n:
            return []
        groups, released, children = self._groups, self._released, self._children
        empty: list[Hashable] = []
        for group, heap in groups.items():
            # `_first`, without the calls.
            while heap and (released.get(heap[0][2]) != heap[0][1] or heap[0][2].key in children):
                heappop(heap)
                self._entries -= 1
            if not heap:
                empty.append(group)
        for group in empty:
            del groups[group]
        self._now = self.view.now
        self.survey((group, heap[0][2]) for group, heap in groups.items())
        number, worth_of = count(), self.worth
        heads = [
            (worth_of(group, heap[0][2]), heap[0][1], next(number), heap[0][2], group, heap)
            for group, heap in groups.items()
        ]
        if n == 1 and not protected and heads:
            return [min(heads)[3]]
        heapify(heads)
        chosen: dict[Block, None] = {}
        gone: Counter[Hashable] = Counter()
        kept: list[tuple[list[Entry], Entry]] = []
        while heads and len(chosen) < n:
            _, _, _, block, group, heap = heappop(heads)
            if heap:
                kept.append((heap, heappop(heap)))
                self._entries -= 1
                if (first := self._first(heap)) is not None:
                    worth = self.worth(group, first[2])
                    heappush(heads, (worth, first[1], next(number), first[2], group, heap))
            if block in protected or block in chosen:
                continue
            chosen[block] = None
            parent_key = block.parent_key
            if parent_key in children:
                gone[parent_key] += 1
                parent = self._resident.get(parent_key)
                if parent in released and gone[parent_key] == children[parent_key]:
                    group = self.group(parent)
                    heappush(
                        heads, (self.worth(group, parent), released[parent], next(number), parent, group, [])
                    )
        for heap, entry in kept:
            heappush(heap, entry)
        self._entries += len(kept)
        if len(chosen) < n:
            rest = [b for b in released if b not in chosen and b not in protected]
            rest.sort(key=lambda b: (self.worth(self.group(b), b), released[b]))
            chosen.update(dict.fromkeys(rest[: n - len(chosen)]))
        return list(chosen) if len(chosen) == n else []
