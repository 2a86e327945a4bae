"""Block tables of a few sequences around a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pagedlab.testing.driver import Driver

ROWS, BLOCKS = 4, 24


class Tables(Driver):
    """What the tables should be, row by row."""

    operations: ClassVar[tuple[str, ...]] = ("open", "append", "replace", "close", "reopen")

    def begin(self, codes: Sequence[int]) -> None:
        """Reset, with all rows closed."""
        self.tables: dict[int, list[int]] = {}
        self.ask("reset", self.policy.reset, max_rows=ROWS, max_blocks=BLOCKS)
        self.next = 0
        self.compare("reset", -1, "closed_rows_are_empty")

    def blocks(self, n: int) -> list[int]:
        """Return ``n`` numbers that were not used before."""
        self.next += n
        return [100 + 7 * i for i in range(self.next - n, self.next)]

    # ---- operations ----------------------------------------------------------------------------------------------

    def open(self, argument: int) -> None:
        """Give a closed row a table."""
        closed = [row for row in range(ROWS) if row not in self.tables]
        if not closed:
            return
        row, blocks = closed[argument // 7 % len(closed)], self.blocks(argument % 7)
        said = f"open(row {row}, {blocks})"
        self.ask(said, self.policy.open, row, blocks)
        self.tables[row] = list(blocks)
        self.compare(said, row, "opened_tables_decode")

    def some(self, argument: int) -> int | None:
        """Return an open row."""
        return list(self.tables)[argument % len(self.tables)] if self.tables else None

    def append(self, argument: int) -> None:
        """Add blocks to a row's table."""
        row, n = self.some(argument // 5), 1 + argument % 5
        if row is None or len(self.tables[row]) + n > BLOCKS:
            return
        blocks = self.blocks(n)
        said = f"append(row {row}, {blocks})"
        self.ask(said, self.policy.append, row, blocks)
        self.tables[row] += blocks
        self.compare(said, row, "appends_are_kept")

    def replace(self, argument: int) -> None:
        """Point one logical block at another physical one."""
        row = self.some(argument)
        if row is None or not self.tables[row]:
            return
        i, (block,) = argument // ROWS % len(self.tables[row]), self.blocks(1)
        said = f"replace(row {row}, {i}, {block})"
        self.ask(said, self.policy.replace, row, i, block)
        self.tables[row][i] = block
        self.compare(said, row, "replacements_are_kept")

    def close(self, argument: int) -> None:
        """Forget a row."""
        row = self.some(argument)
        if row is None:
            return
        self.ask(f"close(row {row})", self.policy.close, row)
        del self.tables[row]
        self.compare(f"close(row {row})", row, "closed_rows_are_empty")

    def reopen(self, argument: int) -> None:
        """Close a row and open one."""
        self.close(argument)
        self.open(argument)

    # ---- what must hold ------------------------------------------------------------------------------------------

    def compare(self, said: str, changed: int, law: str) -> None:
        """Decode every row; a wrong one that the operation was not about has been mixed up with it."""
        self.tell(said)
        for row in sorted(range(ROWS), key=lambda r: r != changed):
            decoded = self.ask(f"decode(row {row})", self.policy.decode, row)
            wanted = self.tables.get(row, [])
            if decoded != wanted:
                wrong = law if row == changed or changed < 0 else "rows_do_not_mix"
                raise self.broke(wrong, f"decode(row {row}) returned {decoded}, not {wanted}")
        arrays = self.ask("arrays()", self.policy.arrays)
        good = isinstance(arrays, tuple) and len(arrays) == 2
        if not good or any(
            not isinstance(a, np.ndarray) or a.dtype != np.int32 or a.ndim != 1 for a in arrays
        ):
            shown = [
                f"{getattr(a, 'dtype', type(a).__name__)}{list(getattr(a, 'shape', ()))}" for a in arrays
            ]
            raise self.broke("arrays_are_flat_int32", f"arrays() returned {', '.join(shown)}")
