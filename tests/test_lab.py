"""`run`, `start`, `compare`, `Run` and its files."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import pagedlab as pl
from pagedlab.engine.orders import StepOrders, StepResult
from pagedlab.errors import ConfigError, PagedLabError, ResultsError
from pagedlab.executors.stub import StubExecutor
from pagedlab.lab import page, plots
from pagedlab.lab import saved as saved_module
from pagedlab.lab.measures import LINKS, MEMORY_KINDS

SMALL = {"num_blocks": 96, "block_size": 16}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Tests share their cores with each other, and `tiny` is too small to gain from more."""
    import torch

    torch.set_num_threads(1)


def stub_run(config: pl.Config | None = None, workload: Any = None, **options: Any) -> pl.Run:
    given = pl.workloads.chat(seed=0, conversations=6) if workload is None else workload
    options = {"executor": StubExecutor(), "clock": "step", "check": True, **options}
    return pl.run(config or pl.Config(**SMALL), given, **options)


# ---- the package ---------------------------------------------------------------------------------------------------


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, pagedlab; heavy = {'torch', 'transformers', 'numba', 'pandas', 'matplotlib', 'numpy', 'IPython'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in pl.__all__:
        assert getattr(pl, name) is not None
    assert set(pl.__all__) <= set(dir(pl))
    with pytest.raises(AttributeError):
        _ = pl.nothing_of_the_kind


# ---- run -----------------------------------------------------------------------------------------------------------


def test_tables_agree_with_each_other() -> None:
    run = stub_run()
    s = run.summary()
    assert s["finished"] == s["sequences"] == len(run.requests) == 24
    assert run.requests.output_tokens.sum() == s["output_tokens"]
    assert run.steps.decode_tokens.sum() + run.steps.prefill_tokens.sum() >= s["output_tokens"]
    assert (run.requests.ttft <= run.requests.latency).all()
    assert (run.requests.queue_time <= run.requests.ttft).all()
    shares = run.memory[[f"{k}_share" for k in MEMORY_KINDS]].sum(axis=1)
    assert np.allclose(shares, 1.0)
    assert (run.memory[list(MEMORY_KINDS)].sum(axis=1) == 96 * 16).all()
    assert s["hit_ratio"] == pytest.approx(run.requests.hit_tokens.sum() / run.requests.prompt_tokens.sum())
    assert set(run.events.kind) >= {"RequestArrived", "BlockStored", "RequestFinished"}


def test_outputs_follow_the_order_given() -> None:
    ids = [[5] * 40, [6] * 3, [7] * 20]
    stub = StubExecutor()
    assert pl.run(pl.Config(), ids, max_tokens=6, executor=stub).tokens == [stub.reference(p, 6) for p in ids]


def test_parallel_samples_are_grouped() -> None:
    stub = StubExecutor()
    run = pl.run(pl.Config(), [[1, 2, 3], [4, 5]], max_tokens=5, n=3, executor=stub)
    assert run.tokens == [[stub.reference(p, 5, i) for i in range(3)] for p in ([1, 2, 3], [4, 5])]
    assert list(run.requests["sample"]) == [0, 1, 2, 0, 1, 2]


def test_sampling_is_overridden_field_by_field() -> None:
    workload = pl.workloads.mixed_lengths(num_requests=3)
    assert {len(t) for t in stub_run(workload=workload, max_tokens=7).tokens} == {7}
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        stub_run(temprature=1.0)


def test_a_refused_request_is_named_and_the_others_go_on() -> None:
    requests = [
        pl.Request(request_id="long", prompt=[1] * 9000),
        pl.Request(request_id="fine", prompt=[1, 2]),
    ]
    run = stub_run(workload=requests)
    assert list(run.requests.finish_reason) == ["refused", "length"]
    assert "9000" in run.errors["long"]
    assert run.outputs[0] is None
    assert len(run.outputs[1]) == 64
    assert run.summary()["refused"] == 1


def test_arrivals_now() -> None:
    assert (stub_run(arrivals="now").requests.arrival == 0).all()
    with pytest.raises(ConfigError):
        stub_run(arrivals="later")


@pytest.mark.parametrize(
    ("config", "workload", "options"),
    [
        ("vllm", ["a"], {}),
        (pl.Config(), "one text", {}),
        (pl.Config(), ["a"], {"clock": "wal"}),
        (pl.Config(), ["a"], {"max_tokens": 0}),
        (pl.Config(), [], {"max_tokens": 0}),
    ],
)
def test_bad_input_gets_one_line(config: Any, workload: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PagedLabError) as caught:
        pl.run(config, workload, executor=StubExecutor(), **options)
    assert "\n" not in str(caught.value)


def test_no_requests_at_all() -> None:
    run = pl.run(pl.Config(), [], executor=StubExecutor())
    assert run.outputs == []
    assert run.summary()["tokens_per_s"] is None
    assert run.plot().png().startswith(b"\x89PNG")


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_there() -> None:
    before = signal.getsignal(signal.SIGINT)

    def press(engine: Any) -> None:
        if len(engine.steps) == 20:
            os.kill(os.getpid(), signal.SIGINT)

    run = stub_run(progress=press)
    assert run.interrupted
    assert 20 <= len(run.steps) <= 21
    assert run.summary()["unfinished"] > 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_heard_while_waiting_for_an_arrival() -> None:
    requests = [pl.Request(request_id="tomorrow", prompt=[1], arrival=86_400.0)]
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.perf_counter()
    run = pl.run(pl.Config(), requests, executor=StubExecutor())
    assert run.interrupted
    assert time.perf_counter() - began < 10


def test_a_second_ctrl_c_raises() -> None:
    class Stuck(StubExecutor):
        def execute(self, orders: StepOrders) -> StepResult:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            return super().execute(orders)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stub_run(executor=Stuck())
    assert signal.getsignal(signal.SIGINT) is before


def test_runs_outside_the_main_thread() -> None:
    done: list[pl.Run] = []
    thread = threading.Thread(target=lambda: done.append(stub_run()))
    thread.start()
    thread.join()
    assert done[0].summary()["finished"] == 24


# ---- start ---------------------------------------------------------------------------------------------------------


def live(**options: Any) -> pl.Live:
    options = {"executor": StubExecutor(), "clock": "step", "check": True, **options}
    return pl.start(pl.Config(**SMALL), pl.workloads.chat(seed=0, conversations=6), **options)


def test_live_says_what_run_says() -> None:
    async def go() -> pl.Run:
        return await live().wait()

    assert asyncio.run(go()).tokens == stub_run().tokens


def test_live_can_be_stopped_and_leaves_a_run() -> None:
    async def go() -> tuple[pl.Run, pl.Live]:
        running = live()
        running.on_step(lambda seen: seen.stop() if len(seen.engine.steps) == 9 else None)
        return await running.wait(), running

    run, running = asyncio.run(go())
    assert run.interrupted
    assert len(run.steps) == 9
    assert running.done


def test_live_waits_while_paused_and_its_clock_stands_still() -> None:
    async def go() -> tuple[int, pl.Run]:
        running = live(clock="wall", arrivals="now")
        running.on_step(lambda seen: seen.pause() if len(seen.engine.steps) == 3 else None)
        await asyncio.sleep(0.5)
        held = len(running.engine.steps)
        running.resume()
        return held, await running.wait()

    held, run = asyncio.run(go())
    assert held == 3
    assert run.summary()["finished"] == 24
    assert run.steps.start.diff().max() < 0.4


def test_live_snapshot_tells_what_the_pool_tells() -> None:
    seen: list[bool] = []

    def look(running: pl.Live) -> None:
        codes, legend = running.snapshot()
        pool = running.engine.cache.device
        assert codes.dtype == np.uint8
        assert len(codes) == len(pool.blocks)
        assert set(codes.tolist()) <= set(legend)
        seen.append(
            (codes == 0).sum() == pool.num_free
            and (codes == 1).sum() == pool.num_cached
            and (codes == 2).sum() == sum(b.ref_count > 1 for b in pool.blocks)
        )

    async def go() -> None:
        running = live()
        running.on_step(look)
        await running.wait()

    asyncio.run(go())
    assert seen
    assert all(seen)


def test_live_hands_a_fault_to_who_waits() -> None:
    class Broken(StubExecutor):
        def execute(self, orders: StepOrders) -> StepResult:
            raise RuntimeError("the model fell over")

    async def go() -> None:
        running = live(executor=Broken())
        with pytest.raises(RuntimeError, match="fell over"):
            await running.wait()
        assert running.done
        assert isinstance(running.error, RuntimeError)

    asyncio.run(go())


def test_live_needs_a_loop() -> None:
    with pytest.raises(PagedLabError, match=r"pl\.run"):
        live()


# ---- figures and comparison ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["overview", "memory", "batch", "latency"])
def test_figures_show_by_themselves(what: str) -> None:
    figure = stub_run().plot(what)
    assert figure._repr_png_().startswith(b"\x89PNG")
    for ax in figure.axes:
        assert ax.get_xlabel()
        assert ax.get_ylabel()


def test_an_unknown_figure_answers_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'memory'"):
        stub_run().plot("memry")


def test_comparison_shares_add_up_and_paging_wastes_least() -> None:
    names = ("vllm", "orca-max", "orca-oracle")
    configs = {n: pl.Config.preset(n, num_blocks=128, max_model_len=1024) for n in names}
    workload = pl.workloads.mixed_lengths(num_requests=24)
    comparison = pl.compare(configs, workload, executor=StubExecutor(), clock="step")
    frame = comparison.to_frame()
    assert list(frame.index) == list(names)
    assert np.allclose(frame[[f"{k}_share" for k in MEMORY_KINDS]].sum(axis=1), 1.0)
    assert frame.waste["vllm"] == frame.waste.min() < 0.06
    assert frame.mean_batch_size["vllm"] == frame.mean_batch_size.max()
    assert comparison.same_output
    assert comparison._repr_html_().count("<tr>") == 4
    assert comparison.plot().png().startswith(b"\x89PNG")


def test_a_comparison_has_every_measure_and_goodput_if_asked() -> None:
    base = pl.Config(
        num_blocks=40, swap="host", preemption="swap", host_blocks=200, prefetch="queue-lookahead"
    )
    chat = pl.workloads.chat(seed=0, conversations=10, rate=4.0)
    options: dict[str, Any] = {"how": "simulate", "model": "llama-3.1-8b"}
    comparison = pl.compare(
        {"host": base, "none": pl.Config(num_blocks=40)}, chat, slo={"ttft": 0.2, "tpot": 0.02}, **options
    )
    for row, run in zip(comparison.rows, comparison.runs.values()):
        s = run.summary()
        for time_of in ("queue_time", "ttft", "tpot", "itl", "latency"):
            for mark in ("mean", "p50", "p90", "p95", "p99"):
                assert row[f"{time_of}_{mark}"] == s[f"{time_of}_{mark}"] is not None
        for name in ("bytes_to_host", "bytes_to_device", "bytes_copied", "prefetch_done", "prefetch_useful"):
            assert row[name] == s[name]
        met = run.goodput(ttft=0.2, tpot=0.02)
        assert (row["goodput_per_s"], row["goodput_share"]) == (met.per_s, met.share)
    assert comparison.rows[0]["bytes_to_host"] > 0
    headings, (host, none) = comparison.table()
    said = dict(zip(headings, zip(host, none)))
    assert said["moved to host"] == (page.size(comparison.rows[0]["bytes_to_host"]), "0")
    assert "goodput/s" in said
    assert "goodput_per_s" not in pl.Comparison(comparison.runs).rows[0]


def test_a_table_leaves_out_what_is_nothing_everywhere() -> None:
    both = {"one": stub_run(), "two": stub_run(pl.Config(num_blocks=400))}
    headings, rows = pl.Comparison(both).table()
    assert both["one"].summary()["blocks_to_host"] == 0
    assert not {"moved to host", "prefetched", "refused", "external"} & set(headings)
    assert {"configuration", "requests", "tokens/s", "prefix hits", "TTFT p90"} <= set(headings)
    assert all(len(row) == len(headings) for row in rows)
    one = pl.Comparison({"a": stub_run(pl.Config(num_blocks=24)), **both}, slo={"ttft": 1e-9})
    headings, rows = one.table()
    assert "preemptions" in headings, "one of them has some"
    assert rows[0][headings.index("in time")] == "0.0%", (
        "goodput that was asked for is told, even if there is none"
    )


@pytest.mark.parametrize(
    ("slo", "said"),
    [
        ({"tftt": 1.0}, "did you mean 'ttft'"),
        ({}, "goodput needs"),
        ({"ttft": 0.0}, "above 0"),
        ("ttft", "map"),
    ],
)
def test_a_bad_service_level_is_refused_before_the_work(slo: Any, said: str) -> None:
    class Untouched(StubExecutor):
        def execute(self, orders: StepOrders) -> StepResult:
            raise AssertionError("nothing was to be served")

    with pytest.raises(ConfigError, match=said):
        pl.compare({"a": pl.Config()}, [[1]], executor=Untouched(), slo=slo)


def test_comparison_notices_other_words() -> None:
    one, other = stub_run(), stub_run(executor=StubExecutor(seed=1))
    assert not pl.Comparison({"one": one, "other": other}).same_output


def test_compare_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError):
        pl.compare({}, ["a"])
    with pytest.raises(ConfigError):
        pl.compare({"a": pl.Config()}, ["a"], how="guess")


