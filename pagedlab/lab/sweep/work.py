"""The points of a sweep as they are worked off: what each one serves, with which options, and what came out.

`Work` is all that a process needs to know; it is sent to each of them once.
"""

from __future__ import annotations

import inspect
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from pagedlab.config import Config
from pagedlab.engine.engine import Engine
from pagedlab.errors import ConfigError, WorkloadError
from pagedlab.lab import session
from pagedlab.lab.accesses import Accesses, accesses
from pagedlab.lab.compare import _row
from pagedlab.lab.replay import make_eviction, replay
from pagedlab.lab.replayed import Replay
from pagedlab.lab.results import Run
from pagedlab.lab.simulate import simulate
from pagedlab.lab.sweep.identity import described_config, plain
from pagedlab.policies.base import Policy
from pagedlab.workloads import Workload

Measure = Callable[[Any], Any]
"""A number of one's own: a function of the `Run` or `Replay`."""

_HELD = 2
"""Workloads that a process keeps at hand."""
_LONGEST_ERROR = 500


@dataclass(frozen=True)
class Source:
    """A workload as it was given: itself, or the function that makes it."""

    title: str
    given: Workload | Accesses | Callable[..., Workload]
    takes: tuple[str, ...] = ()
    """Parameters of the function; a workload by itself has none."""
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One of the workloads that a sweep serves: a source, the parameters of its function, and how fast it comes."""

    source: Source
    params: Mapping[str, Any]
    rate: float | None = None
    scale_rate: float | None = None

    def make(self) -> Workload | Accesses:
        """Return the workload; `WorkloadError` if there is none with these parameters."""
        given = self.source.given
        if isinstance(given, Workload | Accesses):
            made: Workload | Accesses = given
        else:
            try:
                inspect.signature(given).bind(**self.params)
            except TypeError as error:
                raise WorkloadError(f"workload {self.source.title!r}: {error}") from None
            made = given(**self.params)
        if not isinstance(made, Workload | Accesses):
            raise WorkloadError(f"{self.source.title!r} made {type(made).__name__}, which is no workload")
        if self.rate is None and self.scale_rate is None:
            return made
        if isinstance(made, Accesses):
            raise WorkloadError(f"{self.source.title}: block accesses have no rate; give the workload")
        if self.rate is not None:
            made = at_rate(made, self.rate)
        if self.scale_rate is not None:
            made = made.scale_rate(self.scale_rate)
        return made

    @property
    def seed(self) -> Any:
        """The seed that the workload's function was given; None if it takes none."""
        return self.params.get("seed", self.source.defaults.get("seed"))


