"""A real vLLM run, simulated: the cost model is fitted to the run's first requests, and held against all of
them.

    run folder ──▶ VllmRun ──before(n)──▶ what the fit may read ──▶ Calibrated
        │                                                              │
        └──────── arrivals, lengths, token ids, settings ──────▶ simulate ──▶ errors over all, and over the rest

Inputs of the simulation are every request's arrival, prompt and output length, and the engine's settings. Of
the measurements the fit reads only the first ``n`` requests' (`VllmRun.before` holds nothing else). It is a
least-squares fit of the cost model's coefficients, in logarithms, with a prior: the catalogue's roofline for
that model and card. A coefficient that the log says nothing about stays where the prior has it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pagedlab.config import Config
from pagedlab.costs import Calibrated
from pagedlab.costs.vllm_log import VllmRequest, VllmRun
from pagedlab.engine.clock import to_seconds
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.engine.script import Script
from pagedlab.errors import ConfigError, WorkloadError
from pagedlab.lab.vllm_pool import PoolGuess, likely_pool, observed_pool
from pagedlab.lab.vllm_ranks import Ranks
from pagedlab.workloads import Workload, load

if TYPE_CHECKING:
    from pagedlab.lab.plots import Figure

Array = NDArray[np.float64]

BLOCK_SIZE = 16
"""vLLM's default."""
PRIOR_SIGMA = 1.0
"""How far, in natural logarithms, a coefficient may stray from the roofline before it counts as one standard
error."""
MOVED_SIGMA = 0.25
"""The same where the prior was itself fitted, on another card or model, and moved by the catalogue's ratios."""
FIT_ON, MOVED_FIT_ON = 100, 20
"""Requests whose measurements the fit may read, from the roofline and from a moved prior."""
HARDWARE = "rtx-pro-6000"
"""The catalogue's name for the card of the published runs."""
NOISE = 0.01
"""Relative noise of a measured time, besides `NOISE_S`."""
NOISE_S = 0.02
"""Absolute noise of a measured time, in seconds: about a step."""
POOL_SIGMA = 0.15
"""The same for the pool's size, where the catalogue says what fits beside the weights."""
SEEN_POOL_SIGMA = 0.03
"""The same where requests that waited for room say it."""
NUDGES = (0.02, 0.06, 0.02)
"""Steps of the finite differences, in logarithms: a simulation is made of steps, and smooth only on a larger scale. A
fit that is not `GOOD` goes on with the next from where it stands.
"""
GOOD = 0.015
"""A fit whose latencies are off by less, on average, needs no more."""
MOST_STEPS = 15
ROOMY = 0.8
"""A pool of which a simulation uses less than this share is taken to be never short."""
POOR = 0.04
"""A fit whose latencies are off by more, on average, has not understood the run."""


def block_size_of(run: VllmRun) -> int:
    """Return how many tokens a block of the run held."""
    return int(run.settings.get("block_size") or BLOCK_SIZE)


def engine_config(run: VllmRun, num_blocks: int) -> Config:
    """Return the configuration that stands for the run's engine settings.

    What they leave out has vLLM's default: prefix caching, chunked prefill, blocks of 16 tokens, first-come
    first-served, asynchronous scheduling; a request is admitted when there is room for its whole prompt.
    """
    said = run.settings
    return Config.preset(
        "vllm",
        num_blocks=num_blocks,
        block_size=block_size_of(run),
        max_num_seqs=int(said.get("max_num_seqs") or 256),
        max_num_batched_tokens=int(said.get("max_num_batched_tokens") or 8192),
        reservation="full-prompt",
        lookup="none" if said.get("enable_prefix_caching") is False else "chained-hash",
        async_scheduling=said.get("async_scheduling") is not False,
        # vLLM publishes a block when it is scheduled, so the next request of the same step finds it already. Here it
        # comes a step later and finds the same.
        wait_for_prefix=True,
    )


