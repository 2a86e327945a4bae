"""Slot `allocator`: which free physical blocks to hand out.

An allocator sees block numbers only. It is told which exist (`reset`), gives some away (`allocate`) and takes them back
(`free`). `allocate` is atomic: it returns exactly ``n`` different free blocks, or None and nothing has changed. It may
refuse although enough are free (a contiguous allocator finds no run): that is external fragmentation.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
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
        pop = self._free.popleft
        return [pop() for _ in range(n)]

    def free(self, blocks: Sequence[int]) -> None:
        self._free.extend(blocks)


@register("allocator", "first-fit")
class FirstFit(Allocator):
    """One run of adjacent blocks, the lowest that is long enough: how memory looked before paging.

    Keeps the free runs sorted by address and merges neighbours. O(runs) to allocate, O(log runs) to free a block.
    """

    contiguous: ClassVar[bool] = True

    def reset(self, blocks: Sequence[int]) -> None:
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}
        self._num_free = 0
        self.free(blocks)

    @property
    def num_free(self) -> int:
        return self._num_free

    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        if after is not None and self._lengths.get(after + 1, 0) >= n:
            return self._cut(after + 1, n)
        for start in self._starts:
            if self._lengths[start] >= n:
                return self._cut(start, n)
        return None

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
