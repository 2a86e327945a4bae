"""Sequences that decode one token every step, held together instead of one by one.

They differ in nothing but length. So a step costs what *changes* in it, not what merely goes on::

    steps       a counter of decode steps; member s has computed  base(s) + steps - since(s)  tokens
    phases      members by the step (modulo block_size) at which their next token begins a block
    ends        a heap of the steps at which members with a known output finish
    context     the sum of computed tokens: what attention reads

Step by step or n at once, the state is the same: that is why a simulation may leap.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from pagedlab.engine.coming import NEVER

if TYPE_CHECKING:
    from pagedlab.engine.sequence import Sequence


class Decoders:
    """The aggregate. A member's table lags behind by `lag` tokens until the engine brings it up to date."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.steps = 0
        self.context = 0
        """Tokens that members have computed."""
        self.behind = 0
        """Of these, tokens that their tables do not count yet."""
        self.members: dict[Sequence, None] = {}
        """In order of joining, which is their order in a batch."""
        self.fresh: dict[Sequence, None] = {}
        """Joined since the last step: their first token may need room of its own, whatever the phase."""
        self._phases: dict[int, dict[Sequence, None]] = {}
        self._sorted: list[int] = []
        """Phases that somebody is in."""
        self._ends: list[tuple[int, int, Sequence]] = []
        self._joined = 0

    def __len__(self) -> int:
        return len(self.members)

    def join(self, seq: Sequence, ends_in: int | None) -> None:
        """Take in a sequence whose table is up to date; it finishes after ``ends_in`` more tokens, if that is known."""
        computed = seq.table.num_tokens
        self._joined += 1
        seq.since = self.steps
        seq.decoders = self
        self.members[seq] = None
        self.fresh[seq] = None
        self.context += computed
        seq.phase = phase = (self.steps - computed) % self.block_size
        bucket = self._phases.get(phase)
        if bucket is None:
            self._phases[phase] = {seq: None}
            insort(self._sorted, phase)
        else:
            bucket[seq] = None
        if ends_in is not None:
            seq.ends_at = self.steps + ends_in
            heappush(self._ends, (seq.ends_at, self._joined, seq))

    def leave(self, seq: Sequence) -> None:
        """Let a member go, whose table is up to date."""
        del self.members[seq]
        self.fresh.pop(seq, None)
        bucket = self._phases[seq.phase]
        del bucket[seq]
        if not bucket:
            del self._phases[seq.phase]
            del self._sorted[bisect_left(self._sorted, seq.phase)]
        self.context -= seq.table.num_tokens
        seq.decoders = None
        seq.ends_at = -1

    def lag(self, seq: Sequence) -> int:
        """Tokens that the member has computed and its table does not count yet; from now on it is taken to count
        them.
        """
        n = self.steps - seq.since
        seq.since = self.steps
        self.behind -= n
        return n

    def advance(self, n: int) -> None:
        """Every member has computed ``n`` more tokens."""
        size = len(self.members)
        self.steps += n
        self.context += n * size
        self.behind += n * size
        if self.fresh:
            self.fresh = {}

    def at_boundary(self) -> list[Sequence]:
        """Return the members whose computed tokens fill whole blocks now, in order of joining."""
        bucket = self._phases.get(self.steps % self.block_size)
        return list(bucket) if bucket else []

    def steps_to_boundary(self) -> int:
        """Return the least n >= 1 after which `at_boundary` names somebody."""
        if not self._sorted:
            return NEVER
        here = (self.steps + 1) % self.block_size
        at = bisect_left(self._sorted, here)
        phase = self._sorted[at] if at < len(self._sorted) else self._sorted[0]
        return (phase - here) % self.block_size + 1

    def steps_to_end(self) -> int:
        """Return after how many steps the next member finishes."""
        ends = self._ends
        while ends and ends[0][2].ends_at != ends[0][0]:
            heappop(ends)  # it has left before its time
        return ends[0][0] - self.steps if ends else NEVER

    def pop_ended(self) -> list[Sequence]:
        """Return the members that finish now, in order of joining."""
        ended: list[Sequence] = []
        if self._ends and self._ends[0][0] <= self.steps:
            while self.steps_to_end() <= 0:
                ended.append(heappop(self._ends)[2])
        return ended