def test_expand_reaches_parameters_of_policies() -> None:
    grid = pl.expand(pl.Config(swap="host"), {"swap.min_hits": [0, 2], "eviction": ["lru", "lfu"]})
    assert len(grid) == 4
    assert grid["swap.min_hits=2 eviction=lfu"].swap.min_hits == 2  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="did you mean 'eviction'"):
        pl.expand(pl.Config(), {"evction": ["lru"]})


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_saved_run_comes_back_whole(tmp_path: Path) -> None:
    run = stub_run()
    loaded = pl.load_run(run.save(tmp_path / "deep" / "run"))
    assert loaded.summary() == run.summary()
    assert loaded.tokens == run.tokens
    assert loaded.outputs == run.outputs
    assert loaded.config == run.config
    for table in ("requests", "steps", "events", "memory"):
        pd.testing.assert_frame_equal(getattr(loaded, table), getattr(run, table))
    assert loaded.plot().png().startswith(b"\x89PNG")
    run.save(tmp_path / "deep" / "run")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]


def test_an_empty_run_comes_back_too(tmp_path: Path) -> None:
    pl.run(pl.Config(), [], executor=StubExecutor()).save(tmp_path / "run")
    assert pl.load_run(tmp_path / "run").outputs == []


def test_saving_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ResultsError, match="left alone"):
        stub_run().save(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


class Explosive:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (99,))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return stub_run().save(tmp_path / "run")


