"""The benchmarks of kernels and layouts: every point and contender is there, ratios are what they say, files resume."""

from __future__ import annotations

import itertools
import json
from shutil import which

import pytest
import torch

from pagedlab.bench import (
    engine,
    figures,
    kernel,
    kernel_grid,
    kernel_peers,
    kernel_prefill,
    kernel_threads,
    layouts,
)
from pagedlab.errors import ConfigError
from pagedlab.executors.shapes import SHAPES
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
    rows = {row["kernel"]: row for row in kernel_grid._rows(cold, warm, 8 * 10**9, 4)}
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
    monkeypatch.setattr(kernel_prefill, "measure", lambda **asked: [])
    monkeypatch.setattr(kernel_threads, "measure", lambda **asked: [])
    monkeypatch.setattr(kernel_grid, "measure", lambda **asked: seen.update(asked) or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("POINTS", "SECONDS", "KEEP", "THREADS"):
        monkeypatch.delenv(f"PAGEDLAB_BENCH_{name}", raising=False)
    assert kernel.main() == []
    assert (seen["points"], seen["seconds"], seen["keep"]) == (kernel_grid.POINTS, 4, None)
    assert seen["threads"][0] == 1
    assert seen["peers"]
    monkeypatch.setenv("PAGEDLAB_BENCH_POINTS", "16x1024,1x128")
    monkeypatch.setenv("PAGEDLAB_BENCH_SECONDS", "0.5")
    kernel.main()
    assert (seen["points"], seen["seconds"]) == (((16, 1024), (1, 128)), 0.5)
    monkeypatch.setenv("PAGEDLAB_BENCH_THREADS", "1")
    kernel.main()
    assert seen["threads"] == (1,)
    for threads in ("0", "two", "100000"):
        monkeypatch.setenv("PAGEDLAB_BENCH_THREADS", threads)
        with pytest.raises(ConfigError, match="must look like 1,2, up to"):
            kernel.main()
    monkeypatch.delenv("PAGEDLAB_BENCH_THREADS")
    monkeypatch.setenv("PAGEDLAB_BENCH_POINTS", "16*1024")
    with pytest.raises(ConfigError, match="must look like 16x1024"):
        kernel.main()
    monkeypatch.setenv("PAGEDLAB_BENCH_SECONDS", "-1")
    with pytest.raises(ConfigError, match="a number of seconds, not '-1'"):
        kernel.asked_seconds()
    monkeypatch.setenv("PAGEDLAB_BENCH_DEVICE", "tpu")
    with pytest.raises(ConfigError, match=r"PAGEDLAB_BENCH_DEVICE must be one of cpu.*not 'tpu'"):
        kernel.main()


@pytest.fixture(scope="module")
def everything():
    small = {"threads": [1], "dtypes": ["float32"], "layouts": ["csr"], "seconds": 0.0}
    rows = kernel_grid.measure(
        points=[(1, 32), (16, 1024)], block_sizes=[16], pool_bytes=2**22, peers=True, **small
    )
    rows += kernel_prefill.measure(points=[(2, 16, 48), (1, 32, 32)], **small)
    return rows + kernel_threads.measure(threads=[1], seconds=0.0)


def test_peers_have_rows_of_their_own(everything):
    for point in ((1, 32), (16, 1024)):
        here = [
            r for r in everything if r["phase"] == "decode" and (r["num_seqs"], r["context_len"]) == point
        ]
        by = {(r["kernel"], r["dtype"]): r for r in here}
        assert by["gather-sdpa", "float32"]["ratio_gather"] == 1
        assert by["cpu-paged", "float32"]["ratio_gather"] > 1
        assert by["gather-batch", "float32"]["ratio_gather_batch"] == 1
        assert by["cpu-paged", "int8"]["gb_per_s"] > 0
        assert by["cpu-paged", "fp8"]["gb_per_s"] > 0


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_one_byte_is_a_share_of_bandwidth_by_its_own_bytes(kv_dtype):
    cold = {
        ("sdpa enable_gqa", "contiguous", None, None): [4.0],
        ("copy", "contiguous", None, None): [1.0],
        ("gather-sdpa", "padded", 16, "random"): [20.0],
        (f"cpu-paged {kv_dtype}", "padded", 16, "random"): [2.0],
    }
    *_, row = kernel_grid._rows(cold, {key: [] for key in cold}, 8 * 10**9, 4)
    assert (row["kernel"], row["dtype"]) == ("cpu-paged", kv_dtype)
    assert (row["gb_per_s"], row["ratio_dense"], row["ratio_copy"], row["ratio_gather"]) == (1, 2, 0.125, 10)


def test_gather_reads_whole_contexts_and_one_byte_what_was_written():
    rng = torch.Generator().manual_seed(2)
    query = torch.randn(2, kernel.NUM_HEADS, kernel.HEAD_SIZE, generator=rng)
    one = kernel_peers.byte_form("fp8", query, make("layout", "csr"), 64, 16, rng, 0)
    k = torch.zeros(2, kernel.NUM_KV_HEADS, 64, kernel.HEAD_SIZE)
    assert one(k, k).isfinite().all()
    v = torch.randn(2, 64, kernel.NUM_KV_HEADS, kernel.HEAD_SIZE, generator=rng)
    gather = kernel_peers.gather_form(query, make("layout", "csr"), 64, 64, rng)
    out = gather(torch.zeros_like(v), v)
    batched = kernel_peers.gather_batch_form(query, make("layout", "csr"), 64, 16, rng)
    assert batched(torch.zeros_like(v), v).shape == (2, kernel.NUM_HEADS, 1, kernel.HEAD_SIZE)
    whole = v.mean(1).repeat_interleave(kernel.GROUP, dim=1)  # equal keys: every value counts the same
    assert torch.allclose(
        out.sort(0).values, whole.sort(0).values, atol=1e-5
    )  # blocks are dealt out at random


def test_what_cannot_be_compiled_has_a_note(monkeypatch):
    def refused(*arguments):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(kernel_grid, "flex_form", refused)
    rows = kernel_grid.measure(
        points=[(1, 32)], layouts=["csr"], block_sizes=[16], flex_points=[(1, 32)], **SMALL
    )
    assert [r["note"] for r in rows if r["kernel"] == "flex_attention"] == ["RuntimeError: no compiler"]


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="flex_attention is compiled by a C++ compiler")
def test_flex_attention_reads_its_pages():
    """Equal keys, and values that name their page: the mean of a sequence's pages comes back, each page once in all."""
    query = torch.zeros(2, kernel.NUM_HEADS, kernel.HEAD_SIZE)
    form = kernel_peers.flex_form(query, 64, 16, torch.Generator().manual_seed(0))
    keys = torch.zeros(2, kernel.NUM_KV_HEADS, 64, kernel.HEAD_SIZE)
    pages = (2.0 ** torch.arange(8)).repeat_interleave(16)
    values = pages[None, :, None].expand(kernel.NUM_KV_HEADS, -1, kernel.HEAD_SIZE).contiguous()
    out = form(keys, values.view(keys.shape))[:, 0, 0, 0] * 4
    assert out.sum() == 255
    assert [bin(int(total)).count("1") for total in out] == [4, 4]


