"""A cost model fitted to the steps of runs."""

from __future__ import annotations

import json
import math
import signal

import numpy as np
import pytest
from typer.testing import CliRunner

import pagedlab as pl
from pagedlab.cli import app
from pagedlab.costs import Calibrated, CostModel, StepWork
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.errors import ConfigError
from pagedlab.executors.stub import StubExecutor
from pagedlab.lab.calibrate import calibrate, in_turn, report, steps_of, try_on
from pagedlab.lab.job import Job

TRUTH = Calibrated(c0=4.0, w=8.0, c1=50.0, c3=400.0, c4=8.0, c5=80.0, c6=12.0)


class Disturbed(CostModel):
    """`TRUTH` on a machine where something is in the way now and then, and all is slower by ``factor``."""

    factor: float = 1.0
    first: int = 0
    """Step of the first disturbance."""

    def step_ps(self, work: StepWork) -> int:
        steps = self.__dict__.setdefault("steps", [])
        steps.append(work)
        slow = 5 if len(steps) % 7 == self.first else 1
        return round(TRUTH.step_ps(work) * self.factor * slow)


def simulated(cost: CostModel, seed: int) -> pl.Run:
    workload = pl.workloads.mixed_lengths(
        seed=seed, num_requests=48, prompt=(16, 900), output=(8, 300), rate=4.0
    )
    config = pl.Config(num_blocks=4000, max_num_seqs=32, max_num_batched_tokens=1024)
    return pl.simulate(config, workload, cost=cost, progress=False)


def test_what_made_the_steps_is_found_again() -> None:
    """Fitted on one workload, within a percent on another."""
    fitted = calibrate(simulated(TRUTH, 0))
    assert report(fitted, simulated(TRUTH, 1)).mean_abs_error < 0.01


def test_it_says_what_it_cannot_use() -> None:
    run = pl.run(pl.Config(), [[1, 2, 3]], executor=StubExecutor(), max_tokens=4, clock="step")
    with pytest.raises(ConfigError, match="does not time them"):
        steps_of(run)
    run = pl.run(pl.Config(), [[1, 2, 3]], executor=StubExecutor(), max_tokens=4)
    with pytest.raises(ConfigError, match="at least 20 steps; the run has 4"):
        calibrate(run)


SMALL = pl.Config(num_blocks=64, max_num_seqs=4, max_num_batched_tokens=64)
PROMPTS = [[1 + i, 2, 3, 4] * (4 + i) for i in range(6)]


def asking(prompts: list[list[int]]) -> list[Request]:
    """Requests for twelve tokens each."""
    sampling = SamplingParams(max_tokens=12)
    return [Request(request_id=str(i), prompt=p, sampling=sampling) for i, p in enumerate(prompts)]


def all_at_once(cost: CostModel, seed: int) -> pl.Run:
    """A run whose steps do not depend on how long they take."""
    workload = pl.workloads.mixed_lengths(seed=seed, num_requests=24, prompt=(16, 400), output=(8, 120))
    return pl.simulate(pl.Config(num_blocks=4000, max_num_seqs=16), workload, cost=cost, progress=False)


def test_what_is_in_the_way_of_one_round_is_no_part_of_a_step() -> None:
    """Steps keep their proportions, and their mean is that of all rounds."""
    rounds = [all_at_once(Disturbed(factor=f, first=i), 0) for i, f in enumerate((1.0, 1.5, 1.2))]
    works, durations = steps_of(rounds)
    plain = np.concatenate([run.arrays("steps")["duration"] for run in rounds])
    assert np.mean(durations) / 1e12 == pytest.approx(plain.mean(), rel=1e-6)
    pace = np.array(durations) / [TRUTH.step_ps(work) for work in works]
    assert pace.max() / pace.min() < 1.6, "a step that was disturbed five times over in its only calm round"
    fitted = calibrate(rounds)
    scale = np.mean(durations) / np.mean([TRUTH.step_ps(work) for work in works])
    other = [TRUTH.step_ps(work) * scale for work in steps_of(all_at_once(TRUTH, 1))[0]]
    said = [fitted.step_ps(work) for work in steps_of(all_at_once(TRUTH, 1))[0]]
    assert sum(said) == pytest.approx(sum(other), rel=0.05)


