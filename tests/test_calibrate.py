"""A cost model fitted to the steps of a run."""

from __future__ import annotations

import pytest

import pagedlab as pl
from pagedlab.costs import Calibrated
from pagedlab.errors import ConfigError
from pagedlab.executors.stub import StubExecutor
from pagedlab.lab.calibrate import calibrate, report, steps_of


def simulated(cost: Calibrated, seed: int) -> pl.Run:
    workload = pl.workloads.mixed_lengths(
        seed=seed, num_requests=48, prompt=(16, 900), output=(8, 300), rate=4.0
    )
    config = pl.Config(num_blocks=4000, max_num_seqs=32, max_num_batched_tokens=1024)
    return pl.simulate(config, workload, cost=cost, progress=False)


def test_what_made_the_steps_is_found_again() -> None:
    """Fitted on one workload, within a percent on another."""
    truth = Calibrated(c0=4.0, w=8.0, c1=50.0, c3=400.0, c4=8.0, c5=80.0, c6=12.0)
    fitted = calibrate(simulated(truth, 0))
    assert report(fitted, simulated(truth, 1)).mean_abs_error < 0.01


def test_it_says_what_it_cannot_use() -> None:
    run = pl.run(pl.Config(), [[1, 2, 3]], executor=StubExecutor(), max_tokens=4, clock="step")
    with pytest.raises(ConfigError, match="does not time them"):
        steps_of(run)
    run = pl.run(pl.Config(), [[1, 2, 3]], executor=StubExecutor(), max_tokens=4)
    with pytest.raises(ConfigError, match="at least 20 steps; the run has 4"):
        calibrate(run)
