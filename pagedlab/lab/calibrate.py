"""`calibrate`: a cost model of this machine's own engine, fitted to the steps of real runs.

A machine that others use too is faster at one moment than at the next, and by more than a good fit is wrong. So what
is to be compared is served by turns of a few steps (`in_turn`), several times over. How steps differ is read off the
fastest round of each, in which nothing got in its way; how long they take all together, off all rounds (`steps_of`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from pagedlab.config import Config
from pagedlab.costs import Calibrated, StepWork
from pagedlab.costs.fitting import FitReport, fit_steps
from pagedlab.engine.clock import to_ps
from pagedlab.errors import ConfigError
from pagedlab.lab.bar import bar
from pagedlab.lab.garbage import seldom_collected
from pagedlab.lab.job import Job, RunClock, WorkloadLike, wait_briefly
from pagedlab.lab.results import Run
from pagedlab.lab.session import StopOnInterrupt
from pagedlab.lab.simulate import simulate

LEAST_STEPS = 20
ROUNDS = 7
TURN = 0.05
"""Seconds that a workload is served before it is another's turn."""

Runs = Run | Sequence[Run]
"""A run, or several of the same configuration and workload."""


def calibrate(runs: Runs, *, prior: Calibrated | None = None, knee: str = "max") -> Calibrated:
    """Return the cost model that explains the durations of the runs' steps best (see `steps_of`).

    The runs must have been timed (not by the step clock), with at least `LEAST_STEPS` steps; prompts
    and outputs of many lengths tell the coefficients apart. ``prior`` settles what the steps leave open.
    Other arguments are those of `pagedlab.costs.fitting.fit_steps`. Raises `ConfigError`.
    """
    works, durations = steps_of(runs)
    if len(works) < LEAST_STEPS:
        raise ConfigError(f"a calibration needs at least {LEAST_STEPS} steps; the run has {len(works)}")
    return fit_steps(works, durations, prior=prior, knee=knee)


def report(cost: Calibrated, runs: Runs) -> FitReport:
    """Return how close ``cost`` comes to the steps of ``runs``, best such that it was not fitted to."""
    return FitReport.of(cost, *steps_of(runs))


def steps_of(runs: Runs) -> tuple[list[StepWork], list[int]]:
    """Return the work of each step and its duration in picoseconds.

    Of several runs that took the same steps, each step counts once, with its shortest duration times the factor by
    which all runs together were slower than that: the mean is that of all steps of all runs. If their steps differ
    (requests that arrive while others are served meet other batches in every run), all of them count as they are.
    """
    each = [_steps_of(run) for run in ([runs] if isinstance(runs, Run) else runs)]
    works = each[0][0]
    if any(other != works for other, _ in each):
        return [w for some, _ in each for w in some], [t for _, some in each for t in some]
    took = np.array([durations for _, durations in each], dtype=np.float64)
    fastest = took.min(axis=0)
    return works, np.rint(fastest * (took.sum() / (len(took) * fastest.sum()))).astype(np.int64).tolist()


def _steps_of(run: Run) -> tuple[list[StepWork], list[int]]:
    if run.facts["clock"] == "step":
        raise ConfigError("the run's clock was 'step', which counts steps and does not time them")
    columns = run.columns("steps")
    names = ("prefill_tokens", "prefill_pairs", "decode_tokens", "context_tokens")
    works = [
        StepWork(prefill_tokens=p, prefill_pairs=a, decode_seqs=d, context_tokens=c, samples=d)
        for p, a, d, c in zip(*(columns[n] for n in names), strict=True)
    ]
    return works, [max(1, to_ps(t)) for t in columns["duration"]]


def in_turn(
    config: Config,
    workloads: Sequence[WorkloadLike],
    *,
    rounds: int = ROUNDS,
    turn: float | None = None,
    progress: bool | None = None,
) -> list[list[Run]]:
    """Serve each of ``workloads`` ``rounds`` times with ``config``'s model, and return the runs, a list for each.

    In each round all are served side by side, ``turn`` seconds or a step at a time, with clocks that stand still
    while it is another's turn. Each has a model of its own meanwhile. ``turn=math.inf`` serves one after the other with
    one model. None: `TURN` seconds on the CPU, one after the other on a GPU, which is rarely shared and seldom has the
    room. Ctrl-C ends it after the step at hand, with the rounds that are whole; before the first is, it raises
    `KeyboardInterrupt`.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be 1 or more, not {rounds}")
    if turn is None:
        turn = TURN if config.device == "cpu" else math.inf
    if not turn > 0:
        raise ConfigError(f"turn must be above 0 seconds, not {turn}")
    runs: list[list[Run]] = [[] for _ in workloads]
    watch = bar(progress, rounds, " rounds")
    together = [workloads] if turn < math.inf else [[w] for w in workloads]
    try:
        with StopOnInterrupt() as stop, seldom_collected():
            for _ in range(rounds):
                served = [run for some in together for run in _round(config, some, turn, stop)]
                if stop.asked:
                    break
                for own, run in zip(runs, served, strict=True):
                    own.append(run)
                if watch is not None:
                    watch.update(1)
    finally:
        if watch is not None:
            watch.close()
    if runs and not runs[0]:
        raise KeyboardInterrupt
    return runs


def _round(
    config: Config, workloads: Iterable[WorkloadLike], turn: float, stop: StopOnInterrupt
) -> list[Run]:
    with ExitStack() as stack:
        clocks, jobs = [], []
        for workload in workloads:
            clocks.append(RunClock())
            jobs.append(Job(config, workload, clock=clocks[-1], events=False))
            stack.callback(jobs[-1].close)
            clocks[-1].hold()
        while not stop.asked and any(job.engine.has_work for job in jobs):
            for clock, job in zip(clocks, jobs):
                clock.go_on()
                end = time.perf_counter() + turn
                while job.engine.has_work and not stop.asked:
                    if (idle := job.rest()) > 0:
                        wait_briefly(idle)
                        continue
                    job.engine.step()
                    if time.perf_counter() >= end:
                        break
                clock.hold()
        return [job.result(interrupted=job.engine.has_work, ended=True) for job in jobs]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a cost model does on a workload that it was not fitted to: mean durations of steps, in seconds."""

    simulated: float
    """Of the simulation."""
    measured: float
    """Of all steps of all runs."""
    by_run: tuple[float, ...]
    """Of each run."""
    steps: int
    """Steps of the first run."""
    steps_simulated: int

    @property
    def error(self) -> float:
        """Signed: above 0 the simulation is too slow."""
        return self.simulated / self.measured - 1


def try_on(cost: Calibrated, config: Config, workload: WorkloadLike, runs: Sequence[Run]) -> Trial:
    """Simulate ``workload`` with ``cost``, saying what ``runs`` of it said, and compare the steps."""
    again = simulate(config, workload, cost=cost, outputs=runs[0], events=False, progress=False)
    said, *took = (run.arrays("steps")["duration"] for run in (again, *runs))
    return Trial(
        simulated=float(np.mean(said)),
        measured=float(np.mean(np.concatenate(took))),
        by_run=tuple(float(np.mean(durations)) for durations in took),
        steps=len(took[0]),
        steps_simulated=len(said),
    )
