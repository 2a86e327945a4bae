"""Prefetchers that know who comes back: sessions after their think time, agents when it is their turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import log
from typing import NamedTuple

from pagedlab.policies.base import param
from pagedlab.policies.prefetch import Load, Prefetch, Residency, Waiting, loads_of
from pagedlab.registry import register


class Mean:
    """A running mean in which old values fade."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count, self.value = 0, 0.0

    def take(self, value: float, weight: float) -> None:
        """Let ``value`` count for ``weight``, or as one among equals while there are fewer than 1 / weight."""
        self.count += 1
        self.value += max(weight, 1 / self.count) * (value - self.value)


class Pause(NamedTuple):
    """A session whose answer is finished and whose next turn has not come."""

    since: float
    due: float
    sequence: Waiting


@register("prefetch", "think-time")
class ThinkTime(Prefetch):
    """Predict when a session's next turn comes, and load its blocks shortly before.

    Think time is the time from the end of an answer to the session's next arrival. Its mean is estimated per session
    and over all, exponentially weighted; a session's own counts ``n / (n + 2)`` after n turns. Taken as exponentially
    distributed, ``quantile`` of the turns come before ``-ln(1 - quantile) · mean``: from then on the session's blocks
    are kept up, the session that fell due first before the others, until it comes, or has stayed away for
    ``patience`` means. They never take the place of another session's that is still waited for. Nothing is predicted
    before the first think time of any session was seen. O(log sessions) an event, O(blocks of sessions) a plan.

    The idea of loading a conversation before its next turn is CachedAttention's (Gao et al., USENIX ATC 2024), which
    waits for the request to be queued.
    """

    quantile: float = param(
        0.1, low=0.0, high=0.99, help="share of the turns that may come before their blocks"
    )
    smoothing: float = param(0.2, low=0.01, high=1.0, help="weight of a new think time in the running means")
    patience: float = param(3.0, low=0.0, high=1e6, unit="means", help="how long to wait for a session")
    capacity: int = param(4096, low=1, unit="sessions", help="sessions remembered")
    evict: bool = param(True, help="take the place of cached blocks when none is free")

    def reset(self) -> None:
        self._overall = Mean()
        self._means: OrderedDict[str, Mean] = OrderedDict()
        self._pauses: dict[str, Pause] = {}
        self._order: list[tuple[float, str]] = []
        """A heap of when sessions fall due; an entry counts if the pause still says so."""
        self._due: dict[str, Pause] = {}
        """Sessions whose time has come."""

    def arrived(self, sequence: Waiting) -> None:
        session = sequence.session
        self._due.pop(session or "", None)
        pause = self._pauses.pop(session or "", None)
        if session is None or pause is None:
            return
        thought = self.now - pause.since
        self._overall.take(thought, self.smoothing)
        self._means.setdefault(session, Mean()).take(thought, self.smoothing)
        self._means.move_to_end(session)
        while len(self._means) > self.capacity:
            self._means.popitem(last=False)

    def finished(self, sequence: Waiting) -> None:
        session = sequence.session
        if session is None or not self._overall.count:
            if session is not None:
                self._remember(session, Pause(self.now, float("inf"), sequence))
            return
        due = self.now - log(1 - self.quantile) * self.expected(session)
        self._remember(session, Pause(self.now, due, sequence))
        heappush(self._order, (due, session))
        if len(self._order) > 2 * len(self._pauses) + 64:
            self._order = [(pause.due, s) for s, pause in self._pauses.items()]
            heapify(self._order)

    def _remember(self, session: str, pause: Pause) -> None:
        self._pauses.pop(session, None)
        self._due.pop(session, None)
        self._pauses[session] = pause
        if len(self._pauses) > self.capacity:
            oldest = next(iter(self._pauses))
            del self._pauses[oldest]
            self._due.pop(oldest, None)

    def expected(self, session: str) -> float:
        """Return the mean think time to be expected of ``session``, in seconds."""
        own = self._means.get(session)
        if own is None:
            return self._overall.value
        return (own.count * own.value + 2 * self._overall.value) / (own.count + 2)

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        now, order = self.now, self._order
        while order and order[0][0] <= now:
            due, session = heappop(order)
            pause = self._pauses.get(session)
            if pause is not None and pause.due == due:
                self._due[session] = pause
        for session, pause in list(self._due.items()):
            if now - pause.since > self.patience * self.expected(session) and now > pause.due:
                del self._due[session], self._pauses[session]
        found = loads_of((pause.sequence for pause in self._due.values()), residency, self.evict)
        if found and self.evict:
            # Those who are not due yet will come all the same: nothing of theirs is given up.
            for session, pause in self._pauses.items():
                if session not in self._due:
                    residency.prefix(pause.sequence)
        return found

    def wake_at(self) -> float | None:
        order = self._order
        while order and ((pause := self._pauses.get(order[0][1])) is None or pause.due != order[0][0]):
            heappop(order)
        return order[0][0] if order else None


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