def test_prefill_contenders_say_the_same():
    for num_seqs, query_len, context_len in ((2, 16, 48), (1, 32, 32)):
        rng = torch.Generator().manual_seed(1)
        forms = kernel_prefill.contenders(
            num_seqs, query_len, context_len, layouts=LAYOUTS, dtype=torch.float32, rng=rng
        )
        assert any("is_causal" in name for name, _ in forms) == (query_len == context_len)
        assert any("at once" in name for name, _ in forms) == (num_seqs > 1)
        outputs = {key: form() for key, form in forms.items()}
        expected = next(iter(outputs.values()))
        for key, found in outputs.items():
            assert torch.allclose(found, expected, atol=1e-5), key


def test_the_summary_and_the_picture(everything):
    (found,) = kernel.summary(everything)
    paged = [r for r in everything if r.get("kernel") == "cpu-paged" and r["dtype"] == "float32"]
    decode = [r["ratio_dense"] for r in paged if r["phase"] == "decode"]
    assert found["decode_dense_least"] == min(decode) <= found["decode_dense_median"]
    assert found["decode_16x1024_dense"] == decode[1]
    assert found["prefill_sdpa_least"] == min(r["ratio_sdpa"] for r in paged if r["phase"] == "prefill")
    assert found["threads_alone"] == everything[-1]["ratio_alone"] > 0
    ratios, speeds, chunks = kernel.draw(everything).axes
    assert [len(ax.get_xticklabels()) for ax in (ratios, speeds, chunks)] == [2, 2, 2]
    labels = {line.get_label() for line in speeds.lines}
    assert {"gather + SDPA", "fastest dense", "copy, read and written"} < labels


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


def test_the_engine_runs_with_every_layout(monkeypatch):
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    monkeypatch.setitem(SHAPES, engine.SHAPE, small)
    rows = layouts.measure_engine(layouts=["csr", "extents"], num_requests=2, repeats=2)
    assert [row["layout"] for row in rows] == ["padded", "csr", "extents"]
    assert rows[0]["ratio_default"] == 1
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert [row["layout"] for row in layouts.summary([{"layout": "csr", "build_us": 1.0}, *rows])] == [
        "padded", "csr", "extents",
    ]  # fmt: skip
    told = layouts.summary([rows[0] | {"ratio_default": ratio} for ratio in (0.9, 0.97, 1.2)])
    assert [row["slower"] for row in told] == [True, False, False]


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
