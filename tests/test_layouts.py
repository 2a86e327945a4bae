"""Law 3 for layouts: decode gives back the tables after any change, and every form of `block_of` reads the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

import pagedlab.kernels.layouts as layouts
from pagedlab.errors import ConfigError, InvariantBroken
from pagedlab.policies.layout import CSR, Extents, Layout, Padded, TwoLevel
from pagedlab.registry import lookup_class, policy_names

ROWS, BLOCKS = 5, 40
ALL = [lookup_class("layout", name) for name in policy_names("layout")]


@pytest.fixture(scope="module", params=ALL, ids=lambda cls: cls.name)
def kind(request):
    return request.param


@njit
def _read(block_of, entries, index, row, count):
    return [block_of(entries, index, row, i) for i in range(count)]


def check(layout: Layout, tables: dict[int, list[int]]) -> None:
    for row in range(ROWS):
        assert layout.decode(row) == tables.get(row, [])
    entries, index = layout.arrays()
    assert entries.dtype == index.dtype == np.int32
    assert entries.ndim == index.ndim == 1
    rows = np.repeat(sorted(tables), [len(tables[row]) for row in sorted(tables)]).astype(np.int64)
    logical = np.concatenate([np.arange(len(tables[row])) for row in sorted(tables)] or [rows])
    expected = [block for row in sorted(tables) for block in tables[row]]
    block_of = layouts.device_functions(layout)
    tensors = [torch.from_numpy(a) for a in (entries, index, rows, logical)]
    assert block_of.torch(*tensors).tolist() == expected
    for row, table in tables.items():
        if table:
            assert _read(block_of.numba, entries, index, row, len(table)) == table


blocks = st.lists(st.integers(0, 2**31 - 1), max_size=12) | st.builds(
    lambda first, n: list(range(first, first + n)), st.integers(0, 30), st.integers(0, 12)
)
changes = st.lists(
    st.tuples(
        st.sampled_from(["open", "append", "append", "append", "replace", "close"]),
        st.integers(0, ROWS - 1),
        blocks,
        st.integers(0, BLOCKS - 1),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(changes)
def test_tables_survive_every_change(kind, operations):
    layout = kind()
    layout.reset(max_rows=ROWS, max_blocks=BLOCKS)
    tables: dict[int, list[int]] = {}
    for what, row, new, i in operations:
        table = tables.get(row)
        if what == "open" and table is None:
            layout.open(row, new)
            tables[row] = list(new)
        elif what == "append" and table is not None and len(table) + len(new) <= BLOCKS:
            layout.append(row, new)
            table += new
        elif what == "replace" and table and i < len(table):
            layout.replace(row, i, 7)
            table[i] = 7
        elif what == "close" and table is not None:
            layout.close(row)
            del tables[row]
        check(layout, tables)


def test_reset_starts_empty(kind):
    layout = kind()
    layout.reset(max_rows=2, max_blocks=4)
    layout.open(0, [3, 1])
    layout.reset(max_rows=2, max_blocks=4)
    assert layout.decode(0) == []
    layout.open(0, [2])
    assert layout.decode(0) == [2]


def test_csr_memory_follows_the_sequences_and_padded_the_longest():
    sizes = {}
    for cls in ALL:
        layout = cls()
        layout.reset(max_rows=256, max_blocks=10_000)
        layout.open(0, range(10_000))
        for row in range(1, 10):
            layout.open(row, range(20))
        full = layout.nbytes
        layout.close(0)
        for _ in range(200):  # churn leaves garbage behind, which packing takes away
            layout.close(5)
            layout.open(5, range(20))
        sizes[cls] = full, layout.nbytes
    assert sizes[CSR][0] < sizes[Padded][0] / 50
    assert sizes[CSR][1] < sizes[CSR][0] / 20
    assert sizes[TwoLevel][0] < sizes[Padded][0] / 10, "pages follow the sequences, the directory the longest"
    assert sizes[Extents][0] < sizes[CSR][0] / 5, "ranges are one run each"


def test_misuse_is_named(kind):
    layout = kind()
    layout.reset(max_rows=2, max_blocks=3)
    layout.open(0, [1])
    with pytest.raises(InvariantBroken, match="opened twice"):
        layout.open(0, [1])
    with pytest.raises(InvariantBroken, match="full at 3"):
        layout.append(0, [1, 2, 3])
    with pytest.raises(InvariantBroken, match="closed"):
        layout.append(1, [1])
    with pytest.raises(InvariantBroken, match="no logical block 1"):
        layout.replace(0, 1, 9)
    with pytest.raises(InvariantBroken, match="closed twice"):
        layout.close(1)
    assert layout.decode(0) == [1]


def test_a_row_can_be_filled_to_the_last_block(kind):
    layout = kind()
    layout.reset(max_rows=2, max_blocks=5)
    layout.open(0, [9, 2, 9, 2, 9])
    layout.open(1, [4])
    for block in (2, 4, 2, 4):
        layout.append(1, [block])
    check_two = {0: [9, 2, 9, 2, 9], 1: [4, 2, 4, 2, 4]}
    assert {row: layout.decode(row) for row in (0, 1)} == check_two
    for row in (0, 1):
        with pytest.raises(InvariantBroken, match="full at 5"):
            layout.append(row, [1])


@pytest.mark.parametrize("cls", [CSR, Extents])
def test_no_row_has_room_for_more_than_the_longest_table(cls):
    """The next row begins behind the room of the one that grew; of ranges, two entries for each block."""
    layout = cls()
    layout.reset(max_rows=2, max_blocks=9)
    layout.open(0, [])
    for block in (5, 3) * 4:
        layout.append(0, [block])
    layout.append(0, [5])
    layout.open(1, [1])
    begins = layout.arrays()[1] if cls is CSR else layout.arrays()[1][::2]
    assert begins[1] - begins[0] == (9 if cls is CSR else 18)


def test_csr_packs_to_the_front():
    layout = CSR()
    layout.reset(max_rows=4, max_blocks=100)
    for row in range(4):
        layout.open(row, range(40))
    for row in (0, 1, 2):
        layout.close(row)
    assert layout.arrays()[1][3] == 0
    assert len(layout.arrays()[0]) <= 160
    assert layout.decode(3) == list(range(40))


def test_two_level_directories_at_most_double():
    layout = TwoLevel(page=2)
    layout.reset(max_rows=3, max_blocks=50)
    layout.open(0, [])
    for n in range(1, 51):
        layout.append(0, [n])
        pages, (page, width) = -(-n // 2), layout.arrays()[1][:2]
        assert page == 2
        assert pages <= width <= min(25, max(1, 2 * pages - 1))


def test_two_level_tables_lie_on_pages_of_others_neighbours():
    """Two rows grow in turns, from the middle of a page over several, so that no row's pages are adjacent."""
    layout = TwoLevel(page=4)
    layout.reset(max_rows=2, max_blocks=60)
    tables = {0: [], 1: []}
    for row in tables:
        layout.open(row, [])
    for n in (3, 1, 6, 7, 2, 9, 4):
        for row, table in tables.items():
            new = [100 * row + len(table) + i for i in range(n)]
            layout.append(row, new)
            table += new
    assert {row: layout.decode(row) for row in tables} == tables


