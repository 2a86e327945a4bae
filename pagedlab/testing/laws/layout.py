"""The laws of slot `layout`: what was encoded is decoded, by the layout and by its device function."""

from __future__ import annotations

from importlib.util import find_spec

from pagedlab.errors import LawBroken
from pagedlab.testing.drivers.layout import Tables
from pagedlab.testing.law import Skipped, law
from pagedlab.testing.subject import Subject


@law("layout")
def check_layout_opened_tables_decode(subject: Subject) -> None:
    """A table that was opened is decoded as it was given."""
    subject.hold("opened_tables_decode")


@law("layout")
def check_layout_appends_are_kept(subject: Subject) -> None:
    """Appended blocks are decoded after those that were there."""
    subject.hold("appends_are_kept")


@law("layout")
def check_layout_replacements_are_kept(subject: Subject) -> None:
    """A replaced block is decoded in the place of the old one."""
    subject.hold("replacements_are_kept")


@law("layout")
def check_layout_closed_rows_are_empty(subject: Subject) -> None:
    """A closed row decodes to nothing."""
    subject.hold("closed_rows_are_empty")


@law("layout")
def check_layout_rows_do_not_mix(subject: Subject) -> None:
    """A change of one row leaves all others as they are."""
    subject.hold("rows_do_not_mix")


@law("layout")
def check_layout_arrays_are_flat_int32(subject: Subject) -> None:
    """`arrays` returns two int32 arrays of one dimension."""
    subject.hold("arrays_are_flat_int32")


@law("layout")
def check_layout_block_of_equals_decode(subject: Subject) -> None:
    """The device function (its torch form) finds the blocks that `decode` returns."""
    if find_spec("torch") is None:
        raise Skipped("torch is not installed")
    import torch

    from pagedlab.kernels.layouts import device_functions

    block_of = device_functions(subject.policy).torch  # type: ignore[arg-type]

    def attempt(size: int, codes: list[int]) -> None:
        tables = subject.driver(size, codes)
        assert isinstance(tables, Tables)
        for code in codes:
            tables.step(code)
        arrays = [torch.from_numpy(array) for array in tables.policy.arrays()]
        for row, table in tables.tables.items():
            if not table:
                continue
            rows, logical = torch.full((len(table),), row), torch.arange(len(table))
            found = tables.ask("block_of", block_of, *arrays, rows, logical).tolist()
            if found != table:
                said = f"block_of(row {row}, 0..{len(table) - 1}) is {found}, not {table}"
                raise tables.broke("block_of_equals_decode", said)

    subject.search("block_of_equals_decode", attempt)


@law("layout")
def check_layout_bytes_read_are_enough(subject: Subject) -> None:
    """`bytes_read` counts at least the four bytes of every entry, and never less for more blocks."""
    layout = subject.fresh()
    layout.reset(max_rows=2, max_blocks=1024)
    before = 0
    for n in (0, 1, 2, 7, 64, 1000):
        said = layout.bytes_read(n)
        if not isinstance(said, int) or said < max(4 * n, before):
            raise LawBroken(f"bytes_read({n}) returned {said!r}; {n} entries are {4 * n} bytes")
        before = said
