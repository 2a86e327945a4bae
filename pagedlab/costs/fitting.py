"""Fitting a `Calibrated` to measured steps, and saying how good it is.

For steps whose durations are known one by one (a timed executor, an engine's step log). Where only requests' time
stamps are known, the fit has to simulate: start from `Calibrated.prior` and search over `Calibrated.to_vector`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedlab.costs.base import CostModel, StepWork
from pagedlab.costs.calibrated import Calibrated
from pagedlab.errors import ConfigError

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """How close a cost model comes to measured steps. Errors are relative: (model - measured) / measured."""

    n: int
    """Steps compared."""
    r2: float
    """Share of the durations' variance that the model explains; nan if they are all the same."""
    mean_error: float
    """Signed: above 0 the model is too slow."""
    mean_abs_error: float
    p50: float
    """Half of the steps are closer than this, in absolute relative error; `p90` and `p99` alike."""
    p90: float
    p99: float
    worst: float

    @classmethod
    def of(cls, model: CostModel, works: Sequence[StepWork], durations_ps: Sequence[int]) -> FitReport:
        """Compare ``model`` with steps and their durations in picoseconds; those of the fit or, better, others."""
        measured = _durations(works, durations_ps)
        said = np.array([model.step_ps(work) for work in works], dtype=np.float64)
        relative = (said - measured) / measured
        size = np.abs(relative)
        spread = float(((measured - measured.mean()) ** 2).sum())
        p50, p90, p99 = (float(x) for x in np.percentile(size, (50, 90, 99)))
        return cls(
            n=len(measured),
            r2=1.0 - float(((said - measured) ** 2).sum()) / spread if spread else float("nan"),
            mean_error=float(relative.mean()),
            mean_abs_error=float(size.mean()),
            p50=p50,
            p90=p90,
            p99=p99,
            worst=float(size.max()),
        )

    def to_json(self) -> str:
        """Return the report as JSON, to be read by `from_json`. An undefined ``r2`` is null."""
        return json.dumps({**asdict(self), "r2": self.r2 if self.r2 == self.r2 else None}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> FitReport:
        """Read what `to_json` wrote; `ConfigError` says what is wrong with anything else."""
        try:
            data: Any = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"not a fit report: {error}") from None
        names = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ConfigError(f"not a fit report: it must have {', '.join(names)}")
        numbers: dict[str, Any] = {k: float("nan") if k == "r2" and v is None else v for k, v in data.items()}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"not a fit report: {name} must be a number, not {value!r}")
        return cls(**{**numbers, "n": int(numbers["n"])})

    def __repr__(self) -> str:
        return (
            f"FitReport(n={self.n}, r2={self.r2:.4f}, mean error {self.mean_error:+.2%}, "
            f"|error| mean {self.mean_abs_error:.2%}, p50 {self.p50:.2%}, p90 {self.p90:.2%}, "
            f"p99 {self.p99:.2%}, worst {self.worst:.2%})"
        )


def _durations(works: Sequence[StepWork], durations_ps: Sequence[int]) -> Array:
    if len(works) != len(durations_ps):
        raise ConfigError(f"{len(works)} steps have {len(durations_ps)} durations")
    if not works:
        raise ConfigError("no steps to compare with")
    measured = np.array(durations_ps, dtype=np.float64)
    if not (measured > 0).all():
        at = int(np.flatnonzero(~(measured > 0))[0])
        raise ConfigError(
            f"step {at} has duration {durations_ps[at]!r}; durations must be above 0 picoseconds"
        )
    return measured


