"""`run`: a configuration, a workload, and a person who may press Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Any, Protocol

from pagedlab.config import Config
from pagedlab.engine.clock import Clock
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import Executor
from pagedlab.engine.request import SamplingParams
from pagedlab.lab.bar import bar
from pagedlab.lab.garbage import seldom_collected
from pagedlab.lab.job import Job, WorkloadLike, as_workload, wait_briefly
from pagedlab.lab.results import Run

Progress = bool | None | Callable[[Engine], None]
"""None: a bar where somebody watches; True, False: always, never; or a function called after every step."""

_WARM_UP_TOKENS = 3


def run(
    config: Config,
    workload: WorkloadLike,
    *,
    max_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    executor: Executor | None = None,
    clock: str | Clock = "wall",
    progress: Progress = None,
    check: bool = False,
    fast: bool = True,
    arrivals: str = "as-given",
    events: bool = True,
    **sampling_overrides: Any,
) -> Run:
    """Serve ``workload`` with the real model that ``config`` names, and return what happened.

    ``workload`` is a `Workload`, or a list of prompts (texts or lists of token ids) or requests. ``max_tokens``
    and further keyword arguments (``temperature=0.8, n=4, ...``) change those fields of every request's sampling;
    ``sampling`` replaces it as a whole. ``arrivals="now"`` lets all requests come at once. ``clock="step"`` makes
    step k happen at k seconds. ``executor`` takes the place of the model (then ``layout`` and ``kernel`` are its
    own). ``fast`` False keeps the model's own linear layers. ``check`` proves the cache's books after every step.
    ``events`` False keeps no log.

    Ctrl-C ends the run after the step at hand: what is there is returned, and ``interrupted`` is True. A second
    one raises `KeyboardInterrupt`. A request that can never fit is refused, says so in ``run.requests``, and the
    others go on.

    >>> import pagedlab as pl
    >>> from pagedlab.executors.stub import StubExecutor
    >>> pl.run(pl.Config(), [[1, 2, 3]], max_tokens=4, executor=StubExecutor()).tokens
    [[46, 15, 21, 63]]
    """
    job = Job(
        config,
        workload,
        max_tokens=max_tokens,
        sampling=sampling,
        executor=executor,
        clock=clock,
        fast=fast,
        arrivals=arrivals,
        events=events,
        overrides=sampling_overrides,
    )
    return drive(job, progress=progress, check=check)


def drive(
    job: Job,
    *,
    progress: Progress = None,
    check: bool = False,
    max_steps: int | None = None,
    ended: bool = False,
) -> Run:
    """Step ``job`` to its end or to Ctrl-C, and return what there is. ``max_steps`` at once where time is virtual."""
    engine = job.engine
    watch = progress if callable(progress) else _bar(progress, job.workload.num_sequences)
    try:
        with StopOnInterrupt() as stop, seldom_collected():
            while engine.has_work and not stop.asked:
                if (idle := job.rest()) > 0:
                    wait_briefly(idle)
                    continue
                if max_steps is None:
                    engine.step()
                else:
                    engine.run(max_steps)
                if check:
                    engine.check()
                if watch is not None:
                    watch(engine)
            return job.result(interrupted=stop.asked and engine.has_work, ended=ended)
    finally:
        if isinstance(watch, _Bar):
            watch.close()
        job.close()


def warm_up(config: Config, workload: WorkloadLike, *, fast: bool = True) -> None:
    """Serve the workload's two first requests for a few tokens, so that compiling kernels is not measured."""
    given = as_workload(workload)
    first = replace(given, requests=given.requests[:2])
    job = Job(config, first, max_tokens=_WARM_UP_TOKENS, fast=fast, arrivals="now", events=False)
    try:
        job.engine.run()
    finally:
        job.close()


class StopOnInterrupt:
    """While it is entered, the first SIGINT sets ``asked`` and the second raises `KeyboardInterrupt`.

    Only the main thread can take signals; elsewhere ``asked`` stays False.
    """

    def __init__(self) -> None:
        self.asked = False
        self._mine = threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> StopOnInterrupt:
        if self._mine:
            self._before = signal.signal(signal.SIGINT, self._heard)
        return self

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            # None: whoever set the handler did not do so from Python, and Python cannot put it back.
            signal.signal(signal.SIGINT, signal.default_int_handler if self._before is None else self._before)


class _Tqdm(Protocol):
    def update(self, n: int) -> Any: ...
    def set_postfix_str(self, s: str) -> Any: ...
    def close(self) -> Any: ...


class _Bar:
    """Sequences finished, with output tokens beside it."""

    def __init__(self, bar: _Tqdm) -> None:
        self._bar = bar
        self._shown = 0

    def __call__(self, engine: Engine) -> None:
        done = len(engine.finished)
        if done > self._shown:
            self._bar.set_postfix_str(f"{engine.totals.output_tokens} tokens")
            self._bar.update(done - self._shown)
            self._shown = done

    def close(self) -> None:
        self._bar.close()


def _bar(progress: bool | None, total: int) -> _Bar | None:
    shown = bar(progress, total, "seq")
    return None if shown is None else _Bar(shown)