def test_kernels_read_the_entries_and_what_leads_to_them(kind):
    layout = kind()
    layout.reset(max_rows=3, max_blocks=200)
    layout.open(0, [7, 8, 9, 3, 4, 5, 6, 1, 2])
    layout.open(1, range(91))
    expected = {
        "padded": 400,
        "csr": 404,
        "two-level": 400 + 4 * 7,
        "extents": 8 + 8 * 4,  # 100 blocks are in 4 runs
    }
    assert layout.bytes_read(100) == expected[kind.name]
    assert layout.bytes_read(50) < layout.bytes_read(100)


def test_two_level_tables_waste_less_than_a_page_each_and_share_what_is_closed():
    layout = TwoLevel(page=8)
    layout.reset(max_rows=4, max_blocks=1000)
    for row in range(4):
        layout.open(row, range(17))
    entries = len(layout.arrays()[0])
    assert entries <= 2 * 4 * 24
    for _ in range(50):
        layout.close(2)
        layout.open(2, range(24))
    assert len(layout.arrays()[0]) == entries
    assert layout.decode(1) == list(range(17))


@pytest.mark.parametrize("page", [1, 3, 16])
def test_a_directory_costs_a_word_per_page(page):
    layout = TwoLevel(page=page)
    assert layout.bytes_read(48) == 4 * 48 + 4 * 48 // page


def test_extents_cost_what_the_runs_cost():
    layout = Extents()
    assert layout.bytes_read(100) == 808, "nothing is known: no two blocks are adjacent"
    layout.reset(max_rows=2, max_blocks=100)
    layout.open(0, range(50))
    before = layout.nbytes
    layout.append(0, range(50, 100))
    assert layout.nbytes == before, "a run that goes on takes no more room"
    assert layout.bytes_read(100) == 16
    layout.replace(0, 40, 7)
    assert layout.decode(0) == [*range(40), 7, *range(41, 100)]
    assert layout.bytes_read(100) == 8 * 3 + 8
    layout.replace(0, 40, 40)
    assert layout.bytes_read(100) == 16, "and it is one run again"


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.data())
def test_extents_find_every_block_of_many_runs(lengths, data):
    """Runs of several lengths at places of their own, so that the search has something to halve."""
    starts = data.draw(st.permutations(range(len(lengths))))
    table = [100 * start + i for start, length in zip(starts, lengths) for i in range(length)]
    layout = Extents()
    layout.reset(max_rows=ROWS, max_blocks=len(table))
    layout.open(1, table[: len(table) // 2])
    layout.append(1, table[len(table) // 2 :])
    check(layout, {1: table})
    assert layout.bytes_read(len(table)) == 8 * len(lengths) + 8


def test_missing_device_functions_are_named():
    class Nowhere(Padded):
        device_functions = "pagedlab.kernels.layouts:nowhere"

    with pytest.raises(ConfigError, match="nowhere"):
        layouts.device_functions(Nowhere())