def fit_steps(
    works: Sequence[StepWork],
    durations_ps: Sequence[int],
    *,
    prior: Calibrated | None = None,
    prior_sigma: float = 0.5,
    knee: str = "max",
) -> Calibrated:
    """Return the `Calibrated` that explains ``durations_ps`` (picoseconds) of ``works`` best.

    Minimises relative errors by Huber's loss (steps that were disturbed pull linearly, not squared), with no
    coefficient below zero. Where ``w`` turns into ``c1 T`` is scanned: everything else is linear once that is fixed.

    Steps of one run seldom tell all coefficients apart: if none is bound by compute, ``c0`` and ``w`` are one constant.
    ``prior`` settles what the data leave open. It is log-normal: ``prior_sigma`` is its uncertainty as a natural
    logarithm (0.5: a factor of 1.65 either way), and the more steps there are the less it weighs. From it come also
    ``c2``, which is fitted only if the prior has one, and the parameters that are not fitted. ``knee`` is ``"max"`` or
    ``"hypot"``.

    Raises `ConfigError` if there are no steps, a duration is not above 0, or lengths differ. Cost: some seconds for
    100,000 steps.
    """
    measured = _durations(works, durations_ps)
    if not prior_sigma > 0:
        raise ConfigError(f"prior_sigma must be above 0, not {prior_sigma}")
    base = (prior or Calibrated.from_params({})).clone(knee=knee)
    return _Fit(base, works, measured, prior_sigma if prior is not None else None).solve()


_UNITS = {"c0": 1e9, "w": 1e9, "c1": 1e6, "c2": 1e6, "c3": 1e3, "c4": 1e3, "c5": 1e6, "c6": 1e9}
"""Picoseconds in the unit of each coefficient."""
_HUBER = 1.345
"""In standard deviations, where squares become lines: 95% efficiency on normal noise (Huber 1981)."""


class _Fit:
    """One fit: the rows of the linear part, made once, and the column of the knee, made for each place it may be.

    The loss at a place is minus the log of a posterior, up to constants: Huber's loss of the relative errors over their
    spread, plus half the squares of the log ratios to the prior over its sigma. The spread is that of the best place so
    far.
    """

    def __init__(
        self, base: Calibrated, works: Sequence[StepWork], measured: Array, sigma: float | None
    ) -> None:
        self.base, self.measured = base, measured
        sums = np.array(
            [(w.prefill_tokens, w.prefill_pairs, w.decode_seqs, w.context_tokens) for w in works],
            dtype=np.float64,
        )
        chunked, pairs, decoding, context = sums.T
        self.tokens = chunked + decoding
        self.read = (self.tokens > 0) * np.array([self._share_read(int(t)) for t in self.tokens])
        columns = {
            "c0": np.ones(len(measured)),
            "c3": context,
            "c4": pairs,
            "c5": decoding,
            "c6": (chunked > 0).astype(np.float64),
        }
        if base.c2 > 0:
            columns["c2"] = self.tokens
        # c1 comes last: its column is the knee's. Rows are divided by what was measured, so that residuals are
        # relative errors.
        self.names = [*columns, "c1"]
        self.linear = np.column_stack([column * _UNITS[name] / measured for name, column in columns.items()])
        self.spread = 0.05
        self.trust = 0.0 if sigma is None else sigma**-2
        self.directions = np.eye(len(self.names))
        self.expected = np.array([getattr(base, name) for name in [*self.names, "w"]])

    def _share_read(self, tokens: int) -> float:
        """Return the share of ``w`` that a step of so many tokens reads."""
        base = self.base
        if not base.experts:
            return 1.0
        missed = (1.0 - base.experts_per_token / base.experts) ** tokens
        return 1.0 - base.expert_share * float(missed)

    def solve(self) -> Calibrated:
        places = np.geomspace(1.0, 2.0 * max(float(self.tokens.max()), 1.0), 40)
        if self.trust and self.base.c1 > 0 and self.base.w > 0:
            places = np.sort(np.append(places, 1e3 * self.base.w / self.base.c1))
        best = int(np.argmin([self.at(place)[0] for place in places]))
        low, high = np.log(places[max(0, best - 1)]), np.log(places[min(len(places) - 1, best + 1)])
        place = float(places[best])
        for _ in range(2):
            residual = self.at(place)[2]
            self.spread = max(1.4826 * float(np.median(np.abs(residual))), 1e-6)
            found = self._golden(float(low), float(high))
            place = min((place, found), key=lambda at: self.at(at)[0])
        values = {name: float(value) for name, value in zip(self.names, self.at(place)[1])}
        return self.base.clone(**values, w=values["c1"] * place / 1e3)

    def _golden(self, low: float, high: float) -> float:
        """Return where between exp(low) and exp(high) the loss is least, by golden-section search."""
        ratio = (5**0.5 - 1) / 2
        for _ in range(20):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            if self.at(float(np.exp(a)))[0] <= self.at(float(np.exp(b)))[0]:
                high = b
            else:
                low = a
        return float(np.exp((low + high) / 2))

    def at(self, place: float) -> tuple[float, Array, Array]:
        """Return (loss, coefficients, relative errors) with the knee at ``place`` tokens, where w = c1 * place."""
        reading, computing = place * self.read, self.tokens
        knee = np.hypot(reading, computing) if self.base.knee == "hypot" else np.maximum(reading, computing)
        rows = np.column_stack([self.linear, knee * _UNITS["c1"] / self.measured])
        # What the prior knows of: each coefficient, and w, which is c1 times the place.
        known = np.vstack([self.directions, np.eye(len(self.names))[-1] * (place / 1e3)])[self.expected > 0]
        expected = self.expected[self.expected > 0]
        weights, pull = np.full(len(rows), self.spread**-2), np.ones(len(expected))
        for _ in range(12):
            weighted, held = rows * weights[:, None], known * (pull * self.trust / expected**2)[:, None]
            found = nnls(weighted.T @ rows + held.T @ known, weighted.sum(axis=0) + held.T @ expected)
            residual: Array = rows @ found - 1.0
            size = np.abs(residual) / self.spread
            ratio = np.clip(known @ found / expected, 0.01, 100.0)
            # Reweighted least squares: squares with these weights have, at the fixed point, the slopes of Huber's loss
            # and of a squared logarithm.
            before = weights * self.spread**2, pull
            weights = np.minimum(1.0, _HUBER / np.maximum(size, 1e-12)) * self.spread**-2
            near = np.abs(ratio - 1) < 1e-6
            pull = np.where(near, 1.0, np.log(ratio) / (ratio * np.where(near, 1.0, ratio - 1)))
            after = weights * self.spread**2, pull
            if all(float(np.abs(new - old).max(initial=0.0)) < 1e-3 for old, new in zip(before, after)):
                break
        huber = np.where(size <= _HUBER, 0.5 * size**2, _HUBER * (size - 0.5 * _HUBER))
        return float(huber.sum() + 0.5 * self.trust * (np.log(ratio) ** 2).sum()), found, residual