def bad(folder: Path) -> str:
    with pytest.raises(ResultsError) as caught:
        pl.load_run(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["requests", "steps", "events", "memory", "outputs"])
def test_broken_tables_are_named(saved: Path, name: str) -> None:
    file = saved / f"{name}.parquet"
    whole = file.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], pickle.dumps(Explosive())):
        file.write_bytes(content)
        assert f"{name}.parquet" in bad(saved)
    file.unlink()
    assert f"{name}.parquet: missing" in bad(saved)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 99}',
        '{"format": 1}',
        '{"format": 1, "config": {}, "facts": {}}',
        "[" * 100_000,
    ],
)
def test_broken_json_is_named(saved: Path, content: str) -> None:
    (saved / "run.json").write_text(content)
    assert "run.json" in bad(saved)


def test_what_is_no_saved_run(tmp_path: Path) -> None:
    assert "no such folder" in bad(tmp_path / "nowhere")
    assert "run.json" in bad(tmp_path)
    (tmp_path / "run.pkl").write_bytes(pickle.dumps(Explosive()))
    assert "not a folder" in bad(tmp_path / "run.pkl")


def test_tables_of_another_shape(saved: Path) -> None:
    pd.DataFrame({"step": [1, 2]}).to_parquet(saved / "memory.parquet")
    assert "column 'time' is missing" in bad(saved)


