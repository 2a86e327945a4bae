"""Engines that share a run's requests: vLLM's data parallelism, of which one engine is the simple case.

Each rank has a scheduler, seats and a pool of its own. A request goes to the rank with the least load when it arrives,
and whoever waits counts four times (vLLM's load balancer, ``DPLBAsyncMPClient``; its counts are up to 100 ms old, these
are not). Ranks of a dense model know nothing of each other. Those of a mixture of experts exchange tokens in every
layer, so they step together, and every step takes as long as the slowest rank's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pagedlab.config import Config
from pagedlab.costs import CostModel
from pagedlab.engine.clock import VirtualClock, to_ps
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import StepOrders, StepResult
from pagedlab.engine.request import Request
from pagedlab.engine.script import Script
from pagedlab.engine.sequence import Sequence as EngineSequence
from pagedlab.events import EventLog
from pagedlab.executors.simulated import SimulatedExecutor
from pagedlab.lab.steps import tables

Array = NDArray[np.float64]

WAITING_WEIGHS = 4
"""One that waits is as much load as so many that run."""


class _Rank(SimulatedExecutor):
    """An executor whose steps may have to wait for those of other ranks."""

    slowest: Callable[[int], int] | None = None
    """Takes how long this rank's part of a step is, and returns how long the step takes."""

    def execute(self, orders: StepOrders) -> StepResult:
        part = super().execute(orders)
        return part if self.slowest is None else StepResult([], duration_ps=self.slowest(part.duration_ps))


class Ranks:
    """One engine or several, and the requests that they serve."""

    def __init__(
        self,
        config: Config,
        cost: CostModel,
        scripts: dict[tuple[str, int], Script],
        *,
        ranks: int = 1,
        lockstep: bool = False,
    ) -> None:
        self.config = config
        self._executors = [_Rank(cost, outputs=scripts) for _ in range(ranks)]
        self.engines = [
            Engine(config, executor, clock=VirtualClock(), events=EventLog(enabled=False))
            for executor in self._executors
        ]
        self._lockstep = lockstep
        self._home: dict[str, Engine] = {}
        """Where each request is served."""

    def serve(self, requests: Iterable[Request], until: Sequence[str] | None = None) -> None:
        """Serve ``requests``, in order of arrival, to their end or to that of those that ``until`` names."""
        coming = deque(requests)
        if len(self.engines) == 1:  # it may know what comes, and leap
            while coming:
                self._send(coming.popleft())
        wanted = None if until is None else list(until)
        while self._step(coming):
            if wanted is not None and self._ended(wanted[-1]):
                wanted = [name for name in wanted if not self._ended(name)]
                if not wanted:
                    break

    def sequence(self, request_id: str) -> EngineSequence:
        """Return what became of a request (of one sample)."""
        (found,) = self._home[request_id].groups[request_id].sequences
        return found

    def _ended(self, name: str) -> bool:
        return name in self._home and not self._home[name].groups[name].unfinished

    # ---- serving -----------------------------------------------------------------------------------------------

    def _send(self, request: Request) -> None:
        engine = min(self.engines, key=_load)
        engine.add(request)
        self._home[request.request_id] = engine

    def _step(self, coming: deque[Request]) -> bool:
        """Do what comes next, somebody's arrival or a step; False if there is nothing."""
        if len(self.engines) == 1:
            return self.engines[0].step() > 0
        active = [i for i, engine in enumerate(self.engines) if engine.has_work]
        times = [self.engines[i].clock.now() for i in active]
        now = (max if self._lockstep else min)(times, default=None)
        if coming and (now is None or to_ps(coming[0].arrival) <= now):
            self._send(coming.popleft())
        elif now is None:
            return False
        elif self._lockstep:
            for i in active:
                self.engines[i].clock.wait_until(now)
            self._together(active, [])
        else:
            self.engines[active[times.index(now)]].step(1)
        return True

    def _together(self, ranks: list[int], parts: list[int]) -> None:
        """Let ``ranks`` take one step that is as long as the longest of their parts: each takes the next one's while it
        executes its own, so the last knows them all.
        """
        if not ranks:
            return
        first, *others = ranks

        def slowest(part: int) -> int:
            parts.append(part)
            self._together(others, parts)
            return max(parts)

        self._executors[first].slowest = slowest
        self.engines[first].step(1)

    # ---- looking at it -----------------------------------------------------------------------------------------

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens found in the prefix cache, of the rank that served them."""
        return sum(e.totals.hit_tokens for e in self.engines)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all who were admitted."""
        return sum(e.totals.prompt_tokens for e in self.engines)

    @property
    def preemptions(self) -> int:
        """How often somebody was preempted."""
        return sum(e.totals.preemptions for e in self.engines)

    def over_time(self) -> dict[str, Array]:
        """Return columns of one length, a row for every end of a step of any rank: ``time`` in seconds, ``running`` and
        ``waiting`` sequences of all ranks, ``blocks`` in use of all ranks, and ``share``, the mean over ranks of the
        share of the pool in use.
        """
        size = self.config.block_size
        columns = []
        for engine in self.engines:
            steps, memory = tables(engine.steps, 1)
            held = memory["stored"] + memory["reserved"] + memory["internal"]
            columns.append(
                {
                    "time": memory["time"],
                    "running": steps["running"],
                    "waiting": steps["waiting"],
                    "blocks": held / size,
                }
            )
        time = np.unique(np.concatenate([c["time"] for c in columns]))
        total: dict[str, Array] = {"time": time}
        for name in ("running", "waiting", "blocks"):
            total[name] = np.zeros(len(time))
            for c in columns:
                at = np.searchsorted(c["time"], time, side="right") - 1
                total[name] += np.where(at >= 0, c[name][np.maximum(at, 0)], 0) if len(c["time"]) else 0
        total["share"] = total["blocks"] / sum(e.cache.device.capacity for e in self.engines)
        return total


def _load(engine: Engine) -> int:
    return WAITING_WEIGHS * (len(engine.waiting) + len(engine.coming)) + len(engine.running)