def at_rate(workload: Workload, rate: float) -> Workload:
    """Return the same requests arriving at ``rate`` a second on average; those that follow another one do not count.

    Raises `WorkloadError` if they come all at once, or the rate is no number above 0.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise WorkloadError(f"rate must be above 0 requests a second, not {rate!r}")
    arrivals = [r.arrival for r in workload if r.follows is None]
    span = max(arrivals) - min(arrivals) if arrivals else 0.0
    if span <= 0:
        raise WorkloadError(f"{workload.name}: its requests come all at once, so they have no rate to change")
    return workload.scale_rate(rate * span / (len(arrivals) - 1))


class Job(NamedTuple):
    """What one point serves, and how."""

    config: Config
    options: dict[str, Any]
    variant: int


class Outcome(NamedTuple):
    """What came out of one point. ``measures`` is empty if it failed."""

    measures: dict[str, Any]
    error: str | None
    seconds: float
    """Wall time of the run, simulation or replay alone."""
    config: dict[str, Any] | None
    """The configuration as it was served, where that says more than the one that was asked for."""


class Work:
    """The jobs of a sweep, and what they share."""

    def __init__(
        self,
        how: str,
        jobs: list[Job],
        variants: list[Variant],
        measures: Mapping[str, Measure],
        slo: dict[str, float] | None,
    ) -> None:
        self.how = how
        self.jobs = jobs
        self.variants = variants
        self.measures = dict(measures)
        self.slo = slo
        self._held: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": OrderedDict()}

    def policies(self) -> Iterator[Policy]:
        """Return every policy object of the jobs."""
        for job in self.jobs:
            for value in (*vars(job.config).values(), *job.options.values()):
                if isinstance(value, Policy):
                    yield value

    def workload(self, variant: int) -> Workload | Accesses:
        """Return a workload, made anew if it was not among the last ones."""
        made: Workload | Accesses = self._hold((variant,), self.variants[variant].make)
        return made

    def _hold(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._held:
            while len(self._held) >= 2 * _HELD:
                self._held.popitem(last=False)
            self._held[key] = make()
        self._held.move_to_end(key)
        return self._held[key]

    def serve(self, number: int) -> Outcome:
        """Work off one job. What goes wrong is its outcome; `KeyboardInterrupt` if somebody stopped it."""
        job = self.jobs[number]
        began = time.perf_counter()
        try:
            given = self.workload(job.variant)
            began = time.perf_counter()
            if self.how == "replay":
                return self._replayed(job, given)
            if isinstance(given, Accesses):
                raise ConfigError("block accesses can only be replayed")
            if self.how == "run":
                if job.options.get("executor") is None:
                    session.warm_up(job.config, given, fast=job.options.get("fast", True))
                began = time.perf_counter()
                done = session.run(job.config, given, progress=_heed, **job.options)
            else:
                done = simulate(job.config, given, progress=_heed, **job.options)
            seconds = time.perf_counter() - began
            if done.interrupted:
                raise KeyboardInterrupt
            own = {name: _number(name, f(done)) for name, f in self.measures.items()}
            return Outcome(of_run(done, self.slo) | own, None, seconds, described_config(done.config))
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_ERROR]
            text = text.encode("utf-8", "replace").decode()
            return Outcome({}, text, time.perf_counter() - began, None)

    def _replayed(self, job: Job, given: Workload | Accesses) -> Outcome:
        options = dict(job.options)
        size = options.pop("block_size", None)
        trace = self._hold((job.variant, size), lambda: accesses(given, size))
        began = time.perf_counter()
        eviction = make_eviction(job.config.eviction)  # type: ignore[arg-type]
        done = replay(trace, eviction, job.config.num_blocks, progress=False, **options)
        seconds = time.perf_counter() - began
        if done.interrupted:
            raise KeyboardInterrupt
        own = {name: _number(name, f(done)) for name, f in self.measures.items()}
        return Outcome(of_replay(done) | own, None, seconds, None)


def _heed(engine: Engine) -> None:
    """Raise `KeyboardInterrupt` if the run noted Ctrl-C, even after its last step: the sweep is to end, too."""
    stop = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(stop, session.StopOnInterrupt) and stop.asked:
        raise KeyboardInterrupt


def of_run(run: Run, slo: dict[str, float] | None = None) -> dict[str, Any]:
    """Return the numbers of a run as `Comparison` shows them; goodput too if there is a service level.

    What is called as a field of the configuration says what the run used in the end, and is called ``..._used``.
    """
    row = {k: plain(v) for k, v in _row("", run, slo).items() if k not in ("config", "interrupted")}
    known = {f.name for f in fields(Config)}
    return {f"{k}_used" if k in known else k: v for k, v in row.items()}


def of_replay(done: Replay) -> dict[str, Any]:
    """Return the numbers of a replay: of all accesses, and of its requests.

    ``request_hit_ratio`` is the mean over requests of the share of its blocks that was found; ``requests_hit`` and
    ``requests_missed`` count those of which every block was found, or none.
    """
    found = done.request_hits
    wanted = [len(r.keys) for r in done.trace.requests[: len(found)]]
    return {
        **done.row,
        "requests": len(found),
        "request_hit_ratio": sum(h / n for h, n in zip(found, wanted) if n) / sum(map(bool, wanted)),
        "requests_hit": sum(h == n > 0 for h, n in zip(found, wanted)),
        "requests_missed": sum(h == 0 < n for h, n in zip(found, wanted)),
    }


def _number(name: str, value: Any) -> Any:
    value = plain(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"measure {name!r} must be a number, a text or None, not {type(value).__name__}")