def restated(folder: Path, **changes: Any) -> None:
    """Change what a saved run says of itself."""
    file = folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def aged(folder: Path, version: int) -> None:
    """Make a saved run one that an older version wrote: without what came after its format."""
    late = saved_module._later_than(version)
    for table in set(late) - {"totals"}:
        file = folder / f"{table}.parquet"
        pd.read_parquet(file).drop(columns=list(late[table])).to_parquet(file)
    stated = json.loads((folder / "run.json").read_text())
    facts = stated["facts"]
    for name in late["totals"]:
        del facts["totals"][name]
    facts["used"].pop("kv_bytes_per_block")
    restated(folder, format=version, facts=facts)


def test_a_run_of_an_older_format_lacks_only_what_it_never_knew(tmp_path: Path) -> None:
    run = stub_run(pl.Config(swap="host", preemption="swap", host_blocks=64, num_blocks=24))
    assert run.summary()["blocks_to_host"] > 0
    run.save(tmp_path / "run")
    aged(tmp_path / "run", 1)
    old = pl.load_run(tmp_path / "run")
    late = saved_module._later_than(1)
    assert set(late["steps"]) == {*(f"blocks_{link}" for link in LINKS), "recomputed_tokens"}
    for name in late["steps"]:
        assert old.columns("steps")[name] == [None] * len(run.steps)
    summary = run.summary() | dict.fromkeys(late["totals"])
    assert old.summary() == summary
    pd.testing.assert_frame_equal(old.steps[list(run.steps)].drop(columns=list(late["steps"])),
                                  run.steps.drop(columns=list(late["steps"])))  # fmt: skip
    for what in plots.FIGURES:
        assert old.plot(what).png().startswith(b"\x89PNG")
    assert "not recorded" in old.plot("moved").axes[0].texts[0].get_text()
    frame = pl.Comparison({"old": old, "new": run}).to_frame()
    assert frame.blocks_to_host["new"] > 0
    assert pd.isna(frame.blocks_to_host["old"])
    assert pl.Comparison({"old": old, "new": run})._repr_html_()
    again = pl.load_run(old.save(tmp_path / "again"))
    assert again.summary() == summary, "it can be saved again, and still does not know"


