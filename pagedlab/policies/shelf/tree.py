"""Leaves first: of the tree that prefixes make, only blocks that nothing continues are given up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable
from heapq import heapify, heappop, heappush, nsmallest

from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction, Score


class LeafFirst(Eviction):
    """The order of `priority`, read at release, among blocks without resident children. O(log cached), amortized.

    Where the leaves are too few (a child is protected, or keys are no chained hashes), the others follow in the same
    order.
    """

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._resident: dict[Hashable, Block] = {}
        self._children: Counter[Hashable] = Counter()
        """Resident blocks by the key of their parent, whether that is resident or not."""
        self._scores: dict[Block, Score] = {}

    def insert(self, block: Block) -> None:
        self._resident[block.key] = block
        self._children[block.parent_key] += 1

    def release(self, block: Block) -> None:
        self._clock += 1
        self._released[block] = self._clock
        self._scores[block] = self.priority(block)
        if block.key not in self._children:
            self._push(block)

    def _entry(self, block: Block) -> tuple[Score, int, Block]:
        return self._scores[block], self._released[block], block

    def _push(self, block: Block) -> None:
        if len(self._heap) > 2 * len(self._released) + 64:
            self._heap = [self._entry(b) for b in self._released if b.key not in self._children]
            heapify(self._heap)
        else:
            heappush(self._heap, self._entry(block))

    def _first(self) -> Block | None:
        """Return the leaf with the lowest score."""
        heap = self._heap
        while heap:
            _, at, block = heap[0]
            if self._released.get(block) == at and block.key not in self._children:
                return block
            heappop(heap)
        return None

    def remove(self, block: Block) -> None:
        super().remove(block)
        self._scores.pop(block, None)
        del self._resident[block.key]
        parent_key = block.parent_key
        self._children[parent_key] -= 1
        if not self._children[parent_key]:
            del self._children[parent_key]
            parent = self._resident.get(parent_key)
            if parent in self._released:
                self._push(parent)

    def evict(self) -> Block | None:
        block = self._first() or next(iter(self.victims(1)), None)
        if block is not None:
            self.remove(block)
        return block

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        heap, released, children = self._heap, self._released, self._children
        chosen: dict[Block, None] = {}
        gone: Counter[Hashable] = Counter()
        kept: list[tuple[Score, int, Block]] = []
        while heap and len(chosen) < n:
            entry = heappop(heap)
            _, at, block = entry
            # Stale once the block was used or got a child; losing the last child makes a new entry.
            if released.get(block) != at or block in chosen or children[block.key] > gone[block.key]:
                continue
            kept.append(entry)
            if block in protected:
                continue
            chosen[block] = None
            gone[block.parent_key] += 1
            parent = self._resident.get(block.parent_key)
            if parent in released and gone[block.parent_key] == children[block.parent_key]:
                heappush(heap, self._entry(parent))
        for entry in kept:
            heappush(heap, entry)
        if len(chosen) < n:
            rest = (self._entry(b) for b in released if b not in chosen and b not in protected)
            chosen.update((block, None) for _, _, block in nsmallest(n - len(chosen), rest))
        return list(chosen) if len(chosen) == n else []
