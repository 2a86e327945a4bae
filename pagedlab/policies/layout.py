"""Slot `layout`: how block tables are encoded for the kernel.

The cache knows a block table as a list of physical block numbers. A kernel wants flat integers. A layout keeps
both in step: it owns two int32 arrays, ``entries`` and ``index``, updates them incrementally as sequences grow,
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

from pagedlab.policies.base import Policy

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
