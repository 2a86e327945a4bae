"""Slot `layout`: how block tables are encoded for the kernel.

The cache knows a block table as a list of physical block numbers. A kernel wants flat integers. A layout keeps
both in step: it owns two flat int32 arrays, ``entries`` and ``index``, updates them incrementally as sequences grow,
and names the device function that finds a physical block in them. Kernels are written once, against

    block_of(entries, index, row, i) -> physical block of logical block i of the sequence in `row`

so every layout runs with every kernel. A row belongs to one sequence from `open` to `close`; the executor hands
rows out and passes the kernel the row of each sequence in the batch.

The arrays may be replaced by larger ones on any change: ask `arrays` after the last change of a step.
``decode(row)`` must return what was opened, appended and replaced, in order, at any time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pagedlab.errors import InvariantBroken
from pagedlab.policies.base import Policy, param
from pagedlab.registry import register

Int32Array = NDArray[np.int32]


class Layout(Policy):
    """Contract of a block-table encoding. ``device_functions`` is ``"module:attribute"`` of its `block_of`s."""

    slot: ClassVar[str] = "layout"
    device_functions: ClassVar[str]

    @abstractmethod
    def reset(self, *, max_rows: int, max_blocks: int) -> None:
        """Start empty, for at most ``max_rows`` sequences of at most ``max_blocks`` blocks each."""

    @abstractmethod
    def open(self, row: int, blocks: Sequence[int]) -> None:
        """Give ``row`` a whole table. Cost: O(len(blocks)). The row must be closed or new."""

    @abstractmethod
    def append(self, row: int, blocks: Sequence[int]) -> None:
        """Add blocks at the end of a row's table. Amortised O(len(blocks))."""

    @abstractmethod
    def replace(self, row: int, i: int, block: int) -> None:
        """Point logical block ``i`` at another physical block (copy-on-write)."""

    @abstractmethod
    def close(self, row: int) -> None:
        """Forget a row; its storage may be used again."""

    @abstractmethod
    def decode(self, row: int) -> list[int]:
        """Return the row's table as physical block numbers."""

    @abstractmethod
    def arrays(self) -> tuple[Int32Array, Int32Array]:
        """Return ``(entries, index)``, valid until the next change."""

    @abstractmethod
    def bytes_read(self, num_blocks: int) -> int:
        """Bytes of table that a kernel reads to visit ``num_blocks`` blocks of one sequence (for cost models)."""

    @property
    def nbytes(self) -> int:
        """Bytes held by the encoding now."""
        entries, index = self.arrays()
        return int(entries.nbytes + index.nbytes)


class _Rows(Layout):
    """Shared bookkeeping: how long each row's table is, and whether the row is open (-1: closed)."""

    def reset(self, *, max_rows: int, max_blocks: int) -> None:
        self.max_rows, self.max_blocks = max_rows, max_blocks
        self._lengths = [-1] * max_rows

    def _opening(self, row: int, count: int) -> None:
        if self._lengths[row] >= 0:
            raise InvariantBroken(f"row {row} of the block table is opened twice")
        self._lengths[row] = 0
        self._extending(row, count)

    def _extending(self, row: int, count: int) -> int:
        """Count ``count`` more blocks; return where they go."""
        at = self._lengths[row]
        if at < 0 or at + count > self.max_blocks:
            state = "closed" if at < 0 else f"full at {self.max_blocks} blocks"
            raise InvariantBroken(f"row {row} of the block table cannot take {count} blocks: it is {state}")
        self._lengths[row] = at + count
        return at

    def _within(self, row: int, i: int) -> int:
        if not 0 <= i < self._lengths[row]:
            raise InvariantBroken(f"row {row} of the block table has no logical block {i}")
        return i

    def close(self, row: int) -> None:
        if self._lengths[row] < 0:
            raise InvariantBroken(f"row {row} of the block table is closed twice")
        self._lengths[row] = -1