def nnls(gram: Array, aim: Array) -> Array:
    """Return the x >= 0 that minimises x' gram x / 2 - aim' x, by active sets (Lawson & Hanson 1974, chapter 23).

    ``gram`` [k, k] is positive semidefinite: of a least-squares problem A x = b it is A'A, and ``aim`` [k] is A'b.
    """
    scale = np.sqrt(np.diag(gram))
    scale = np.where(scale > 0, scale, 1.0)
    matrix, goal = gram / np.outer(scale, scale), aim / scale
    x = np.zeros(len(goal))
    passive = np.zeros(len(goal), dtype=bool)
    enough = 1e-12 * float(np.abs(goal).max(initial=0.0))
    for _ in range(10 * len(goal)):
        gain = np.where(passive, -np.inf, goal - matrix @ x)
        if not float(gain.max()) > enough:
            break
        passive[int(gain.argmax())] = True
        while True:
            free = np.flatnonzero(passive)
            solution = np.linalg.lstsq(matrix[np.ix_(free, free)], goal[free], rcond=None)[0]
            if len(free) == 0 or float(solution.min()) > 0:
                x[:] = 0.0
                x[free] = solution
                break
            # Walk towards the solution until the first coefficient reaches zero, and leave that one out.
            falling = free[solution <= 0]
            shares = x[falling] / np.maximum(x[falling] - solution[solution <= 0], 1e-300)
            x[free] += float(shares.min()) * (solution - x[free])
            passive[falling[shares <= shares.min()]] = False
            x[~passive] = 0.0
    found: Array = x / scale
    return found