def requests_of(run: VllmRun, workload: Workload) -> list[Request]:
    """Return the run's requests with the workload's tokens, in order of arrival.

    A run may have stopped before the workload's end. Raises `WorkloadError` if they are not those of the run: fewer, or
    of other lengths.
    """
    if len(workload) < len(run.requests):
        raise WorkloadError(f"the run has {len(run.requests)} requests, {workload.name} has {len(workload)}")
    by_arrival = list(workload)
    numbered = _numbered(run.requests)
    made = []
    for number, logged in zip(numbered, run.requests, strict=True):
        given = by_arrival[number]
        if len(given.prompt) != logged.input_tokens:
            raise WorkloadError(
                f"request {logged.request_id!r} of the run has {logged.input_tokens} prompt tokens, "
                f"number {number} of {workload.name} has {len(given.prompt)}"
            )
        sampling = SamplingParams(max_tokens=logged.output_tokens, ignore_eos=True)
        made.append(replace(given, request_id=logged.request_id, sampling=sampling, arrival=logged.arrival))
    return made


def _numbered(requests: Sequence[VllmRequest]) -> list[int]:
    """Return each request's place in the workload: the number that its id ends in, or the order of
    arrival.
    """
    try:
        numbers = [int(r.request_id.rsplit("-", 1)[-1]) for r in requests]
    except ValueError:
        return list(range(len(requests)))
    return numbers if sorted(numbers) == list(range(len(requests))) else list(range(len(requests)))


