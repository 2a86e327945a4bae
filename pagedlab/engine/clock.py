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


class StepClock:
    """Step k happens at k seconds, whatever the machine does: the clock of reproducible event logs."""

    def __init__(self) -> None:
        self._now = 0

    def start(self) -> None:
        """Begin at 0."""
        self._now = 0

    def now(self) -> int:
        """Return picoseconds since the start."""
        return self._now

    def step_done(self, duration_ps: int) -> None:
        """One second a step."""
        self._now += PS_PER_SECOND

    def wait_until(self, time_ps: int) -> None:
        """Jump to the first whole second at or after ``time_ps``."""
        self._now = max(self._now, -(-time_ps // PS_PER_SECOND) * PS_PER_SECOND)
