"""Prefetchers that know who comes back: sessions after their think time, agents when it is their turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import e, inf
from typing import NamedTuple

from pagedlab.policies.base import param
from pagedlab.policies.prefetch import Load, Prefetch, Residency, Waiting, loads_of
from pagedlab.registry import register


class Pauses:
    """Running mean and mean absolute deviation of think times, in seconds; old ones fade.

    Of a single one nothing is known but its size: it is taken for exponential, whose deviation is 2 / e of the mean.
    """

    __slots__ = ("count", "deviation", "mean")

    def __init__(self) -> None:
        self.count, self.mean, self.deviation = 0, 0.0, 0.0

    def take(self, seconds: float, weight: float) -> None:
        """Let ``seconds`` count for ``weight``, or as one among equals while there are fewer than 1 / weight."""
        self.count += 1
        error = seconds - self.mean
        if self.count == 1:
            self.mean, self.deviation = seconds, 2 / e * seconds
            return
        weight = max(weight, 1 / self.count)
        self.mean += weight * error
        self.deviation += weight * (abs(error) - self.deviation)


class Pause(NamedTuple):
    """A session whose answer is finished and whose next turn has not come."""

    since: float
    due: float
    sequence: Waiting


@register("prefetch", "think-time")
class ThinkTime(Prefetch):
    """Predict when a session's next turn comes, and load its blocks shortly before.

    Think time is the time from the end of an answer to the session's next arrival. Its mean and mean deviation are
    estimated per session and over all; a session's own count ``n / (n + 2)`` after n turns. A session falls due
    ``deviations`` mean deviations, and at least ``lead`` seconds, before the mean has passed: a regular one late, one
    whose turns are hard to foresee soon. From then on its blocks are kept up, the session that fell due first before
    the others, until it comes, or until ``patience`` mean deviations after the mean, when it is taken to have ended.
    They do not take the place of a session's that falls due within its mean deviation. Nothing is predicted before the
    first think time of any session was seen. O(log sessions) an event, O(blocks of sessions) a plan.

    The estimate is that of round-trip times by Jacobson (SIGCOMM 1988). Loading a conversation from the host before its
    turn is served is CachedAttention's (Gao et al., USENIX ATC 2024), which waits until the request is queued.
    """

    deviations: float = param(1.25, low=0.0, high=100.0, help="how many mean deviations before the mean")
    lead: float = param(0.5, low=0.0, high=1e6, unit="s", help="and how long before it at least")
    smoothing: float = param(0.2, low=0.01, high=1.0, help="weight of a new think time in the estimates")
    patience: float = param(
        3.0, low=0.0, high=1e6, help="mean deviations after the mean to wait for a session"
    )
    capacity: int = param(4096, low=1, unit="sessions", help="sessions remembered")
    evict: bool = param(True, help="take the place of cached blocks when none is free")

    def reset(self) -> None:
        self._overall = Pauses()
        self._own: OrderedDict[str, Pauses] = OrderedDict()
        self._pauses: dict[str, Pause] = {}
        self._order: list[tuple[float, str]] = []
        """A heap of when sessions fall due; an entry counts if the pause still says so."""
        self._due: dict[str, Pause] = {}
        """Sessions whose time has come."""

    def arrived(self, sequence: Waiting) -> None:
        session = sequence.session
        if session is None or session not in self._pauses:
            return
        thought = self.now - self._pauses.pop(session).since
        self._due.pop(session, None)
        self._overall.take(thought, self.smoothing)
        self._own.setdefault(session, Pauses()).take(thought, self.smoothing)
        self._own.move_to_end(session)
        if len(self._own) > self.capacity:
            self._own.popitem(last=False)

    def finished(self, sequence: Waiting) -> None:
        session = sequence.session
        if session is None:
            return
        self._drop(session)
        due = inf
        if self._overall.count:
            mean, deviation = self.expected(session)
            due = self.now + max(0.0, mean - max(self.deviations * deviation, self.lead))
            heappush(self._order, (due, session))
        self._pauses[session] = Pause(self.now, due, sequence)
        if len(self._pauses) > self.capacity:
            self._drop(next(iter(self._pauses)))
        if len(self._order) > 2 * len(self._pauses) + 64:
            self._order = [(pause.due, s) for s, pause in self._pauses.items() if pause.due < inf]
            heapify(self._order)

    def _drop(self, session: str) -> None:
        self._pauses.pop(session, None)
        self._due.pop(session, None)

    def expected(self, session: str) -> tuple[float, float]:
        """Return mean and mean deviation of the think time to be expected of ``session``, in seconds."""
        own, overall = self._own.get(session), self._overall
        if own is None:
            return overall.mean, overall.deviation
        share = own.count / (own.count + 2)
        return (
            share * own.mean + (1 - share) * overall.mean,
            share * own.deviation + (1 - share) * overall.deviation,
        )

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        now = self.now
        while (at := self.wake_at()) is not None and at <= now:
            _, session = heappop(self._order)
            self._due[session] = self._pauses[session]
        for session, pause in list(self._due.items()):
            mean, deviation = self.expected(session)
            if now > max(pause.due, pause.since + mean + self.patience * deviation):
                self._drop(session)
        found = loads_of((pause.sequence for pause in self._due.values()), residency, self.evict)
        if found and self.evict:
            for session, pause in self._pauses.items():
                if session not in self._due and pause.due - now <= self.expected(session)[1]:
                    residency.prefix(pause.sequence)
        return found

    def wake_at(self) -> float | None:
        order = self._order
        while order and not self._counts(*order[0]):
            heappop(order)
        return order[0][0] if order else None

    def _counts(self, due: float, session: str) -> bool:
        pause = self._pauses.get(session)
        return pause is not None and pause.due == due and session not in self._due


class Turn(NamedTuple):
    """An agent's blocks, and the step of its session at which they are needed again."""

    step: int
    sequence: Waiting


