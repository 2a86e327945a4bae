"""`start`: a run that goes on in the background of a notebook, to be watched, paused and stopped."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from typing import Any

from pagedlab.config import Config
from pagedlab.engine.clock import Clock
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import Executor
from pagedlab.engine.request import SamplingParams
from pagedlab.errors import PagedLabError
from pagedlab.lab.job import Job, RunClock, WorkloadLike
from pagedlab.lab.results import Run
from pagedlab.lab.snapshot import Snapshot, snapshot

StepCallback = Callable[["Live"], None]


class Live:
    """A run as an asyncio task: one step, then everybody else's turn. Made by `start`.

    Between two steps the engine is at rest, and only then do callbacks, `snapshot` and `cancel` see it.
    """

    def __init__(self, job: Job, *, delay: float, check: bool) -> None:
        self._job = job
        self.delay = delay
        """Seconds to wait after each step, so that a person can follow; the run's clock stands still meanwhile."""
        self._check = check
        self._callbacks: list[StepCallback] = []
        self._stopped = False
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._run: Run | None = None
        self._error: BaseException | None = None
        self._task = asyncio.get_running_loop().create_task(self._loop())

    @property
    def engine(self) -> Engine:
        """The engine; look, but let the task step it."""
        return self._job.engine

    @property
    def done(self) -> bool:
        """True once the run has ended, been stopped or failed."""
        return self._run is not None or self._error is not None

    @property
    def paused(self) -> bool:
        """True while the run is held."""
        return not self._resumed.is_set()

    @property
    def error(self) -> BaseException | None:
        """What ended the run before its time; `wait` raises it."""
        return self._error

    async def wait(self) -> Run:
        """Return the run once it has ended; raises what went wrong in it."""
        await asyncio.shield(self._task)
        if self._error is not None:
            raise self._error
        assert self._run is not None
        return self._run

    def stop(self) -> None:
        """End the run after the step at hand. What is there is kept: `wait` returns it."""
        self._stopped = True
        self._resumed.set()

    def pause(self) -> None:
        """Hold the run, and its clock, after the step at hand."""
        if not self.done:
            self._resumed.clear()

    def resume(self) -> None:
        """Go on."""
        self._resumed.set()

    def cancel(self, request_id: str) -> bool:
        """End one request; False if it is unknown or has ended."""
        return not self.done and self.engine.cancel(request_id)

    def on_step(self, callback: StepCallback) -> Callable[[], None]:
        """Call ``callback(live)`` after every step and once at the end; returns a function that takes it off again."""
        self._callbacks.append(callback)

        def remove() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return remove

    def snapshot(self) -> Snapshot:
        """Return one code per device block, with a legend."""
        return snapshot(self.engine)

    async def _loop(self) -> None:
        job, engine = self._job, self._job.engine
        try:
            # The one who called `start` gets to look, or to add callbacks, before anything happens.
            await asyncio.sleep(0)
            while engine.has_work and not self._stopped:
                if self.paused:
                    await self._held(self._resumed.wait())
                    continue
                if (idle := job.rest()) > 0:
                    await asyncio.sleep(min(idle, 0.05))
                    continue
                engine.step()
                if self._check:
                    engine.check()
                self._tell()
                if self.delay > 0:
                    await self._held(asyncio.sleep(self.delay))
                else:
                    await asyncio.sleep(0)
            self._run = job.result(interrupted=self._stopped and engine.has_work)
        except BaseException as error:
            self._error = error
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            job.close()
            if self._error is None:
                self._tell_the_end()

    def _tell(self) -> None:
        for callback in tuple(self._callbacks):
            callback(self)

    def _tell_the_end(self) -> None:
        # The run is safe by now: a callback that fails here costs nothing but its own words.
        for callback in tuple(self._callbacks):
            try:
                callback(self)
            except Exception:
                traceback.print_exc()

    async def _held(self, wait: Any) -> None:
        clock = self.engine.clock
        if isinstance(clock, RunClock):
            clock.hold()
        try:
            await wait
        finally:
            if isinstance(clock, RunClock):
                clock.go_on()

    def __repr__(self) -> str:
        state = "failed" if self._error else "done" if self.done else "paused" if self.paused else "running"
        engine = self.engine
        queue = f"{len(engine.running)} running, {len(engine.waiting)} waiting"
        return f"<live run, {state}: step {len(engine.steps)}, {queue}>"


def start(
    config: Config,
    workload: WorkloadLike,
    *,
    max_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    executor: Executor | None = None,
    clock: str | Clock = "wall",
    delay: float = 0.0,
    check: bool = False,
    fast: bool = True,
    arrivals: str = "as-given",
    events: bool = True,
    **sampling_overrides: Any,
) -> Live:
    """Begin a run in the background of a notebook and return at once; arguments as those of `run`.

    ::

        live = pl.start(cfg, pl.workloads.chat())
        run = await live.wait()          # or, from another cell: live.stop()

    Raises `PagedLabError` outside an event loop (JupyterLab has one running; a script takes `run`).
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise PagedLabError(
            "pl.start needs a running event loop, as a notebook has; in a script use pl.run"
        ) from None
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
    return Live(job, delay=delay, check=check)
