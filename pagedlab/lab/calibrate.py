"""`calibrate`: a cost model of this machine's own engine, fitted to the steps of a real run."""

from __future__ import annotations

from collections.abc import Sequence

from pagedlab.costs import Calibrated, StepWork
from pagedlab.costs.fitting import FitReport, fit_steps
from pagedlab.engine.clock import to_ps
from pagedlab.errors import ConfigError
from pagedlab.lab.results import Run

LEAST_STEPS = 20


def calibrate(run: Run, *, prior: Calibrated | None = None, knee: str = "max") -> Calibrated:
    """Return the cost model that explains the durations of ``run``'s steps best.

    The run must have been timed (not by the step clock), with at least `LEAST_STEPS` steps; one with prompts
    and outputs of many lengths tells the coefficients apart. ``prior`` settles what the steps leave open.
    Other arguments are those of `pagedlab.costs.fitting.fit_steps`. Raises `ConfigError`.
    """
    works, durations = steps_of(run)
    if len(works) < LEAST_STEPS:
        raise ConfigError(f"a calibration needs at least {LEAST_STEPS} steps; the run has {len(works)}")
    return fit_steps(works, durations, prior=prior, knee=knee)


def report(cost: Calibrated, run: Run) -> FitReport:
    """Return how close ``cost`` comes to the steps of ``run``, best one that it was not fitted to."""
    return FitReport.of(cost, *steps_of(run))


def steps_of(run: Run) -> tuple[list[StepWork], Sequence[int]]:
    """Return the work of each step and its duration in picoseconds."""
    if run.facts["clock"] == "step":
        raise ConfigError("the run's clock was 'step', which counts steps and does not time them")
    columns = run.columns("steps")
    names = ("prefill_tokens", "prefill_pairs", "decode_tokens", "context_tokens")
    works = [
        StepWork(prefill_tokens=p, prefill_pairs=a, decode_seqs=d, context_tokens=c, samples=d)
        for p, a, d, c in zip(*(columns[n] for n in names), strict=True)
    ]
    return works, [max(1, to_ps(t)) for t in columns["duration"]]
