"""vLLM runs that the shared ones are not: short of room, on several ranks, with the newer logs. Their logs are written
here, by a simulation whose steps are noisy and go up in stairs.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pagedlab import cli
from pagedlab.config import Config
from pagedlab.costs import Calibrated, StepWork
from pagedlab.costs.vllm_log import VllmRun
from pagedlab.engine.clock import VirtualClock, to_seconds
from pagedlab.engine.engine import Engine
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.engine.script import Script
from pagedlab.errors import WorkloadError
from pagedlab.events import EventLog
from pagedlab.executors.simulated import SimulatedExecutor
from pagedlab.lab.vllm_pool import likely_pool, observed_pool
from pagedlab.lab.vllm_ranks import Ranks
from pagedlab.lab.vllm_run import Simulator, reproduce
from pagedlab.workloads import Workload

PRIOR = Calibrated.prior("llama-3.1-8b", "rtx-4090")
TRUTH = PRIOR.clone(
    c0=PRIOR.c0 * 1.4, w=PRIOR.w * 1.1, c1=PRIOR.c1 * 1.3, c3=PRIOR.c3 * 1.25, c6=PRIOR.c6 * 0.6
)
STARTED = 1_777_142_838.0


class Card(Calibrated):
    """Steps as a card might take them."""

    def step_ps(self, work: StepWork) -> int:
        noise = self.__dict__.setdefault("noise", random.Random(0))
        stairs = replace(work, decode_seqs=-(-work.decode_seqs // 8) * 8)
        return round(super().step_ps(stairs) * (1 + 0.03 * noise.gauss(0, 1)))

    def linear(self, work: StepWork) -> tuple[int, int] | None:
        return None


def workload(n: int, seed: int = 0) -> Workload:
    """``n`` requests of some hundred tokens, ten a second."""
    draw = random.Random(seed)
    at, requests = 0.0, []
    for i in range(n):
        at += draw.expovariate(10.0)
        prompt = tuple(draw.randrange(1000) for _ in range(draw.randint(50, 1200)))
        sampling = SamplingParams(max_tokens=draw.randint(50, 500), ignore_eos=True)
        requests.append(Request(request_id=f"w-{i}", prompt=prompt, arrival=at, sampling=sampling))
    return Workload("drawn", tuple(requests), "For these tests.")


def logged(
    folder: Path, given: Workload, num_blocks: int | None, settings: dict[str, Any] | None = None, **meta: Any
) -> Ranks:
    """Write the log of a run of ``given`` on `Card`s with so many blocks each; return what served it."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {
        "max_num_seqs": 128,
        "max_num_batched_tokens": 2048,
        "tensor_parallel_size": 1,
        **(settings or {}),
    }
    facts = {"model": "meta-llama/Llama-3.1-8B", "vllm_version": "0.19.0", "engine_kwargs": said, **meta}
    (folder / "meta.json").write_text(json.dumps(facts))

    def write(times: dict[str, tuple[float, float, float]]) -> None:
        rows = []
        for i, r in enumerate(given):
            name = f"bench-{i}"
            scheduled, first, last = times.get(name, (r.arrival + 1, r.arrival + 2, r.arrival + 3))
            row = {
                "request_id": name,
                "input_toks": len(r.prompt),
                "output_toks": r.sampling.max_tokens,
                "arrival_time": STARTED + r.arrival,
                "queued_ts": 500 + r.arrival,
                "scheduled_ts": 500 + max(scheduled, r.arrival),
                "first_token_ts": 500 + first,
                "last_token_ts": 500 + last,
            }
            rows.append(json.dumps(row))
        (folder / "requests.jsonl").write_text("\n".join(rows) + "\n")

    write({})
    simulator = Simulator(VllmRun.load(folder), given, num_blocks=num_blocks)
    served = simulator.serve(Card.from_params(TRUTH.get_params()))
    times = {}
    for i in range(len(given)):
        seq = served.sequence(f"bench-{i}")
        assert seq.admitted_at is not None
        assert seq.first_token_at is not None
        assert seq.finished_at is not None
        first = given.requests[0].arrival  # the run's clock begins with the first arrival
        times[f"bench-{i}"] = tuple(
            to_seconds(t) + first for t in (seq.admitted_at, seq.first_token_at, seq.finished_at)
        )
    write(times)  # type: ignore[arg-type]
    return served


def copy_log(folder: Path, to: Path) -> None:
    """Copy what vLLM's side wrote, without the description of the cards."""
    for name in ("meta.json", "requests.jsonl"):
        shutil.copy(folder / name, to)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Workload, Ranks]:
    given = workload(120)
    folder = tmp_path_factory.mktemp("short") / "run"
    served = logged(folder, given, 1500)
    (folder / "config.json").write_text(json.dumps({"nodes": [{"instances": [{"hardware": "RTX4090"}]}]}))
    assert served.preemptions > 20
    return folder, given, served