class Simulator:
    """The run's requests and settings, ready to be simulated under any cost model."""

    def __init__(self, run: VllmRun, workload: Workload, *, num_blocks: int | None = None) -> None:
        self.requests = requests_of(run, workload)
        outputs = workload.outputs or {}
        numbers = _numbered(run.requests)
        original = [r.request_id for r in workload]
        self._scripts: dict[tuple[str, int], Script] = {}
        for unique, (number, r) in enumerate(zip(numbers, self.requests, strict=True)):
            said = outputs.get(original[number])
            tokens = said if said is not None and len(said) == r.sampling.max_tokens else None
            self._scripts[r.request_id, 0] = Script(r.sampling.max_tokens, tokens, "length", unique)
        # Left out, nothing is ever short; one block is the null block.
        size = block_size_of(run)
        needs = [-(-(len(r.prompt) + r.sampling.max_tokens) // size) for r in self.requests]
        self.least_blocks = max(needs) + 1
        """The fewest with which every request can run."""
        self.config = engine_config(run, num_blocks or sum(needs) + 1)
        """Of each rank."""
        self.ranks = run.data_parallel

    def serve(
        self, cost: Calibrated, *, until: Sequence[str] | None = None, num_blocks: int | None = None
    ) -> Ranks:
        """Return the engines after serving all, or as soon as the requests ``until`` have ended.

        ``num_blocks`` is another size of each rank's pool.
        """
        config = self.config if num_blocks is None else self.config.replace(num_blocks=num_blocks)
        # Ranks that share experts wait for each other.
        ranks = Ranks(config, cost, self._scripts, ranks=self.ranks, lockstep=cost.experts > 0)
        ranks.serve(self.requests, until)
        return ranks

    def most_in_use(self, cost: Calibrated) -> int:
        """Return the largest number of blocks that are in use at once, of a rank."""
        return int(self.serve(cost).over_time()["blocks"].max()) // self.ranks

    def times(self, cost: Calibrated, ids: Sequence[str], num_blocks: int | None = None) -> Array:
        """Return first and last token times [len(ids), 2] in seconds."""
        served = self.serve(cost, until=ids, num_blocks=num_blocks)
        return np.array([_times(served, name) for name in ids])


def _times(served: Ranks, name: str) -> tuple[float, float]:
    """Return when a request's first and last token came, in seconds on the run's clock."""
    seq = served.sequence(name)
    assert seq.first_token_at is not None
    assert seq.finished_at is not None
    return to_seconds(seq.first_token_at), to_seconds(seq.finished_at)


@dataclass(frozen=True)
class Fit:
    """A cost model fitted to a log, and how."""

    cost: Calibrated
    prior: Calibrated
    seconds: float
    simulations: int
    num_blocks: int | None = None
    """The pool's size, where it was fitted too."""
    loss: float = 0.0
    """Half the sum of squared residuals: smaller is better."""
    latency_error: float = 0.0
    """Mean absolute relative error of the latency of the requests that it was fitted to."""


def calibrate(
    seen: VllmRun,
    simulator: Simulator,
    prior: Calibrated,
    sigma: float = PRIOR_SIGMA,
    *,
    pool: PoolGuess | None = None,
) -> Fit:
    """Fit ``prior``'s coefficients to the measurements in ``seen`` (see `VllmRun.before`), simulating all the
    while.

    Residuals are the errors of every first and last token's time since arrival, over their noise; the prior
    adds one residual a coefficient. Solved by scipy's trust-region least squares with finite differences. ``pool`` is
    a guess at the number of blocks, to be fitted like a coefficient; None: as many as ``simulator`` has.
    """
    from scipy.optimize import least_squares

    began, calls = time.perf_counter(), 0
    measured = seen.requests
    ids = [r.request_id for r in measured]
    arrival = np.array([[r.arrival, r.arrival] for r in measured])
    truth = np.array([[r.first_token, r.last_token] for r in measured]) - arrival
    noise = NOISE * truth + NOISE_S
    start = np.array(prior.to_vector())
    active = [i for i, (low, high) in enumerate(prior.bounds()) if high > low]

    uncertain = np.full(len(active), sigma)
    if pool is not None:
        uncertain = np.append(uncertain, pool.sigma)

    def model(x: Array) -> tuple[Calibrated, int | None]:
        vector = start.copy()
        vector[active] += x[: len(active)]
        cost = Calibrated.from_vector(list(vector), like=prior)
        if pool is None:
            return cost, None
        return cost, max(simulator.least_blocks, round(pool.num_blocks * float(np.exp(x[-1]))))

    def residuals(x: Array) -> Array:
        nonlocal calls
        calls += 1
        cost, blocks = model(x)
        said = simulator.times(cost, ids, blocks) - arrival
        return np.concatenate([((said - truth) / noise).ravel(), x / uncertain])

    def slopes(x: Array, nudge: float) -> Array:
        here, columns = residuals(x), []
        for i in range(len(x)):
            moved = x.copy()
            moved[i] += nudge
            columns.append((residuals(moved) - here) / nudge)
        return np.array(columns).T

    x, off = np.zeros(len(uncertain)), np.inf
    for nudge in NUDGES:
        solved = least_squares(
            residuals, x, jac=partial(slopes, nudge=nudge), max_nfev=MOST_STEPS, xtol=1e-3, ftol=1e-4
        )
        x = solved.x
        errors_of_latency = residuals(x)[1 : 2 * len(ids) : 2] * noise[:, 1] / truth[:, 1]
        off = float(np.abs(errors_of_latency).mean())
        if off < GOOD:
            break
    cost, blocks = model(x)
    return Fit(cost, prior, time.perf_counter() - began, calls, blocks, float(solved.cost), off)


# ---- the comparison ------------------------------------------------------------------------------------------------

_KINDS = ("ttft", "tpot", "latency")
_QUANTILES = (50, 90, 99)


def errors(run: VllmRun, served: Ranks, skip: int = 0) -> dict[str, float]:
    """Return signed relative errors of the simulation over the run's requests but the first ``skip``.

    ``ttft_mean``, ``ttft_p50`` ... : of the mean and the percentiles (0.01: 1% above the measured).
    ``latency_mape``, ``ttft_mape``, ``tpot_mape``: mean absolute relative error request by request.
    """
    truth: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    said: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for logged in run.requests[skip:]:
        first, last = _times(served, logged.request_id)
        truth["ttft"].append(logged.ttft)
        truth["latency"].append(logged.latency)
        said["ttft"].append(first - logged.arrival)
        said["latency"].append(last - logged.arrival)
        if logged.output_tokens > 1:
            truth["tpot"].append(logged.tpot)
            said["tpot"].append((last - first) / (logged.output_tokens - 1))
    out: dict[str, float] = {}
    for kind in _KINDS:
        t, s = np.array(truth[kind]), np.array(said[kind])
        out[f"{kind}_mean"] = float(s.mean() / t.mean() - 1)
        for q in _QUANTILES:
            out[f"{kind}_p{q}"] = float(np.percentile(s, q) / np.percentile(t, q) - 1)
        out[f"{kind}_mape"] = float(np.abs(s / t - 1).mean())
    return out


@dataclass
class Reproduction:
    """A run and its simulation, side by side."""

    run: VllmRun
    fit: Fit
    fitted_on: int
    error: dict[str, float]
    """Over all requests; see `errors`."""
    error_rest: dict[str, float]
    """Over those that the fit did not see."""
    hit_tokens: int
    prompt_tokens: int
    seconds: float
    """What simulating the run once took."""
    served: Ranks = field(repr=False)
    """What the simulation leaves behind."""
    pool: str = "ample"
    """Where the pool's size comes from: ``"given"``, ``"recorded"`` by the run, ``"fitted"``, from the ``"catalogue"``,
    or ``"ample"``: nothing was ever short.
    """
    model: str = ""
    """The catalogue's names for the run's model and card."""
    hardware: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, as the command line prints it."""
        return {
            "model": self.run.model,
            "requests": len(self.run.requests),
            "fitted_on": self.fitted_on,
            "error": self.error,
            "error_rest": self.error_rest,
            "hit_tokens": self.hit_tokens,
            "prompt_tokens": self.prompt_tokens,
            "fit_seconds": self.fit.seconds,
            "fit_simulations": self.fit.simulations,
            "fit_latency_error": self.fit.latency_error,
            "simulate_seconds": self.seconds,
            "clock_alignment_s": self.run.alignment.spread,
            "num_blocks": self.served.config.num_blocks,
            "pool": self.pool,
            "ranks": len(self.served.engines),
            "preemptions": self.served.preemptions,
            "cost": self.fit.cost.get_params(),
            "prior": self.fit.prior.get_params(),
        }

    def plot(self) -> Figure:
        """Return running and waiting sequences over time, simulated over measured, and below them the share of the pool
        in use if the run has logged it.
        """
        from pagedlab.lab import plots

        simulated = self.served.over_time()
        ticks = self.run.ticks
        measured = {"running": [t.running for t in ticks], "waiting": [t.waiting for t in ticks]}
        share = None
        if any(t.kv_cache_pct for t in ticks):
            share = 100 * simulated["share"], [t.kv_cache_pct for t in ticks]
        title = f"{self.run.model}: simulated over measured"
        shown = {name: simulated[name] for name in measured}
        return plots.of_queue(simulated["time"], shown, [t.t for t in ticks], measured, title, share)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows: measure, error over all requests, error over those not fitted on."""
        shown = (
            ("mean", "mean"),
            ("p50", "P50"),
            ("p90", "P90"),
            ("p99", "P99"),
            ("mape", "per request, absolute"),
        )
        rows = []
        for kind in _KINDS:
            title = kind if kind == "latency" else kind.upper()
            for key, name in shown:
                both = (_percent(e[f"{kind}_{key}"]) for e in (self.error, self.error_rest))
                rows.append([f"{title} {name}", *both])
        return ["", f"all {len(self.run.requests)}", f"from {self.fitted_on + 1}"], rows


def _percent(value: float) -> str:
    return f"{value:+.2%}"


def reproduce(
    folder: str | Path,
    workload: str | Path | Workload,
    *,
    model: str | None = None,
    hardware: str | None = None,
    fit_on: int | None = None,
    prior: Calibrated | None = None,
    source: Reproduction | None = None,
    num_blocks: int | None = None,
    sigma: float | None = None,
) -> Reproduction:
    """Simulate the vLLM run in ``folder`` after fitting the cost model to its first ``fit_on`` requests (0: no fit).

    ``model`` is the catalogue's name for the run's model, ``hardware`` its card (None: what the run says it ran on, or
    `HARDWARE`); they make the ``prior`` of the fit, and say how much room there is. ``source`` is another run, on any
    model and card, already reproduced: its coefficients, moved here by the catalogue's ratios, are then the prior, and
    fewer requests are enough (``fit_on`` is `FIT_ON`, and `MOVED_FIT_ON` with a source). ``num_blocks`` is the pool's
    size. Left out, it is what the run has recorded; where it has not, and a simulation comes near what the catalogue
    says fits, it is fitted too (see `pagedlab.lab.vllm_pool`).
    """
    run = VllmRun.load(folder)
    hardware = hardware or run.device or HARDWARE
    given = workload if isinstance(workload, Workload) else load(workload)
    if prior is not None and source is not None:
        raise ConfigError("prior and source exclude each other")
    if fit_on is None:
        fit_on = min(FIT_ON if source is None else MOVED_FIT_ON, len(run.requests))
    if not 0 <= fit_on <= len(run.requests):
        raise ConfigError(f"fit_on must be from 0 to {len(run.requests)}, not {fit_on}")
    pool = "given" if num_blocks is not None else "ample" if run.num_blocks is None else "recorded"
    recorded = None if run.num_blocks is None else run.num_blocks // run.data_parallel
    simulator = Simulator(run, given, num_blocks=num_blocks or recorded)
    start = prior or Calibrated.prior(model or run.model, hardware, run.tensor_parallel)
    if source is not None:
        start = source.fit.cost.scaled(
            model or run.model,
            hardware,
            from_model=source.model,
            from_hardware=source.hardware,
            to_tp=run.tensor_parallel,
            from_tp=source.run.tensor_parallel,
        )
    if sigma is None:
        sigma = PRIOR_SIGMA if source is None else MOVED_SIGMA
    seen = run.before(max(fit_on, 1))
    known_as = model or run.model, hardware
    if not fit_on:
        room = _likely(seen, simulator, start, *known_as) if pool == "ample" else None
        fit = Fit(start, start, 0.0, 0, room)
        pool = pool if room is None else "catalogue"
    elif pool == "ample":
        fit = _fit_with_pool(seen, simulator, start, sigma, *known_as)
        pool = pool if fit.num_blocks is None else "fitted"
    else:
        fit = calibrate(seen, simulator, start, sigma)
    done = compare(run, simulator, fit, fit_on)
    return replace(done, pool=pool, model=model or run.model, hardware=hardware)


def _likely(run: VllmRun, simulator: Simulator, cost: Calibrated, model: str, hardware: str) -> int | None:
    """Return the pool that the catalogue says fits, unless a simulation has no need of so much, or the catalogue knows
    nothing of it: the model is not in it (and somebody gave a prior), or is too large for the card as it stands there.
    """
    try:
        likely = likely_pool(run, model, hardware, simulator.config.block_size)
    except ConfigError:
        return None
    if not likely or simulator.most_in_use(cost) < ROOMY * likely:
        return None
    return max(likely, simulator.least_blocks)


def _fit_with_pool(
    seen: VllmRun, simulator: Simulator, prior: Calibrated, sigma: float, model: str, hardware: str
) -> Fit:
    """Fit where the pool's size is not known: it is fitted too if there may have been a shortage, either because the
    catalogue says so, or because no cost model explains without one what was seen.
    """
    observed = observed_pool(seen, simulator.requests, simulator.config.block_size)
    guess = None
    if observed is not None:
        guess = PoolGuess(max(observed // simulator.ranks, simulator.least_blocks), SEEN_POOL_SIGMA)
    if (likely := _likely(seen, simulator, prior, model, hardware)) is not None:
        return calibrate(seen, simulator, prior, sigma, pool=guess or PoolGuess(likely, POOL_SIGMA))
    fit = calibrate(seen, simulator, prior, sigma)
    if guess is None or fit.latency_error < POOR:
        return fit
    other = calibrate(seen, simulator, prior, sigma, pool=guess)
    both = fit.seconds + other.seconds, fit.simulations + other.simulations
    return replace(other if other.loss < fit.loss else fit, seconds=both[0], simulations=both[1])


def compare(run: VllmRun, simulator: Simulator, fit: Fit, fitted_on: int) -> Reproduction:
    """Simulate the whole run under a fit and set it beside what was measured."""
    began = time.perf_counter()
    served = simulator.serve(fit.cost, num_blocks=fit.num_blocks)
    seconds = time.perf_counter() - began
    rest = min(fitted_on, len(run.requests) - 1)
    return Reproduction(
        run, fit, fitted_on, errors(run, served), errors(run, served, rest), served.hit_tokens,
        served.prompt_tokens, seconds, served,
    )  # fmt: skip