def test_what_is_missing_from_a_run_of_this_format_is_an_error(saved: Path) -> None:
    file = saved / "steps.parquet"
    pd.read_parquet(file).drop(columns=["blocks_copied"]).to_parquet(file)
    assert "column 'blocks_copied' is missing" in bad(saved)


def test_a_total_that_is_missing_from_a_run_of_this_format_is_an_error(saved: Path) -> None:
    facts = json.loads((saved / "run.json").read_text())["facts"]
    del facts["totals"]["blocks_copied"]
    restated(saved, facts=facts)
    assert "'facts.totals.blocks_copied'" in bad(saved)


def test_a_run_of_a_newer_format_is_refused_by_name(saved: Path) -> None:
    restated(saved, format=saved_module.FORMAT + 1)
    said = bad(saved)
    assert f"format {saved_module.FORMAT + 1}" in said
    assert "newer" in said
    for version in (0, -1, True, None, "2", 1.0):
        restated(saved, format=version)
        assert f"reads formats 1 to {saved_module.FORMAT}" in bad(saved)


def test_a_run_of_an_unknown_policy_can_be_read_but_not_repeated(saved: Path) -> None:
    file = saved / "run.json"
    stated = json.loads(file.read_text())
    stated["config"]["eviction"]["name"] = "os:system"
    file.write_text(json.dumps(stated))
    run = pl.load_run(saved)
    assert run.summary()["finished"] == 24
    with pytest.raises(ConfigError, match="os:system"):
        _ = run.config


# ---- a real model --------------------------------------------------------------------------------------------------


def test_tiny_says_the_same_under_every_policy() -> None:
    base = pl.Config(num_blocks=64)
    grid = pl.expand(base, {"lookup": ["none", "radix"], "preemption": ["recompute", "swap"]})
    workload = pl.workloads.chat(seed=2, conversations=3, turns=3, max_tokens=12)
    comparison = pl.compare(grid, workload, arrivals="now")
    assert comparison.same_output
    row = comparison.rows[0]
    assert row["kernel"] not in (None, "auto")
    assert row["finished"] == 9
    assert all(isinstance(text, str) for text in comparison.runs["lookup=none preemption=swap"].outputs)


def test_a_model_stays_loaded_between_runs() -> None:
    pl.run(pl.Config(), ["def "], max_tokens=2)
    began = time.perf_counter()
    run = pl.run(pl.Config(layout="csr"), ["def "], max_tokens=2)
    assert run.summary()["layout"] == "csr"
    assert time.perf_counter() - began < 30


def test_two_holders_of_one_model_do_not_meet() -> None:
    async def go() -> tuple[list[Any], list[Any]]:
        running = pl.start(pl.Config(), ["import os\n"], max_tokens=12)
        await asyncio.sleep(0)
        between = pl.run(pl.Config(), ["import os\n"], max_tokens=12)
        return (await running.wait()).tokens, between.tokens

    one, other = asyncio.run(go())
    assert one == other


def test_token_ids_outside_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match="vocabulary of 2048"):
        pl.run(pl.Config(), [[1, 99_999]])