def test_time_stamps_tell_the_pool(short_run: tuple[Path, Workload, Ranks]) -> None:
    folder, given, _ = short_run
    run = VllmRun.load(folder)
    simulator = Simulator(run, given)
    seen = observed_pool(run.before(60), simulator.requests, 16)
    assert seen == pytest.approx(1500, rel=0.04)
    assert observed_pool(run.before(10), simulator.requests, 16) is None, "nobody had to wait yet"


def test_the_card_is_named_beside_the_log_or_above_it(tmp_path: Path) -> None:
    logged(tmp_path / "run", workload(3), None)
    assert VllmRun.load(tmp_path / "run").device is None
    for where, card in ((tmp_path, "L4"), (tmp_path / "run", "RTX4090")):
        (where / "config.json").write_text(json.dumps({"nodes": [{"instances": [{"hardware": card}]}]}))
        assert VllmRun.load(tmp_path / "run").device == card
    (tmp_path / "run" / "config.json").write_text('{"nodes": []}')
    assert VllmRun.load(tmp_path / "run").device == "L4"


def test_a_pool_that_is_not_recorded_is_fitted(short_run: tuple[Path, Workload, Ranks]) -> None:
    folder, given, truth = short_run
    done = reproduce(folder, given, fit_on=60)
    assert (done.pool, done.hardware) == ("fitted", "RTX4090")
    assert done.served.config.num_blocks == pytest.approx(1500, rel=0.04)
    assert done.served.preemptions == pytest.approx(truth.preemptions, rel=0.3)
    assert abs(done.error["latency_mean"]) < 0.03
    assert abs(done.error_rest["ttft_mean"]) < 0.05
    assert done.as_dict()["pool"] == "fitted"


def test_what_only_a_shortage_explains_is_fitted_with_one(
    short_run: tuple[Path, Workload, Ranks], tmp_path: Path
) -> None:
    """Nobody says what card it was, and the one that is assumed has room enough."""
    folder, given, _ = short_run
    copy_log(folder, tmp_path)
    done = reproduce(tmp_path, given, fit_on=60)
    assert (done.pool, done.hardware) == ("fitted", "rtx-pro-6000")
    assert done.served.config.num_blocks == pytest.approx(1500, rel=0.04)
    assert abs(done.error["latency_mean"]) < 0.03


def test_without_a_fit_the_catalogue_says_what_fits(short_run: tuple[Path, Workload, Ranks]) -> None:
    folder, given, _ = short_run
    done = reproduce(folder, given, fit_on=0)
    assert done.pool == "catalogue"
    likely = likely_pool(VllmRun.load(folder), "llama-3.1-8b", "rtx-4090", 16)
    assert done.served.config.num_blocks == likely


@pytest.mark.parametrize("model", ["somebody/Else", "meta-llama/Llama-3.1-70B"])
def test_what_the_catalogue_does_not_know_is_never_short(model: str, tmp_path: Path) -> None:
    """A model that is not in it, or one that does not fit into the card as it stands there."""
    given = workload(20)
    logged(tmp_path, given, None, model=model)
    done = reproduce(tmp_path, given, fit_on=0, prior=TRUTH, hardware="rtx-4090")
    assert done.pool == "ample"
    assert done.served.preemptions == 0


def test_a_recorded_pool_is_taken(tmp_path: Path) -> None:
    given = workload(40)
    facts = {
        "kv_cache": {"num_gpu_blocks": 700, "block_size": 32, "gpu_memory_utilization": 0.92},
        "resolved_config": {
            "scheduler_config": {"async_scheduling": False, "max_num_seqs": 77},
            "cache_config": {"enable_prefix_caching": False},
        },
        "hardware": {"device_name": "NVIDIA RTX PRO 6000 Blackwell Server Edition"},
    }
    logged(tmp_path / "run", given, 700, {"max_num_batched_tokens": None, "max_num_seqs": 128}, **facts)
    done = reproduce(tmp_path / "run", given, fit_on=0)
    config = done.served.config
    assert (done.pool, config.num_blocks, config.block_size) == ("recorded", 700, 32)
    assert config.async_scheduling is False
    assert config.policy("lookup").name == "none"
    assert config.max_num_seqs == 128, "what was given counts, whatever else is logged"
    assert done.hardware == "NVIDIA RTX PRO 6000 Blackwell Server Edition"
    bad = {"kv_cache": {"num_gpu_blocks": "many"}}
    with pytest.raises(WorkloadError, match="num_gpu_blocks must be a whole number from 1 up, not 'many'"):
        logged(tmp_path / "bad", given, 700, **bad)


