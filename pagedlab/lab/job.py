"""One run in the making, for `run` and `start` alike: requests made ready, an executor leased, the engine loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from pagedlab.config import Config
from pagedlab.engine.clock import Clock, StepClock, WallClock, to_seconds
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import Executor
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.errors import ConfigError, nearest
from pagedlab.events import EventLog
from pagedlab.lab.garbage import seldom_collected
from pagedlab.lab.models import SHELF
from pagedlab.lab.vocabulary import tokenise
from pagedlab.workloads import Workload, prompts

if TYPE_CHECKING:
    from pagedlab.lab.results import Run

WorkloadLike = Workload | Sequence[str] | Sequence[Sequence[int]] | Sequence[Request]
"""A workload, or a list of prompts (texts or token ids) or requests."""

CLOCKS = ("wall", "step")
ARRIVALS = ("as-given", "now")


class RunClock(WallClock):
    """Real time that can be held: while a person has paused a run, nothing ages."""

    def __init__(self) -> None:
        super().__init__()
        self._held_at: int | None = None

    def now(self) -> int:
        """Return picoseconds since the start, held time left out."""
        return super().now() if self._held_at is None else self._held_at

    def hold(self) -> None:
        """Stop the time."""
        self._held_at = self.now()

    def go_on(self) -> None:
        """Let it run again."""
        if self._held_at is not None:
            held, self._held_at = self._held_at, None
            self._start += (super().now() - held) // 1000


class Job:
    """An engine with its requests added and its executor leased. `close` gives the executor back."""

    def __init__(
        self,
        config: Config,
        workload: WorkloadLike,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        executor: Executor | None = None,
        clock: str | Clock = "wall",
        fast: bool = True,
        arrivals: str = "as-given",
        events: bool = True,
        skip_ahead: bool = True,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(config, Config):
            raise ConfigError(
                f"config must be a pagedlab.Config, not {config!r}; see Config.preset and Config.load"
            )
        self.config = config
        self.workload = as_workload(workload)
        change = _sampling_changes(
            {**({} if max_tokens is None else {"max_tokens": max_tokens}), **(overrides or {})}
        )
        if arrivals not in ARRIVALS:
            raise ConfigError(f"arrivals must be one of {', '.join(ARRIVALS)}, not {arrivals!r}")
        engine_clock = _clock(clock)
        self._leased = executor is None
        self.executor: Any = SHELF.lease(config, fast=fast) if executor is None else executor
        try:
            requests = [_ready(r, sampling, change, arrivals == "now") for r in self.workload]
            requests = tokenise(requests, self.executor, content_ids=self.workload.content_ids)
            self.engine = Engine(
                config,
                self.executor,
                clock=engine_clock,
                events=EventLog(enabled=events),
                skip_ahead=skip_ahead,
                knows_future=True,
            )
            with seldom_collected():
                for request in requests:
                    self.engine.add(request)
            # The run begins now: making requests ready is no part of it.
            self.engine.clock.start()
        except BaseException:
            self.close()
            raise

    def rest(self) -> float:
        """Return real seconds until there is anything to do; 0 if there is work, or the clock is not a real one.

        A prefetcher whose time has come acts first.
        """
        if not isinstance(self.engine.clock, WallClock) or (until := self.engine.rest()) is None:
            return 0.0
        return max(0.0, to_seconds(until - self.engine.clock.now()))

    def result(self, *, interrupted: bool, ended: bool = False) -> Run:
        """Return what there is; if nothing more will come (``ended``), its tables are built when they are asked for."""
        from pagedlab.lab.results import Run

        return Run.of(self, interrupted=interrupted, ended=ended)

    def close(self) -> None:
        """Give a leased executor back. May be called twice."""
        if self._leased:
            self._leased = False
            SHELF.give_back(self.executor)


def as_workload(given: WorkloadLike) -> Workload:
    """Return ``given`` as a workload; raises `WorkloadError` for what is none."""
    if isinstance(given, Workload):
        return given
    if isinstance(given, Sequence) and given and all(isinstance(r, Request) for r in given):
        return Workload("requests", tuple(given), "Requests as given.")  # type: ignore[arg-type]
    return prompts(given)  # type: ignore[arg-type]


def wait_briefly(seconds: float) -> None:
    """Sleep, but not so long that a stop would go unnoticed."""
    time.sleep(min(seconds, 0.05))


def _ready(request: Request, sampling: SamplingParams | None, change: dict[str, Any], now: bool) -> Request:
    wanted = request.sampling if sampling is None else sampling
    if change:
        wanted = replace(wanted, **change)
    arrival = 0.0 if now else request.arrival
    if wanted is request.sampling and arrival == request.arrival:
        return request
    return replace(request, sampling=wanted, arrival=arrival)


def _sampling_changes(change: dict[str, Any]) -> dict[str, Any]:
    known = [f.name for f in fields(SamplingParams)]
    for key in change:
        if key not in known:
            raise ConfigError(
                f"no sampling parameter {key!r}; known: {', '.join(known)}{nearest(key, known)}"
            )
    replace(SamplingParams(), **change)  # out of range is out of range, even if there is no request
    return change


def _clock(clock: str | Clock) -> Clock:
    if clock == "wall":
        return RunClock()
    if clock == "step":
        return StepClock()
    if isinstance(clock, str):
        raise ConfigError(f"clock must be one of {', '.join(CLOCKS)}, not {clock!r}{nearest(clock, CLOCKS)}")
    return clock