@register("layout", "padded")
class Padded(_Rows):
    """One matrix, a row per sequence, as wide as the longest table (vLLM's block table).

    ::

        entries  row 0 | 7 3 9 . |      index = [width]
                 row 1 | 2 . . . |      block_of = entries[row * width + i]
                 row 2 | 5 1 8 4 |

    One read per block and O(1) changes; the width doubles when a table outgrows it, which copies the matrix. Memory is
    ``max_rows * width`` whatever the sequences hold, so one long sequence makes every row wide.
    """

    device_functions = "pagedlab.kernels.layouts:padded"

    def reset(self, *, max_rows: int, max_blocks: int) -> None:
        super().reset(max_rows=max_rows, max_blocks=max_blocks)
        self._matrix = np.zeros((max_rows, min(8, max_blocks)), dtype=np.int32)

    def open(self, row: int, blocks: Sequence[int]) -> None:
        self._opening(row, len(blocks))
        self._store(row, 0, blocks)

    def append(self, row: int, blocks: Sequence[int]) -> None:
        self._store(row, self._extending(row, len(blocks)), blocks)

    def _store(self, row: int, at: int, blocks: Sequence[int]) -> None:
        end, width = at + len(blocks), self._matrix.shape[1]
        if end > width:
            wider = np.zeros((self.max_rows, min(self.max_blocks, max(end, 2 * width))), dtype=np.int32)
            wider[:, :width] = self._matrix
            self._matrix = wider
        self._matrix[row, at:end] = blocks

    def replace(self, row: int, i: int, block: int) -> None:
        self._matrix[row, self._within(row, i)] = block

    def decode(self, row: int) -> list[int]:
        return self._matrix[row, : max(0, self._lengths[row])].tolist()  # type: ignore[no-any-return]

    def arrays(self) -> tuple[Int32Array, Int32Array]:
        return self._matrix.reshape(-1), np.array([self._matrix.shape[1]], dtype=np.int32)

    def bytes_read(self, num_blocks: int) -> int:
        return 4 * num_blocks


@register("layout", "csr")
class CSR(_Rows):
    """All tables in one array, one after the other, with room to grow; `index` says where each begins.

    ::

        entries  | 7 3 9 . | 5 1 8 4 | 2 . | free ...      index = start of each row
                   row 0     row 2     row 1               block_of = entries[index[row] + i]

    Memory follows what the sequences hold: a row has room for at most twice its table. One that outgrows its room moves
    to the end with twice as much; when more than half of the used array is left behind, all rows are packed again.
    Appends are O(1) amortised; a kernel reads one start per sequence more than the padded matrix.
    """

    device_functions = "pagedlab.kernels.layouts:csr"

    def reset(self, *, max_rows: int, max_blocks: int) -> None:
        super().reset(max_rows=max_rows, max_blocks=max_blocks)
        self._entries = np.zeros(max(16, max_rows), dtype=np.int32)
        self._start = np.zeros(max_rows, dtype=np.int32)
        self._room = [0] * max_rows
        self._used = self._garbage = 0

    def open(self, row: int, blocks: Sequence[int]) -> None:
        self._opening(row, len(blocks))
        self._room[row] = 0
        self._store(row, 0, blocks)

    def append(self, row: int, blocks: Sequence[int]) -> None:
        self._store(row, self._extending(row, len(blocks)), blocks)

    def _store(self, row: int, at: int, blocks: Sequence[int]) -> None:
        if at + len(blocks) > self._room[row]:
            self._move(row, at, min(self.max_blocks, max(4, 2 * self._room[row], at + len(blocks))))
        start = int(self._start[row]) + at
        self._entries[start : start + len(blocks)] = blocks

    def _move(self, row: int, length: int, room: int) -> None:
        """Give ``row`` new room at the end and take its ``length`` entries along."""
        if self._used + room > len(self._entries):
            larger = np.zeros(max(2 * len(self._entries), self._used + room), dtype=np.int32)
            larger[: self._used] = self._entries[: self._used]
            self._entries = larger
        old = int(self._start[row])
        self._entries[self._used : self._used + length] = self._entries[old : old + length]
        self._abandon(row)
        self._start[row], self._room[row] = self._used, room
        self._used += room
        if 2 * self._garbage > self._used:
            self._pack(row, length)

    def _abandon(self, row: int) -> None:
        self._garbage += self._room[row]
        self._start[row] = self._room[row] = 0

    def _pack(self, moving: int = -1, length: int = 0) -> None:
        """Copy every open row to the front of a fresh array; the row on the move still has its old ``length``."""
        packed = np.zeros(max(16, self._used), dtype=np.int32)
        end = 0
        for row, room in enumerate(self._room):
            if room:
                count, start = (length if row == moving else self._lengths[row]), int(self._start[row])
                packed[end : end + count] = self._entries[start : start + count]
                self._start[row] = end
                end += room
        self._entries, self._used, self._garbage = packed, end, 0

    def replace(self, row: int, i: int, block: int) -> None:
        self._entries[int(self._start[row]) + self._within(row, i)] = block

    def close(self, row: int) -> None:
        super().close(row)
        self._abandon(row)
        if 2 * self._garbage > self._used:
            self._pack()

    def decode(self, row: int) -> list[int]:
        start = int(self._start[row])
        return self._entries[start : start + max(0, self._lengths[row])].tolist()  # type: ignore[no-any-return]

    def arrays(self) -> tuple[Int32Array, Int32Array]:
        return self._entries, self._start

    def bytes_read(self, num_blocks: int) -> int:
        return 4 * num_blocks + 4