def test_the_share_of_the_pool_is_drawn_where_it_was_logged(
    short_run: tuple[Path, Workload, Ranks], tmp_path: Path
) -> None:
    folder, given, truth = short_run
    copy_log(folder, tmp_path)
    share = truth.over_time()
    header = "t,prompt_throughput,prompt_compute_throughput,gen_throughput,running,waiting,preempted,kv_cache_pct\n"
    for logs_it in (True, False):
        rows = []
        for t in range(1, int(share["time"][-1])):
            at = share["time"].searchsorted(t) - 1
            pct = 100 * share["share"][max(at, 0)] if logs_it else 0.0
            rows.append(f"{t},0,0,0,{int(share['running'][max(at, 0)])},0,0,{pct:.2f}")
        (tmp_path / "timeseries.csv").write_text(header + "\n".join(rows) + "\n")
        figure = reproduce(tmp_path, given, fit_on=0, num_blocks=1500).plot()
        assert [ax.get_ylabel() for ax in figure.axes] == ["sequences"] + ["KV cache (%)"] * logs_it
    assert 0.9 < share["share"].max() <= 1.0


def test_a_run_may_have_stopped_before_the_end_of_its_workload(tmp_path: Path) -> None:
    given = workload(30)
    logged(tmp_path, replace(given, requests=given.requests[:20]), None)
    assert len(reproduce(tmp_path, given, fit_on=0).run.requests) == 20


# ---- ranks ---------------------------------------------------------------------------------------------------------

CONFIG = Config.preset("vllm", num_blocks=400, max_num_seqs=8, max_num_batched_tokens=512)


def served_by(ranks: int, lockstep: bool, given: Workload) -> Ranks:
    scripts = {(r.request_id, 0): Script(r.sampling.max_tokens, unique=i) for i, r in enumerate(given)}
    made = Ranks(CONFIG, TRUTH, scripts, ranks=ranks, lockstep=lockstep)
    made.serve(given)
    return made


def test_one_rank_is_the_engine() -> None:
    given = workload(25)
    scripts = {(r.request_id, 0): Script(r.sampling.max_tokens, unique=i) for i, r in enumerate(given)}
    engine = Engine(
        CONFIG,
        SimulatedExecutor(TRUTH, outputs=scripts),
        clock=VirtualClock(),
        events=EventLog(enabled=False),
    )
    for request in given:
        engine.add(request)
    engine.run()
    alone = served_by(1, False, given)
    for r in given:
        (seq,) = engine.groups[r.request_id].sequences
        assert seq.finished_at == alone.sequence(r.request_id).finished_at
    assert alone.over_time()["running"].max() == 8


@pytest.mark.parametrize("lockstep", [False, True])
def test_ranks_share_the_requests(lockstep: bool) -> None:
    given = workload(60)
    made = served_by(3, lockstep, given)
    assert all(made.sequence(r.request_id).finish_reason == "length" for r in given)
    assert sum(len(e.groups) for e in made.engines) == 60
    assert min(len(e.groups) for e in made.engines) >= 15
    assert made.prompt_tokens == sum(len(r.prompt) for r in given)
    for engine in made.engines:
        engine.check()
    time = made.over_time()
    assert (time["time"][1:] > time["time"][:-1]).all()
    assert 8 < time["running"].max() <= 24
    assert time["running"][-1] <= 3  # who ends in a step still counts in it
    faster = served_by(1, False, given)
    assert max(e.clock.now() for e in made.engines) < faster.engines[0].clock.now()


def test_in_lockstep_a_step_is_as_long_as_the_slowest_ranks() -> None:
    given = workload(60)
    together, apart = served_by(2, True, given), served_by(2, False, given)
    ends = [{r.end(i) for r in e.steps for i in range(r.count)} for e in together.engines]
    # Wherever both ran, they ended at the same times.
    busy = min(max(e) for e in ends)
    assert {t for t in ends[0] if t <= busy} & ends[1]
    common = {t for t in ends[0] if t <= busy} ^ {t for t in ends[1] if t <= busy}
    assert len(common) < 0.1 * len(ends[0])
    latest = [max(e.clock.now() for e in made.engines) for made in (together, apart)]
    assert latest[0] > latest[1]


def test_the_command_says_what_pool_it_took(tmp_path: Path) -> None:
    given = workload(30)
    settings = {"data_parallel_size": 2}
    logged(tmp_path / "run", given, 400, settings, kv_cache={"num_gpu_blocks": 800, "block_size": 16})
    rows = [
        json.dumps(
            {
                "input_toks": len(r.prompt),
                "output_toks": r.sampling.max_tokens,
                "arrival_time_ns": int(r.arrival * 1e9),
                "input_tok_ids": list(r.prompt),
                "output_tok_ids": [1] * r.sampling.max_tokens,
            }
        )
        for r in given
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(rows) + "\n")
    line = ["reproduce", "vllm-run", str(tmp_path / "run"), "--workload", str(tmp_path / "requests.jsonl")]
    result = CliRunner().invoke(cli.app, [*line, "--hardware", "rtx-4090", "--fit-on", "0"])
    assert result.exit_code == 0, result.output
    assert "pool: 2 x 400 blocks of 16 (recorded)" in result.stdout
