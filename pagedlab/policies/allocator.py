"""Slot `allocator`: which free physical blocks to hand out.

An allocator sees block numbers only. It is told which exist (`reset`), gives some away (`allocate`) and takes them back
(`free`). `allocate` is atomic: it returns exactly ``n`` different free blocks, or None and nothing has changed. It may
refuse although enough are free (a contiguous allocator finds no run): that is external fragmentation.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Sequence
from typing import ClassVar

from pagedlab.policies.base import Policy
from pagedlab.registry import register


class Allocator(Policy):
    """Contract. ``contiguous`` says that `allocate` returns adjacent blocks, in order."""

    slot: ClassVar[str] = "allocator"
    contiguous: ClassVar[bool] = False

    @abstractmethod
    def reset(self, blocks: Sequence[int]) -> None:
        """Start with exactly ``blocks`` free."""

    @property
    @abstractmethod
    def num_free(self) -> int:
        """How many blocks are free."""

    @abstractmethod
    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        """Take ``n`` >= 1 blocks; ``after`` is the block that they will follow in a table, as a wish."""

    @abstractmethod
    def free(self, blocks: Sequence[int]) -> None:
        """Take back blocks that were handed out, in the order in which they were released."""

    def fits(self, n: int, also: Collection[int] = ()) -> bool:
        """Whether `allocate` would succeed for ``n`` if the blocks in ``also`` were freed first. Changes nothing."""
        return self.num_free + len(also) >= n


@register("allocator", "free-list")
class FreeList(Allocator):
    """Last in, first out: the block freed last is the first handed out, likely still warm. O(1) a block."""

    def reset(self, blocks: Sequence[int]) -> None:
        self._free = list(reversed(blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        if n > len(self._free):
            return None
        taken = self._free[: -n - 1 : -1]
        del self._free[-n:]
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        self._free.extend(blocks)


@register("allocator", "fifo")
class FIFO(Allocator):
    """First in, first out: blocks rest as long as possible before they are used again (vLLM's free queue). O(1)."""

    def reset(self, blocks: Sequence[int]) -> None:
        self._free = deque(blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        if n > len(self._free):
            return None
        if n == len(self._free):
            taken = list(self._free)
            self._free.clear()
            return taken
        pop = self._free.popleft
        return [pop() for _ in range(n)]

    def free(self, blocks: Sequence[int]) -> None:
        self._free.extend(blocks)


class _Runs(Allocator):
    """Free runs of adjacent blocks, sorted by address; neighbours are merged. O(log runs) to free a block."""

    contiguous: ClassVar[bool] = True

    def reset(self, blocks: Sequence[int]) -> None:
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}
        self._num_free = 0
        self.free(blocks)

    @property
    def num_free(self) -> int:
        return self._num_free

    @abstractmethod
    def _choose(self, n: int) -> int | None:
        """Return where the run begins that ``n`` blocks are cut from; None if none is long enough."""

    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        if after is not None and self._lengths.get(after + 1, 0) >= n:
            return self._cut(after + 1, n)
        start = self._choose(n)
        return None if start is None else self._cut(start, n)

    def _cut(self, start: int, n: int) -> list[int]:
        rest = self._lengths.pop(start) - n
        at = bisect_left(self._starts, start)
        if rest:
            self._starts[at] = start + n
            self._lengths[start + n] = rest
        else:
            del self._starts[at]
        self._num_free -= n
        return list(range(start, start + n))

    def free(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            start, length = block, 1
            at = bisect_left(self._starts, block)
            if at < len(self._starts) and self._starts[at] == block + 1:
                length += self._lengths.pop(self._starts.pop(at))
            if at and self._starts[at - 1] + self._lengths[self._starts[at - 1]] == block:
                start = self._starts[at - 1]
                self._lengths[start] += length
            else:
                self._starts.insert(at, start)
                self._lengths[start] = length
        self._num_free += len(blocks)

    def fits(self, n: int, also: Collection[int] = ()) -> bool:
        if self._num_free + len(also) < n:
            return False
        if not also:
            return any(length >= n for length in self._lengths.values())
        free = sorted({*also, *(b for s in self._starts for b in range(s, s + self._lengths[s]))})
        run = 0
        for i, block in enumerate(free):
            run = run + 1 if i and free[i - 1] == block - 1 else 1
            if run >= n:
                return True
        return False


@register("allocator", "first-fit")
class FirstFit(_Runs):
    """One run of adjacent blocks, the lowest that is long enough: how memory looked before paging. O(runs)."""

    def _choose(self, n: int) -> int | None:
        return next((start for start in self._starts if self._lengths[start] >= n), None)


@register("allocator", "best-fit")
class BestFit(_Runs):
    """One run of adjacent blocks, the shortest that is long enough: long runs stay whole, slivers remain. O(runs)."""

    def _choose(self, n: int) -> int | None:
        fitting = ((length, start) for start, length in self._lengths.items() if length >= n)
        return min(fitting, default=(0, None))[1]


@register("allocator", "buddy")
class Buddy(Allocator):
    """Runs of 2, 4, 8, ... blocks at multiples of their length, split in halves and merged again (Knowlton, 1965).

    ``n`` blocks are the beginning of the lowest of the smallest runs that can hold ``n`` rounded up to a power of two;
    what is left of that run stays free, in pieces. A block that is freed merges with its buddy, the other half of the
    run twice as long, as long as that is free. A request for more than the pool's largest run gets the beginning of
    the pool, or nothing. O(log pool) splits or merges for a request and for every block freed::

        3 of 16   | in use | 1 |   4   |       8       |
        freed     |                 16                 |
    """

    contiguous: ClassVar[bool] = True

    def reset(self, blocks: Sequence[int]) -> None:
        self._base = min(blocks, default=0)
        self._largest = max(len(blocks).bit_length() - 1, 0)
        self._orders: dict[int, int] = {}
        """Free runs: where each begins, from the pool's beginning, and the power of two that it is long."""
        self._starts: list[list[int]] = [[] for _ in range(self._largest + 1)]
        """The same by power, sorted."""
        self._num_free = 0
        self.free(blocks)

    @property
    def num_free(self) -> int:
        return self._num_free

    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        order = (n - 1).bit_length()
        if order > self._largest:
            runs = self._beginning(n, self._orders)
        else:
            wish = -1 if after is None else after + 1 - self._base
            runs = [wish] if self._orders.get(wish, -1) >= order else self._lowest(order)
        if not runs:
            return None
        start, end = runs[0], runs[-1] + (1 << self._orders[runs[-1]])
        for run in runs:
            starts = self._starts[self._orders.pop(run)]
            del starts[bisect_left(starts, run)]
        self._put(start + n, end)
        self._num_free -= n
        return list(range(self._base + start, self._base + start + n))

    def _lowest(self, order: int) -> list[int]:
        return next((starts[:1] for starts in self._starts[order:] if starts), [])

    @staticmethod
    def _beginning(n: int, orders: dict[int, int]) -> list[int]:
        """Return the free runs that the pool's first ``n`` blocks lie in; none if one of these is not free."""
        runs, end = [], 0
        while end < n:
            if end not in orders:
                return []
            runs.append(end)
            end += 1 << orders[end]
        return runs

    def _put(self, start: int, end: int) -> None:
        """Keep what is left of a run that was cut, in the longest pieces that may begin where they begin."""
        while start < end:
            order = (start & -start).bit_length() - 1
            self._orders[start] = order
            insort(self._starts[order], start)
            start += 1 << order

    def free(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            start, order = block - self._base, 0
            while self._orders.get(buddy := start ^ (1 << order)) == order:
                del self._orders[buddy]
                starts = self._starts[order]
                del starts[bisect_left(starts, buddy)]
                start, order = min(start, buddy), order + 1
            self._orders[start] = order
            insort(self._starts[order], start)
        self._num_free += len(blocks)

    def fits(self, n: int, also: Collection[int] = ()) -> bool:
        if self._num_free + len(also) < n:
            return False
        trial = self
        if also:
            trial = self.clone()
            trial._base, trial._largest, trial._num_free = self._base, self._largest, self._num_free
            trial._orders = dict(self._orders)
            trial._starts = [list(starts) for starts in self._starts]
            trial.free(list(also))
        order = (n - 1).bit_length()
        if order > trial._largest:
            return bool(trial._beginning(n, trial._orders))
        return bool(trial._lowest(order))