@register("prefetch", "agent-step")
class AgentStep(Prefetch):
    """Load the blocks of the agents with the fewest steps to their next execution, ahead of time.

    A session is one workflow, and its step the latest that arrived (`Hints.agent_step`). A request may say at which
    step its agent runs again (`Hints.next_step`); without, it runs again after ``cycle`` steps (1: every step builds on
    all before it). Agents with at most ``horizon`` steps to go are loaded, nearest first, among equals the one whose
    session moved last. O(log agents) an event, O(agents + blocks of the nearest) a plan.

    Pan et al., KVFlow: Efficient Prefix Caching for Accelerating LLM-Based Multi-Agent Workflows, NeurIPS 2025, which
    also evicts by that number (eviction `kvflow`).
    """

    horizon: int = param(
        1, low=1, unit="steps", help="how many steps before its execution an agent is loaded"
    )
    cycle: int = param(
        1, low=1, unit="steps", help="steps after which an agent has its turn again, unless it says so"
    )
    capacity: int = param(1024, low=1, unit="sessions", help="workflows remembered")
    evict: bool = param(True, help="take the place of cached blocks when none is free")

    def reset(self) -> None:
        self._steps: OrderedDict[str, int] = OrderedDict()
        """The current step of each workflow, the one that moved last at the end."""
        self._turns: dict[str, dict[int, Turn]] = {}
        """For each workflow what is needed at which later step, by agent."""

    def arrived(self, sequence: Waiting) -> None:
        session, step = sequence.session, sequence.origin.agent_step
        if session is None or step is None:
            return
        self._steps[session] = step
        self._steps.move_to_end(session)
        turns = self._turns.setdefault(session, {})
        for at in [at for at in turns if at <= step]:
            del turns[at]
        if len(self._steps) > self.capacity:
            oldest, _ = self._steps.popitem(last=False)
            del self._turns[oldest]

    def finished(self, sequence: Waiting) -> None:
        session, origin = sequence.session, sequence.origin
        if session is None or origin.agent_step is None or session not in self._steps:
            return
        again = origin.agent_step + self.cycle if origin.next_step is None else origin.next_step
        if again > self._steps[session]:
            self._turns[session][again] = Turn(again, sequence)

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        nearest = sorted(
            (
                (turn.step - step, -moved, turn.sequence)
                for moved, (session, step) in enumerate(self._steps.items())
                for turn in self._turns[session].values()
                if turn.step - step <= self.horizon
            ),
            key=lambda entry: entry[:2],
        )
        return loads_of((entry[2] for entry in nearest), residency, self.evict)
