"""Summaries, inter-token latency, goodput, and the figures drawn from them."""

from __future__ import annotations

import time
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pagedlab as pl
from pagedlab.engine.clock import to_seconds
from pagedlab.engine.orders import DEVICE, HOST, Move
from pagedlab.errors import ConfigError
from pagedlab.executors.stub import StubExecutor
from pagedlab.lab import measures, panels, plots
from pagedlab.lab.job import Job
from pagedlab.lab.measures import MEMORY_KINDS
from pagedlab.lab.results import COLUMNS, Run
from pagedlab.policies.prefetch import FATES

QUANTILES = (50, 90, 95, 99)


def simulated(workload: Any = None, *, num_blocks: int = 56, rate: float = 1.0, **options: Any) -> Run:
    """A short run with little memory: sequences are preempted, and so tokens come in several runs of steps."""
    given = pl.workloads.chat(seed=0, conversations=10, rate=4.0) if workload is None else workload
    config = pl.Config(num_blocks=num_blocks, max_num_seqs=12)
    return pl.simulate(config, given.scale_rate(rate), model="llama-3.1-8b", **options)


@pytest.fixture(scope="module")
def tight() -> Run:
    return simulated(events=False)


def plain(
    rows: list[tuple[str, int, float | None, float | None, str | None]], duration: float = 10.0
) -> dict[str, Any]:
    """Tables with just what goodput looks at: request, samples, ttft, tpot, how it ended."""
    names = ("request_id", "samples", "ttft", "tpot", "finish_reason")
    return {
        "requests": {name: [row[i] for row in rows] for i, name in enumerate(names)},
        "steps": {"start": [1.0], "duration": [duration]},
    }


# ---- summary -------------------------------------------------------------------------------------------------------


def test_spreads_are_those_of_the_request_table(tight: Run) -> None:
    summary, requests = tight.summary(), tight.requests
    for name in ("queue_time", "ttft", "tpot", "latency"):
        values = requests[name].dropna()
        assert summary[f"{name}_mean"] == pytest.approx(values.mean())
        for q in QUANTILES:
            assert summary[f"{name}_p{q}"] == pytest.approx(np.percentile(values, q))


def gaps_of(job: Job) -> list[float]:
    """Every time between a token and the next, from the sequences themselves."""
    return [
        to_seconds(b - a)
        for group in job.engine.groups.values()
        for seq in group.sequences
        if seq.finish_reason in ("stop", "length")
        for a, b in zip(seq.token_times, seq.token_times[1:])
    ]


