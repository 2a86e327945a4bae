"""The benchmarks of kernels and layouts: every point and contender is there, ratios are what they say, files resume."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from pagedlab.bench import figures, kernel, kernel_grid, layouts
from pagedlab.errors import ConfigError
from pagedlab.registry import make, policy_names

LAYOUTS = policy_names("layout")
SMALL = {"seconds": 0.0, "pool_bytes": 2**22, "threads": [1], "dtypes": ["float32"]}


def test_the_grid_covers_what_it_names():
    expected = {(n, t) for n in (1, 4, 16, 64) for t in (128, 1024, 8192)}
    assert set(kernel_grid.POINTS) == expected
    assert all(tokens % size == 0 for _, tokens in kernel_grid.POINTS for size in kernel_grid.BLOCK_SIZES)


def test_every_contender_says_the_same():
    """A block as long as the context makes the paged memory equal to the contiguous one."""
    rng = torch.Generator().manual_seed(1)
    forms = kernel_grid.contenders(
        3, 32, layouts=LAYOUTS, block_sizes=[32], blocks=["adjacent"], dtype=torch.float32, rng=rng
    )
    k, v = torch.randn(2, 3, kernel.NUM_KV_HEADS, 32, kernel.HEAD_SIZE, generator=rng)
    outputs = {key: form(k, v) for key, form in forms.items() if key[0] != "copy"}
    assert {layout for name, layout, _, _ in outputs if name == "cpu-paged"} == set(LAYOUTS)
    expected = outputs["sdpa expand", "contiguous", None, None].reshape(3, -1)
    for key, found in outputs.items():
        assert torch.allclose(found.reshape(3, -1), expected, atol=1e-5), key
    assert torch.equal(forms["copy", "contiguous", None, None](k, v), k)


@pytest.fixture(scope="module")
def rows():
    return kernel_grid.measure(
        points=[(1, 64), (2, 32)], block_sizes=[8, 32], blocks=kernel_grid.BLOCKS, **SMALL
    )


def test_rows(rows):
    for point, here in itertools.groupby(rows, key=lambda row: (row["num_seqs"], row["context_len"])):
        here = list(here)
        assert point in [(1, 64), (2, 32)]
        paged = {(r["layout"], r["block_size"], r["blocks"]) for r in here if r["kernel"] == "cpu-paged"}
        assert paged == set(itertools.product(LAYOUTS, [8, 32], kernel_grid.BLOCKS))
        copy = next(row for row in here if row["kernel"] == "copy")
        dense = [row for row in here if row["kernel"].startswith("sdpa")]
        assert {row["kernel"] for row in dense} >= {"sdpa enable_gqa", "sdpa regrouped", "sdpa expand"}
        best = max(dense, key=lambda row: row["gb_per_s"])
        assert (copy["ratio_copy"], best["ratio_dense"]) == (1, 1)
        for row in here:
            assert min(row["ratio_dense"], row["ratio_copy"]) > 0
            assert row["gb_per_s_best"] >= row["gb_per_s"] > 0
            assert row["calls"] >= 3
            assert row["kernel"] != "cpu-paged" or row["gb_per_s_warm"] > 0


def test_ratios_are_of_calls_in_the_same_round():
    """The machine is twice as slow in each round as in the one before; ratios do not see it."""
    cold = {
        ("sdpa enable_gqa", "contiguous", None, None): [1.0, 2.0, 4.0],
        ("sdpa regrouped", "contiguous", None, None): [3.0, 6.0, 12.0],
        ("copy", "contiguous", None, None): [0.25, 0.5, 1.0],
        ("cpu-paged", "csr", 16, "random"): [2.0, 4.0, 8.0],
    }
    warm = {key: [seconds / 2 for seconds in times[:2]] for key, times in cold.items()}
    warm["sdpa regrouped", "contiguous", None, None] = []
    rows = {row["kernel"]: row for row in kernel_grid._rows(cold, warm, 8 * 10**9)}
    assert [row["ratio_dense"] for row in rows.values()] == pytest.approx([1, 1 / 3, 4, 0.5])
    assert [row["ratio_copy"] for row in rows.values()] == pytest.approx([0.25, 1 / 12, 1, 0.125])
    assert [row["ratio_dense_warm"] for row in rows.values()] == [1, None, 4, 0.5]
    paged = rows["cpu-paged"]
    assert (paged["gb_per_s"], paged["gb_per_s_best"], paged["gb_per_s_warm"]) == pytest.approx(
        (2, 4, 8 / 1.5)
    )


def test_what_cannot_be_warm_has_no_warm_figures():
    (row, *_) = kernel_grid.measure(
        points=[(1, 32)], layouts=["csr"], block_sizes=[16], warm_bytes=1000, **SMALL
    )
    assert row["gb_per_s_warm"] is row["ratio_dense_warm"] is None


def test_a_file_keeps_what_is_measured(tmp_path, monkeypatch):
    keep = tmp_path / "rows.jsonl"
    asked = {"layouts": ["padded"], "block_sizes": [16], "keep": keep, **SMALL}
    first = kernel_grid.measure(points=[(1, 32)], **asked)
    both = kernel_grid.measure(points=[(2, 32), (1, 32)], **asked)
    assert [row for row in both if row["num_seqs"] == 1] == json.loads(json.dumps(first))
    assert len(both) == 2 * len(first)

    def measured_again(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(kernel_grid, "_timed", measured_again)
    assert kernel_grid.measure(points=[(2, 32), (1, 32)], **asked) == both
    with pytest.raises(AssertionError, match="measured again"):
        kernel_grid.measure(points=[(1, 32)], **asked | {"block_sizes": [8]})
    with keep.open("a") as file:
        file.write('{"point": {"num_')
    with pytest.raises(ConfigError, match=r"rows.jsonl:3 holds no measured point"):
        kernel_grid.measure(points=[(1, 32)], **asked)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"block_sizes": [24]}, "block size 24 does not divide a context of 64"),
        ({"block_sizes": [0]}, "block size 0"),
        ({"blocks": ["sorted"]}, "random or adjacent, not 'sorted'"),
        ({"dtypes": ["float8"]}, "no dtype 'float8' for the cache; known: float32, bfloat16"),
        ({"layouts": ["paded"]}, "padded"),
    ],
)
def test_what_cannot_be_measured_is_named(asked, why):
    with pytest.raises(ConfigError, match=why):
        kernel_grid.measure(points=[(1, 64)], **SMALL | {"block_sizes": [16]} | asked)


def test_the_command_measures_the_points_that_are_asked_for(monkeypatch):
    seen = {}
    monkeypatch.setattr(kernel_grid, "measure", lambda **asked: seen.update(asked) or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("POINTS", "SECONDS", "KEEP"):
        monkeypatch.delenv(f"PAGEDLAB_BENCH_{name}", raising=False)
    assert kernel.main() == []
    assert (seen["points"], seen["seconds"], seen["keep"]) == (kernel_grid.POINTS, 6, None)
    monkeypatch.setenv("PAGEDLAB_BENCH_POINTS", "16x1024,1x128")
    monkeypatch.setenv("PAGEDLAB_BENCH_SECONDS", "0.5")
    kernel.main()
    assert (seen["points"], seen["seconds"]) == (((16, 1024), (1, 128)), 0.5)
    monkeypatch.setenv("PAGEDLAB_BENCH_POINTS", "16*1024")
    with pytest.raises(ConfigError, match="must look like 16x1024"):
        kernel.main()
    monkeypatch.setenv("PAGEDLAB_BENCH_SECONDS", "-1")
    with pytest.raises(ConfigError, match="a number of seconds, not '-1'"):
        kernel.asked_seconds()


@pytest.mark.parametrize("order", layouts.ORDERS)
@pytest.mark.parametrize("lengths", layouts.LENGTHS)
def test_tables_are_what_the_layouts_then_hold(order, lengths):
    tables = layouts.make_tables(5, 6, blocks=order, lengths=lengths)
    blocks = [block for table in tables for block in table]
    assert sorted(blocks) == list(range(len(blocks)))
    assert (sorted(blocks) == blocks) == (order == "adjacent")
    assert [len(table) > len(tables[-1]) for table in tables] == [lengths == "one long"] + [False] * 4
    for name in LAYOUTS:
        layout = make("layout", name)
        times = layouts.timed(layout, tables)
        assert [layout.decode(row) for row in range(5)] == tables
        assert {kind: len(seconds) for kind, seconds in times.items()} == {
            "build": 1, "append": layouts.APPENDS, "arrays": layouts.APPENDS,
        }  # fmt: skip


def test_layout_rows():
    rows = layouts.measure(num_seqs=4, blocks_per_seq=[16], repeats=1)
    assert {(r["layout"], r["blocks"], r["lengths"]) for r in rows} == set(
        itertools.product(LAYOUTS, layouts.ORDERS, layouts.LENGTHS)
    )
    by = {(r["layout"], r["blocks"], r["lengths"]): r for r in rows}
    for row in rows:
        assert min(row["build_us"], row["append_us"], row["arrays_us"]) > 0
    # In one piece a table is a pair; one long table makes every row of a matrix wide.
    assert by["extents", "adjacent", "equal"]["bytes_read"] < by["padded", "adjacent", "equal"]["bytes_read"]
    assert (
        by["padded", "random", "one long"]["bytes_per_block"]
        > 2 * by["padded", "random", "equal"]["bytes_per_block"]
    )
    with pytest.raises(ConfigError, match="random or adjacent"):
        layouts.measure(orders=["sorted"])
    with pytest.raises(ConfigError, match="'equal' or 'one long'"):
        layouts.measure(lengths=["mixed"])


def test_figures(rows):
    figure = figures.of_kernel(rows)
    assert [ax.get_title() for ax in figure.axes] == ["1 × 64 tokens", "2 × 32 tokens"]
    for ax, point in zip(figure.axes, [(1, 64), (2, 32)]):
        lines = {line.get_label(): dict(zip(*line.get_data())) for line in ax.lines}
        for name in LAYOUTS:
            expected = {
                r["block_size"]: 1 / r["ratio_dense"]
                for r in rows
                if (r["num_seqs"], r["context_len"]) == point
                and (r["kernel"], r["layout"], r["blocks"]) == ("cpu-paged", name, "random")
            }
            assert lines[name] == pytest.approx(expected)
    assert figure.png().startswith(b"\x89PNG")

    kept = layouts.measure(num_seqs=2, blocks_per_seq=[8], repeats=1)
    bars = [[bar.get_height() for bar in ax.patches] for ax in figures.of_layouts(kept).axes]
    assert sorted(bars[0]) == pytest.approx(sorted(row["bytes_per_block"] for row in kept))
    assert sorted(bars[2]) == pytest.approx(sorted(row["append_us"] for row in kept))

    runs = {
        "a": {1: {"waste": 0.0, "latency_mean": 4.0, "mean_batch_size": 9},
              16: {"waste": 0.25, "latency_mean": 2.0, "mean_batch_size": 8}},
    }  # fmt: skip
    waste, latency, batch = figures.of_block_sizes(runs, best={"a": (1, 16)}).axes
    assert list(waste.lines[0].get_ydata()) == [0, 25]
    assert list(latency.lines[0].get_ydata()) == [2, 1]
    assert list(batch.lines[0].get_ydata()) == [9, 8]
    assert len(latency.patches) == 1
    assert not waste.patches
