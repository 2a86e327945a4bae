"""Time as the engine knows it: integer picoseconds, handed in, never read by a policy."""

from __future__ import annotations

import time
from typing import Protocol

PS_PER_SECOND = 1_000_000_000_000


def to_ps(seconds: float) -> int:
    """Return seconds as integer picoseconds."""
    return round(seconds * PS_PER_SECOND)


def to_seconds(ps: int) -> float:
    """Return picoseconds as seconds."""
    return ps / PS_PER_SECOND


class Clock(Protocol):
    """What the engine asks and tells."""

    def start(self) -> None:
        """The run begins: this is time 0."""

    def now(self) -> int:
        """Return picoseconds since the start."""

    def step_done(self, duration_ps: int) -> None:
        """A step has run; ``duration_ps`` is what the executor says it took."""

    def wait_until(self, time_ps: int) -> None:
        """Nothing can be done before ``time_ps``."""

    def pace(self, fixed: int, slope: int) -> tuple[int, int] | None:
        """Return how this clock counts steps of which the executor says that they take ``fixed + slope *
        context_tokens``, in the same form; None if time passes by itself, so that no step can be leapt over.
        """

    def leap(self, duration_ps: int) -> None:
        """Some steps have run that together took ``duration_ps`` by the clock's own pace."""


class WallClock:
    """Real time."""

    def __init__(self) -> None:
        self._start = time.perf_counter_ns()

    def start(self) -> None:
        """Begin at 0."""
        self._start = time.perf_counter_ns()

    def now(self) -> int:
        """Return picoseconds since the start."""
        return (time.perf_counter_ns() - self._start) * 1000

    def step_done(self, duration_ps: int) -> None:
        """Real time has passed by itself."""

    def wait_until(self, time_ps: int) -> None:
        """Sleep."""
        time.sleep(max(0.0, to_seconds(time_ps - self.now())))

    def pace(self, fixed: int, slope: int) -> tuple[int, int] | None:
        """Real time passes by itself."""
        return None

    def leap(self, duration_ps: int) -> None:
        """Real time has passed by itself."""


class VirtualClock:
    """Simulated time: a step takes as long as the executor says."""

    def __init__(self) -> None:
        self._now = 0

    def start(self) -> None:
        """Begin at 0."""
        self._now = 0

    def now(self) -> int:
        """Return picoseconds since the start."""
        return self._now

    def step_done(self, duration_ps: int) -> None:
        """Go on by ``duration_ps``."""
        self._now += duration_ps

    def wait_until(self, time_ps: int) -> None:
        """Jump to ``time_ps``."""
        self._now = max(self._now, time_ps)

    def pace(self, fixed: int, slope: int) -> tuple[int, int] | None:
        """As the executor says."""
        return fixed, slope

    def leap(self, duration_ps: int) -> None:
        """Go on by ``duration_ps``."""
        self._now += duration_ps


class StepClock(VirtualClock):
    """Step k happens at k seconds, whatever the machine does: the clock of reproducible event logs."""

    def step_done(self, duration_ps: int) -> None:
        """One second a step."""
        self._now += PS_PER_SECOND

    def wait_until(self, time_ps: int) -> None:
        """Jump to the first whole second at or after ``time_ps``."""
        super().wait_until(-(-time_ps // PS_PER_SECOND) * PS_PER_SECOND)

    def pace(self, fixed: int, slope: int) -> tuple[int, int] | None:
        """Every step takes a second."""
        return PS_PER_SECOND, 0