def test_rounds_with_other_steps_all_count() -> None:
    runs = [simulated(TRUTH, 0), simulated(Disturbed(factor=3.0), 0)]
    each = [steps_of(run) for run in runs]
    assert each[0][0] != each[1][0]
    assert steps_of(runs) == (each[0][0] + each[1][0], each[0][1] + each[1][1])


@pytest.mark.parametrize("turn", [0.002, math.inf])
def test_served_in_turn_they_say_what_they_say_alone(turn: float) -> None:
    workloads = [PROMPTS[:3], PROMPTS[3:]]
    runs = in_turn(SMALL, [asking(w) for w in workloads], rounds=2, turn=turn)
    assert [len(rounds) for rounds in runs] == [2, 2]
    for rounds, prompts in zip(runs, workloads):
        alone = pl.run(SMALL, prompts, max_tokens=12)
        for run in rounds:
            assert run.tokens == alone.tokens
            assert not run.interrupted
            assert steps_of(run)[0] == steps_of(alone)[0]


def test_a_clock_stands_still_while_it_is_anothers_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's duration is its own, and no step is long because somebody else was served before it."""
    spans: list[tuple[float, float]] = []
    result = Job.result

    def noted(job: Job, *, interrupted: bool, ended: bool = False) -> pl.Run:
        run = result(job, interrupted=interrupted, ended=ended)
        steps = run.arrays("steps")
        spans.append((float(steps["start"][-1] + steps["duration"][-1]), float(steps["duration"].sum())))
        return run

    monkeypatch.setattr(Job, "result", noted)
    in_turn(SMALL, [asking([p]) for p in PROMPTS[:4]], rounds=1, turn=1e-9)
    assert len(spans) == 4
    for until, stepping in spans:
        assert until < 2 * stepping  # four times as much, if it ran on


def test_ctrl_c_keeps_the_rounds_that_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    init = Job.__init__

    def counted(job: Job, *args: object, **options: object) -> None:
        made.append(job)
        init(job, *args, **options)  # type: ignore[arg-type]
        if len(made) == press:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Job, "__init__", counted)
    workloads = [asking(PROMPTS[:2])] * 2
    press = 5  # in the third round
    assert [len(rounds) for rounds in in_turn(SMALL, workloads, rounds=4)] == [2, 2]
    made.clear()
    press = 2
    with pytest.raises(KeyboardInterrupt):
        in_turn(SMALL, workloads, rounds=4)


def test_impossible_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounds must be 1 or more, not 0"):
        in_turn(SMALL, [PROMPTS], rounds=0)
    with pytest.raises(ConfigError, match="turn must be above 0 seconds, not -1"):
        in_turn(SMALL, [PROMPTS], turn=-1)


def test_a_trial_compares_with_all_rounds() -> None:
    workload = pl.workloads.mixed_lengths(num_requests=8, prompt=(16, 100), output=(4, 20))
    config = pl.Config(num_blocks=500)
    rounds = [pl.simulate(config, workload, cost=Disturbed(factor=f, first=9)) for f in (1.0, 1.2, 1.4)]
    trial = try_on(TRUTH, config, workload, rounds)
    assert trial.error == pytest.approx(1 / 1.2 - 1, rel=1e-6)
    assert trial.by_run == pytest.approx([trial.simulated * f for f in (1.0, 1.2, 1.4)])
    assert trial.steps == trial.steps_simulated == len(rounds[0].columns("steps")["step"])


def test_the_command_fits_and_tries(tmp_path: object) -> None:
    out = f"{tmp_path}/cost.json"
    line = ["calibrate", "--requests", "6", "--rounds", "2", "--max-num-seqs", "4", "--out", out]
    done = CliRunner().invoke(app, [*line, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)["results"]
    assert result["rounds"] == len(result["mean_step_by_round"]) == 2
    assert result["steps"] == result["steps_simulated"]
    assert result["mean_step_error"] == pytest.approx(result["mean_step_simulated"] / result["mean_step"] - 1)
    with open(out) as file:
        assert Calibrated.from_json(file.read()).get_params() == result["cost"]
    done = CliRunner().invoke(app, line)
    assert "shared-prefix simulated: mean step" in done.stdout
    assert "rounds from" in done.stdout
    assert CliRunner().invoke(app, ["calibrate", "--rounds", "0"]).exit_code == 2