@pytest.mark.parametrize("scheduler", ["iteration-level", "chunked-prefill"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("num_blocks", [28, 400])
def test_inter_token_times_are_those_of_the_sequences(scheduler: str, samples: int, num_blocks: int) -> None:
    config = pl.Config(num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=96, scheduler=scheduler)
    chat = pl.workloads.chat(seed=1, conversations=6, turns=3, rate=3.0, max_tokens=20)
    job = Job(config, chat, executor=StubExecutor(), clock="step", overrides={"n": samples})
    while job.engine.step():
        pass
    run = job.result(interrupted=False)
    if num_blocks == 28:
        assert run.summary()["preemptions"] > 0
        assert len(run.columns("spans")["seq"]) > len(run.requests)
    for (_, row), seq in zip(
        run.requests.iterrows(), [s for g in job.engine.groups.values() for s in g.sequences], strict=True
    ):
        times = seq.token_times
        assert row.request_id == seq.request_id
        assert row.ttft == to_seconds(times[0] - seq.group.arrival)
        assert row.tpot == to_seconds(times[-1] - times[0]) / (len(times) - 1)
    gaps = gaps_of(job)
    values, counts = measures.inter_token(run._columns)
    assert counts.sum() == len(gaps)
    assert np.allclose(np.sort(np.repeat(values, counts)), np.sort(gaps))
    summary = run.summary()
    assert summary["itl_mean"] == pytest.approx(np.mean(gaps))
    for q in QUANTILES:
        assert summary[f"itl_p{q}"] == pytest.approx(np.percentile(gaps, q))


def test_weighted_percentiles_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        values, counts = rng.normal(size=rng.integers(1, 9)), rng.integers(1, 6, size=9)
        counts = counts[: len(values)]
        expected = np.percentile(np.repeat(values, counts), QUANTILES)
        assert np.allclose(measures._percentiles(values, counts), expected)


def test_inter_token_time_shows_a_stall_that_the_mean_hides() -> None:
    columns = {
        "requests": {"seq": [0, 1], "finish_reason": ["length", None]},
        "steps": {"step": [1, 2, 3, 4, 5], "start": [0.0, 1.0, 2.0, 8.0, 9.0], "duration": [1.0] * 5},
        "spans": {"seq": [0, 0, 1], "first_step": [1, 4, 2], "steps": [2, 2, 3]},
    }
    values, counts = measures.inter_token(columns)
    assert sorted(np.repeat(values, counts)) == [1.0, 1.0, 7.0]


def test_one_token_each_has_no_time_between() -> None:
    summary = simulated(max_tokens=1).summary()
    assert summary["itl_p50"] is None
    assert summary["tpot_mean"] is None
    assert summary["ttft_p90"] > 0


def test_a_saved_run_says_the_same(tight: Run, tmp_path: Path) -> None:
    loaded = pl.load_run(tight.save(tmp_path / "run"))
    assert loaded.summary() == tight.summary()
    assert loaded.goodput(ttft=0.5, tpot=0.01) == tight.goodput(ttft=0.5, tpot=0.01)


def test_leaping_changes_no_measure() -> None:
    leapt, stepped = simulated(), simulated(skip_ahead=False)
    one, other = leapt.summary(), stepped.summary()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == (pytest.approx(other[name]) if isinstance(value, float) else other[name]), name
    assert leapt.goodput(ttft=0.2) == stepped.goodput(ttft=0.2)


def big_tables(num_steps: int, num_requests: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tables as a run of that size leaves them."""
    rng = np.random.default_rng(0)
    durations = rng.uniform(0.01, 0.1, num_steps)
    starts = np.cumsum(durations) - durations
    output = 330
    first = np.sort(rng.integers(1, num_steps - output, num_requests))
    times: list[float] = rng.uniform(0.1, 9.0, num_requests).tolist()
    shares = rng.dirichlet(np.ones(len(MEMORY_KINDS)), num_steps)
    steps = {
        "step": list(range(1, num_steps + 1)),
        "start": starts.tolist(),
        "duration": durations.tolist(),
        "running": rng.integers(1, 200, num_steps).tolist(),
        "waiting": rng.integers(0, 200, num_steps).tolist(),
        "preemptions": np.cumsum(rng.random(num_steps) < 0.01).tolist(),
        "recomputed_tokens": np.cumsum(rng.integers(0, 50, num_steps)),
        "prefill_tokens": rng.integers(0, 8192, num_steps),
        **{f"blocks_{link}": rng.integers(0, 9, num_steps) for link in measures.LINKS},
    }
    names = [f"request-{i}" for i in range(num_requests)]
    columns = {
        "steps": steps,
        "memory": {"step": steps["step"], "time": (starts + durations).tolist()}
        | {f"{kind}_share": shares[:, i].tolist() for i, kind in enumerate(MEMORY_KINDS)},
        "requests": {
            "request_id": names,
            "seq": list(range(num_requests)),
            "samples": [1] * num_requests,
            "output_tokens": [output] * num_requests,
            "finish_reason": ["length"] * num_requests,
            "sample": [0] * num_requests,
            "arrival": times,
            "prompt_tokens": [900] * num_requests,
            "hit_tokens": rng.integers(0, 900, num_requests).tolist(),
            **dict.fromkeys(("queue_time", "ttft", "tpot", "latency"), times),
        },
        "spans": {
            "seq": list(range(num_requests)),
            "first_step": first.tolist(),
            "steps": [output] * num_requests,
        },
    }
    totals = dict.fromkeys(
        ("hit_tokens", "recomputed_tokens", "preemptions", "swapped_out", "tier_faults"), 0
    )
    totals |= {f"prefetch_{fate}": 0 for fate in FATES}
    totals |= {f"blocks_{link}": 7 for link in measures.LINKS}
    totals["prompt_tokens"] = 1
    return columns, {"totals": totals, "used": dict.fromkeys(("kernel", "layout", "dtype"))}


def test_a_large_run_is_summed_up_and_drawn_quickly() -> None:
    """Four million tokens. What it may take is several times what it takes where nobody else is at work."""
    columns, facts = big_tables(130_000, 12_000)
    began = time.process_time()
    summary = measures.summarise(columns, facts)
    took = time.process_time() - began
    assert took < 1.0, f"{took:.2f} s"
    assert summary["output_tokens"] == 3_960_000
    assert 0.01 < summary["itl_p50"] < summary["itl_p99"] < 0.1
    run: Any = SimpleNamespace(arrays=columns.__getitem__, facts=facts, summary=lambda: summary)
    for kind in plots.FIGURES:
        began = time.process_time()
        picture = plots.of_run(run, kind).png()
        took = time.process_time() - began
        assert took < 3.0, f"{kind}: {took:.2f} s"
        assert picture.startswith(b"\x89PNG")
        drawn = [line for ax in plots.of_run(run, kind).axes for line in ax.lines]
        assert max((len(line.get_xdata()) for line in drawn), default=0) < 2000, (
            "too many points to tell apart"
        )


# ---- what was moved ------------------------------------------------------------------------------------------------


class Noting(StubExecutor):
    """Notes which way every block went."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: Counter[tuple[int, int]] = Counter()

    def move(self, moves: deque[Move]) -> None:
        self.ways.update((m.src_tier, m.dst_tier) for m in moves)
        super().move(moves)


def with_host_tier(**sizes: int) -> pl.Config:
    """Little memory, and every reason to move blocks: saved, swapped, prefetched, copied on write."""
    sizes = {"num_blocks": 40, "host_blocks": 200, "max_num_seqs": 12, **sizes}
    return pl.Config(lookup="radix", swap="host", preemption="swap", prefetch="queue-lookahead", **sizes)


CHAT = pl.workloads.chat(seed=0, conversations=10, rate=4.0)


def test_blocks_moved_are_those_that_the_executor_moved() -> None:
    executor = Noting()
    run = pl.run(with_host_tier(), CHAT, executor=executor, clock="step", n=2)
    s = run.summary()
    ways = {"to_host": (DEVICE, HOST), "to_device": (HOST, DEVICE), "copied": (DEVICE, DEVICE)}
    assert set(executor.ways) == set(ways.values()), "all three happen"
    for link, way in ways.items():
        assert s[f"blocks_{link}"] == executor.ways[way]
        assert run.steps[f"blocks_{link}"].sum() == executor.ways[way]
        assert s[f"bytes_{link}"] is None, "a stub's blocks weigh nothing that is known"
    assert (run.steps.moves == sum(run.steps[f"blocks_{link}"] for link in ways)).all()
    assert run.steps.recomputed_tokens.iloc[-1] == s["recomputed_tokens"]


def test_a_simulation_moves_what_the_run_moved_and_weighs_it_as_its_own_model() -> None:
    real = pl.run(with_host_tier(), CHAT, executor=StubExecutor(), clock="step", n=2)
    s = real.summary()
    for skip_ahead in (True, False):
        sim = pl.simulate(
            with_host_tier(),
            CHAT,
            model="llama-3.1-8b",
            outputs=real,
            clock="step",
            skip_ahead=skip_ahead,
            n=2,
        )
        said = sim.summary()
        assert {k: said[k] for k in said if k.startswith("blocks_")} == {
            k: s[k] for k in s if k.startswith("blocks_")
        }
        block = 16 * 32 * 2 * 8 * 128 * 2
        assert said["bytes_to_host"] == s["blocks_to_host"] * block > 0
        assert said["bytes_copied"] == s["blocks_copied"] * block > 0
        for link in measures.LINKS:
            assert sim.columns("steps")[f"blocks_{link}"] == real.columns("steps")[f"blocks_{link}"]


def test_bytes_of_a_real_model_are_those_of_its_tensors() -> None:
    config = with_host_tier(num_blocks=24, max_model_len=320)
    run = pl.run(config, pl.workloads.chat(seed=0, conversations=5, max_tokens=8), arrivals="now")
    s, used = run.summary(), run.facts["used"]
    assert used["kv_bytes_per_block"] == used["kv_bytes_per_token"] * 16
    assert s["blocks_to_host"] > 0
    assert s["blocks_to_device"] > 0
    for link in measures.LINKS:
        assert s[f"bytes_{link}"] == s[f"blocks_{link}"] * used["kv_bytes_per_block"]
    assert "to the host" in run._repr_html_()


def test_bytes_are_unknown_without_a_weight() -> None:
    assert measures.moved_bytes(3, {"used": {"kv_bytes_per_block": None}}) is None
    assert measures.moved_bytes(3, {"used": {}}) is None
    assert measures.moved_bytes(None, {"used": {"kv_bytes_per_block": 64}}) is None
    assert measures.moved_bytes(3, {"used": {"kv_bytes_per_block": 64}}) == 192


# ---- over time -----------------------------------------------------------------------------------------------------


def test_output_tokens_by_step_add_up(tight: Run) -> None:
    made = measures.tokens_per_step({t: tight.arrays(t) for t in ("steps", "spans")})
    assert len(made) == len(tight.steps)
    assert made.sum() == tight.summary()["output_tokens"]
    assert (made <= tight.steps.running).all()
    assert (made >= tight.steps.decode_tokens).all()


@pytest.mark.parametrize("samples", [1, 3])
def test_the_hit_ratio_over_time_ends_at_the_run_s(samples: int) -> None:
    run = simulated(n=samples)
    at, ratio = measures.hit_ratios({"requests": run.arrays("requests")})
    assert len(at) == len(set(run.requests.request_id))
    assert (np.diff(at) >= 0).all()
    assert ratio[-1] == pytest.approx(run.summary()["hit_ratio"])
    assert ratio[0] == 0


def test_an_array_and_a_list_of_every_column(tight: Run) -> None:
    for table in ("steps", "memory", "spans"):
        arrays, lists = tight.arrays(table), tight.columns(table)
        assert list(arrays) == list(lists) == list(COLUMNS[table])
        for name, column in arrays.items():
            assert isinstance(column, np.ndarray)
            assert isinstance(lists[name], list)
            assert type(lists[name][0]) in (int, float)
            assert column.tolist() == lists[name]


# ---- goodput -------------------------------------------------------------------------------------------------------


def test_goodput_counts_who_was_in_time() -> None:
    columns = plain(
        [
            ("in time", 1, 1.0, 0.1, "length"),
            ("one token", 1, 0.5, None, "stop"),
            ("late", 1, 1.01, 0.1, "length"),
            ("slow", 1, 1.0, 0.11, "length"),
            ("refused", 1, None, None, "refused"),
            ("under way", 1, 0.1, 0.01, None),
            ("cancelled", 1, 0.1, 0.01, "cancelled"),
        ]
    )
    assert measures.goodput(columns, ttft=1.0, tpot=0.1) == (0.5, pytest.approx(0.2), 2, 4)
    assert measures.goodput(columns, ttft=1.0).met == 3
    assert measures.goodput(columns, tpot=0.1).met == 3
    assert measures.goodput(columns, ttft=np.float64(9)).share == 1.0


def test_every_sample_of_a_request_must_be_in_time() -> None:
    columns = plain(
        [
            ("both", 2, 0.5, 0.1, "length"),
            ("both", 2, 0.5, 0.1, "stop"),
            ("one", 2, 0.5, 0.1, "length"),
            ("one", 2, 0.5, 0.3, "length"),
            ("half done", 2, 0.5, 0.1, "length"),
            ("half done", 2, 0.5, 0.1, None),
        ]
    )
    assert measures.goodput(columns, tpot=0.2)[2:] == (1, 2)


def test_goodput_of_nothing() -> None:
    run = pl.run(pl.Config(), [], executor=StubExecutor())
    assert run.goodput(ttft=1.0) == (None, None, 0, 0)


@pytest.mark.parametrize(
    "bounds",
    [
        {},
        {"ttft": None},
        {"ttft": 0},
        {"tpot": -1.0},
        {"ttft": float("nan")},
        {"ttft": float("inf")},
        {"ttft": "1 s"},
        {"tpot": True},
        {"ttft": 1.0, "tpot": []},
    ],
)
def test_a_nonsensical_service_level_gets_one_line(bounds: dict[str, Any], tight: Run) -> None:
    for ask in (tight.goodput, lambda **given: plots.of_goodput({"a": [tight]}, **given)):
        with pytest.raises(ConfigError) as caught:
            ask(**bounds)
        assert "\n" not in str(caught.value)


def test_the_rate_is_that_of_the_arrivals(tight: Run) -> None:
    arrivals = tight.requests.arrival
    rate = measures.offered_rate({"requests": tight.columns("requests")})
    assert rate == pytest.approx((len(arrivals) - 1) / (arrivals.max() - arrivals.min()))
    assert measures.offered_rate({"requests": {"request_id": [], "arrival": []}}) is None
    assert measures.offered_rate({"requests": {"request_id": ["a", "a"], "arrival": [1.0, 1.0]}}) is None


# ---- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", plots.FIGURES)
def test_every_figure_of_a_run(what: str) -> None:
    run = pl.simulate(with_host_tier(), CHAT, model="llama-3.1-8b", events=False)
    figure = run.plot(what)
    assert figure.png().startswith(b"\x89PNG")
    for ax in figure.axes:
        assert ax.get_title()
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert any(len(line.get_xdata()) > 1 for line in ax.lines) or what in ("memory", "overview")


def test_what_figures_say(tight: Run) -> None:
    s = tight.summary()
    (ax,) = tight.plot("ttft").axes
    marks = [line for line in ax.lines if line.get_marker() != "None"]
    assert [line.get_ydata()[0] for line in marks] == list(QUANTILES)
    assert [line.get_xdata()[0] for line in marks] == [s[f"ttft_p{q}"] for q in QUANTILES]
    output, _ = tight.plot("throughput").axes
    (mean,) = (line for line in output.lines if line.get_linestyle() == "--")
    assert mean.get_ydata()[0] == pytest.approx(s["tokens_per_s"])
    hits, recomputed = tight.plot("hits").axes
    assert hits.lines[0].get_ydata()[-1] == pytest.approx(100 * s["hit_ratio"])
    assert recomputed.lines[0].get_ydata()[-1] == s["recomputed_tokens"] > 0
    (ax,) = tight.plot("preemptions").axes
    assert ax.lines[0].get_ydata()[-1] == s["preemptions"] > 0


def test_the_figure_of_moves_is_in_bytes_where_they_are_known() -> None:
    run = pl.simulate(with_host_tier(), CHAT, model="llama-3.1-8b", events=False)
    so_far, _ = run.plot("moved").axes
    assert so_far.get_ylabel() == "MB"
    ends = {line.get_label(): line.get_ydata()[-1] for line in so_far.lines}
    assert ends["device to host"] == pytest.approx(run.summary()["bytes_to_host"] / 1e6)
    stub = pl.run(with_host_tier(), CHAT, executor=StubExecutor(), clock="step")
    so_far, _ = stub.plot("moved").axes
    assert so_far.get_ylabel() == "blocks"
    assert so_far.lines[0].get_ydata()[-1] == stub.summary()["blocks_to_host"]


def test_nothing_is_done_while_nobody_is_there() -> None:
    requests = [pl.Request(request_id=str(t), prompt=[1, 2, t + 3], arrival=float(t)) for t in (0, 100)]
    run = pl.simulate(pl.Config(), requests, model="llama-3.1-8b", max_tokens=64)
    output, _ = run.plot("throughput").axes
    at, rate = (np.asarray(each) for each in output.lines[0].get_data())
    assert at[-1] > 100
    assert (rate[(at > 2) & (at < 98)] == 0).all()
    assert (rate[:-1] * np.diff(at)).sum() == pytest.approx(128)


@pytest.mark.parametrize("what", plots.FIGURES)
def test_figures_of_nothing(what: str) -> None:
    run = pl.run(pl.Config(), [], executor=StubExecutor())
    assert run.plot(what).png().startswith(b"\x89PNG")


def test_an_unknown_figure_is_told_all_that_there_are(tight: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        tight.plot("ttfd")
    assert "did you mean 'ttft'" in str(caught.value)
    assert all(name in str(caught.value) for name in plots.FIGURES)


def test_the_goodput_figure() -> None:
    rates = (4.0, 0.5)
    runs = {
        name: [simulated(num_blocks=n, rate=rate, events=False) for rate in rates]
        for name, n in {"small $x$": 56, "large": 560}.items()
    }
    figure = plots.of_goodput({name: iter(several) for name, several in runs.items()}, ttft=0.05, tpot=0.02)
    share, rate = figure.axes
    for ax in (share, rate):
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    lines = {line.get_label(): line for line in share.lines}
    assert list(lines) == [r"small \$x\$", "large"]
    xs = lines["large"].get_xdata()
    assert list(xs) == sorted(xs), "points are joined in the order of their rates"
    met = runs["large"][1].goodput(ttft=0.05, tpot=0.02)
    assert met.share is not None
    assert lines["large"].get_ydata()[0] == pytest.approx(100 * met.share)
    assert "0.05 s" in figure.get_suptitle()
    assert figure.png().startswith(b"\x89PNG")


def test_the_goodput_figure_needs_runs_with_a_rate(tight: Run) -> None:
    with pytest.raises(ConfigError, match="no run"):
        plots.of_goodput({"a": []}, ttft=1.0)
    at_once = pl.simulate(pl.Config(), [[1, 2], [3]], model="llama-3.1-8b")
    with pytest.raises(ConfigError, match="'b' has no request rate"):
        plots.of_goodput({"a": [tight], "b": [at_once]}, ttft=1.0)


def test_thinning_keeps_means_and_extremes() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, 50_000)
    values[20_000] = 1000
    edges = np.concatenate([[0.0], np.cumsum(rng.exponential(size=50_000))])
    at, (means,), (lows,), (highs,) = panels._thinned(edges.tolist(), [values.tolist()])
    assert len(at) == len(means) + 1 == len(lows) + 1 < 2000
    assert (at[0], at[-1]) == (edges[0], pytest.approx(edges[-1]))
    assert np.average(means, weights=np.diff(at)) == pytest.approx(np.average(values, weights=np.diff(edges)))
    assert highs.max() == 1000
    assert lows.min() == 0
    assert (lows <= means + 1e-9).all()
    assert (means <= highs + 1e-9).all()


def test_few_steps_are_drawn_as_they_are() -> None:
    at, (means,), _, _ = panels._thinned([0.0, 1.0, 3.0], [[5, 6]])
    assert at.tolist() == [0.0, 1.0, 3.0]
    assert means.tolist() == [5.0, 6.0]