@register("layout", "two-level")
class TwoLevel(_Rows):
    """Pages of table entries, and a directory of pages for each row, as an operating system maps memory.

    ::

        index    page, width | 2 0 . . | 1 . . . | . . . . |      entries  | 5 1 8 4 | 2 . . . | 7 3 9 6 |
                               row 0     row 1     row 2         (pages)     page 0    page 1    page 2
                 block_of = entries[directory[row, i // page] * page + i % page]

    Nothing ever moves: a table grows by a page that may lie anywhere, and a closed row's pages serve the next. A row
    wastes less than a page; only the directory is as wide as the longest table. A kernel reads one word per page more
    than the padded matrix. Changes are O(1) a block, amortised over the growth of both arrays.
    """

    device_functions = "pagedlab.kernels.layouts:two_level"
    page: int = param(16, low=1, high=65536, unit="entries", help="table entries on one page")

    def reset(self, *, max_rows: int, max_blocks: int) -> None:
        super().reset(max_rows=max_rows, max_blocks=max_blocks)
        self._entries = np.zeros(max(1, max_rows) * self.page, dtype=np.int32)
        self._free = list(range(max(1, max_rows)))[::-1]
        self._pages: list[list[int]] = [[] for _ in range(max_rows)]
        self._directory = np.zeros((max_rows, 1), dtype=np.int32)

    def open(self, row: int, blocks: Sequence[int]) -> None:
        self._opening(row, len(blocks))
        self._store(row, 0, blocks)

    def append(self, row: int, blocks: Sequence[int]) -> None:
        self._store(row, self._extending(row, len(blocks)), blocks)

    def _store(self, row: int, at: int, blocks: Sequence[int]) -> None:
        pages, size, end = self._pages[row], self.page, at + len(blocks)
        while len(pages) * size < end:
            self._add_page(row)
        done = 0
        while at < end:
            page, offset = divmod(at, size)
            n = min(size - offset, end - at)
            start = pages[page] * size + offset
            self._entries[start : start + n] = blocks[done : done + n]
            at, done = at + n, done + n

    def _add_page(self, row: int) -> None:
        if not self._free:
            have = len(self._entries) // self.page
            self._free = list(range(have, 2 * have))[::-1]
            self._entries = np.concatenate([self._entries, np.zeros_like(self._entries)])
        pages, width = self._pages[row], self._directory.shape[1]
        if len(pages) == width:
            widest = -(-self.max_blocks // self.page)
            wider = np.zeros((self.max_rows, min(2 * width, widest)), dtype=np.int32)
            wider[:, :width] = self._directory
            self._directory = wider
        self._directory[row, len(pages)] = self._free[-1]
        pages.append(self._free.pop())

    def replace(self, row: int, i: int, block: int) -> None:
        page, offset = divmod(self._within(row, i), self.page)
        self._entries[self._pages[row][page] * self.page + offset] = block

    def close(self, row: int) -> None:
        super().close(row)
        self._free += self._pages[row][::-1]
        self._pages[row] = []

    def decode(self, row: int) -> list[int]:
        pages = self._entries.reshape(-1, self.page)[self._pages[row]].reshape(-1)
        return pages[: max(0, self._lengths[row])].tolist()  # type: ignore[no-any-return]

    def arrays(self) -> tuple[Int32Array, Int32Array]:
        head = np.array([self.page, self._directory.shape[1]], dtype=np.int32)
        return self._entries, np.concatenate([head, self._directory.reshape(-1)])

    def bytes_read(self, num_blocks: int) -> int:
        return 4 * num_blocks + 4 * -(-num_blocks // self.page)


@register("layout", "extents")
class Extents(_Rows):
    """Runs of adjacent blocks: where each begins in the sequence and where in memory, as file systems keep files.

    ::

        entries  | 0 7 | 3 20 |     | 0 5 |      blocks of row 0: 7 8 9 20 21 ...; of row 1: 5 6 7 ...
                   row 0              row 1
        index    | where row 0 begins, its number of runs | row 1 ... |
                 block_of = start + i - first, of the last run with first <= i (binary search)

    A table in one piece takes 8 bytes however long it is, and a block that continues the last run costs nothing to
    append. A table without two adjacent blocks takes twice the padded matrix, and every lookup O(log runs). `replace`
    writes the row anew, O(blocks).
    """

    device_functions = "pagedlab.kernels.layouts:extents"

    _open_blocks = _open_runs = 0

    def reset(self, *, max_rows: int, max_blocks: int) -> None:
        super().reset(max_rows=max_rows, max_blocks=max_blocks)
        self._runs = CSR()
        self._runs.reset(max_rows=max_rows, max_blocks=2 * max_blocks)
        self._next = [-1] * max_rows
        """The block that would continue each row's last run."""
        self._open_blocks = self._open_runs = 0

    def open(self, row: int, blocks: Sequence[int]) -> None:
        self._opening(row, len(blocks))
        self._runs.open(row, [])
        self._next[row] = -1
        self._store(row, 0, blocks)

    def append(self, row: int, blocks: Sequence[int]) -> None:
        self._store(row, self._extending(row, len(blocks)), blocks)

    def _store(self, row: int, at: int, blocks: Sequence[int]) -> None:
        runs: list[int] = []
        following = self._next[row]
        for i, block in enumerate(blocks, at):
            if block != following:
                runs += (i, block)
            following = block + 1
        self._runs.append(row, runs)
        self._next[row] = following
        self._open_blocks += len(blocks)
        self._open_runs += len(runs) // 2

    def replace(self, row: int, i: int, block: int) -> None:
        blocks = self.decode(row)
        blocks[self._within(row, i)] = block
        self.close(row)
        self.open(row, blocks)

    def close(self, row: int) -> None:
        length = self._lengths[row]
        super().close(row)
        self._open_blocks -= length
        self._open_runs -= len(self._runs.decode(row)) // 2
        self._runs.close(row)

    def decode(self, row: int) -> list[int]:
        runs = self._runs.decode(row)
        firsts, starts = runs[::2], runs[1::2]
        ends = [*firsts[1:], self._lengths[row]]
        return [
            b for first, end, start in zip(firsts, ends, starts) for b in range(start, start + end - first)
        ]

    def arrays(self) -> tuple[Int32Array, Int32Array]:
        entries, begins = self._runs.arrays()
        index = np.empty(2 * self.max_rows, dtype=np.int32)
        index[::2] = begins
        index[1::2] = np.maximum(self._runs._lengths, 0) // 2
        return entries, index

    def bytes_read(self, num_blocks: int) -> int:
        """Bytes for runs as long as those of the open rows are on average; of one block if none is open."""
        runs = num_blocks if not self._open_runs else -(-num_blocks * self._open_runs // self._open_blocks)
        return 8 * runs + 8
