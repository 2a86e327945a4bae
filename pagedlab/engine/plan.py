"""What the engine shows to schedulers while a step is being planned."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ReadOnly
from itertools import islice
from typing import TYPE_CHECKING, overload

from pagedlab.engine.sequence import Sequence, Status
from pagedlab.errors import PolicyError
from pagedlab.policies.lookup import Match
from pagedlab.policies.scheduler import Schedulable

if TYPE_CHECKING:
    from pagedlab.engine.seats import Seats


_FRONT = 16
"""Waiting sequences that are copied for every plan; schedulers rarely look further."""


class Queue(ReadOnly[Sequence]):
    """The waiting queue as it was when it was first asked for, whatever is admitted or preempted meanwhile."""

    def __init__(self, engine: Seats, lost: set[Sequence]) -> None:
        self._waiting, self._lost = engine.waiting, lost
        self._size = len(engine.waiting)
        self._items = list(islice(engine.waiting, _FRONT))

    def __len__(self) -> int:
        return self._size

    def _all(self) -> list[Sequence]:
        if len(self._items) < self._size:
            # Beyond the front nobody has been admitted yet, and who came in since was preempted.
            front = set(self._items)
            self._items += [s for s in self._waiting if s not in front and s not in self._lost]
        return self._items

    @overload
    def __getitem__(self, at: int) -> Sequence: ...
    @overload
    def __getitem__(self, at: slice) -> ReadOnly[Sequence]: ...
    def __getitem__(self, at: int | slice) -> Sequence | ReadOnly[Sequence]:
        if isinstance(at, int) and 0 <= at < len(self._items):
            return self._items[at]
        return self._all()[at]

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items) if len(self._items) == self._size else self._beyond()

    def _beyond(self) -> Iterator[Sequence]:
        front = self._items[:]
        yield from front
        yield from self._all()[len(front) :]


class Plan:
    """One step in the making, as the scheduler sees it (`pagedlab.policies.scheduler.Step`)."""

    __slots__ = ("_engine", "_queue", "admitted", "budget", "entries", "gave_up", "lost", "running")

    def __init__(self, engine: Seats) -> None:
        self._engine = engine
        self.running: ReadOnly[Sequence] = tuple(engine.undecided if engine.steady else engine.running)
        """Who holds blocks and has to be asked for: everyone, or only those that the engine does not let decode."""
        self.budget = engine.config.max_num_batched_tokens
        self.entries: dict[Sequence, int] = {}
        self.lost: set[Sequence] = set()
        """Preempted while this plan was made."""
        self.admitted = False
        """Whether this plan has let anybody in."""
        self.gave_up = False
        """Whether those who had ended gave up their blocks while this plan was made."""
        self._queue: Queue | None = None

    @property
    def decoding(self) -> int:
        """Sequences that get their token without being asked for."""
        return len(self._engine.decoders.members)

    @property
    def waiting(self) -> ReadOnly[Sequence]:
        """The queue as it was when first asked for."""
        if self._queue is None:
            self._queue = Queue(self._engine, self.lost)
        return self._queue

    @property
    def seats(self) -> int:
        """Sequences that may still be admitted (a request of n samples takes n)."""
        engine = self._engine
        return engine.config.max_num_seqs - len(engine.running) - len(engine.leaving) - engine.promised_seats

    def cached(self, sequence: Schedulable) -> int:
        """See `pagedlab.policies.scheduler.Step.cached`."""
        seq = sequence
        assert isinstance(seq, Sequence)
        if seq.num_computed:
            return seq.num_computed
        return self._engine.cache.match(seq.table.prefix, seq.num_tokens - 1).num_tokens

    def grant(self, sequence: Schedulable, tokens: int, *, whole: bool = False) -> int:
        """See `pagedlab.policies.scheduler.Step.grant`."""
        engine, seq = self._engine, sequence
        assert isinstance(seq, Sequence)
        if seq in self.entries or seq.decoders is not None:
            name = type(engine.policies.scheduler).__name__
            raise PolicyError(f"scheduler {name} asked twice for {seq!r} in one step")
        n = 0
        if self.budget <= 0 and not self._alone:
            return 0
        if seq.status is Status.RUNNING:
            n = self.cut(seq.remaining, tokens, whole)
            if n and not engine.make_room(seq, seq.num_computed + n, self):
                n = 0
        elif seq.status is Status.WAITING and not self.lost and self.seats > seq.to_fork:
            n = engine.admit(seq, tokens, whole, self)
            self.admitted |= n > 0
        if n:
            self.entries[seq] = n
            self.budget -= n
        return n

    @property
    def _alone(self) -> bool:
        """Whether nobody has anything of this step yet."""
        return not self.entries and not self._engine.decoders.members

    def computes_next(self, seq: Sequence, match: Match) -> bool:
        """Whether this very step computes the block that would come next in the sequence's match."""
        size, at = self._engine.config.block_size, len(match.blocks)
        if match.partial is not None or at >= (seq.num_tokens - 1) // size:
            return False
        wanted = seq.table.prefix.keys(at + 1)[at]
        for other, n in self.entries.items():
            table = other.table
            if table.num_published <= at < (table.num_tokens + n) // size:
                prefix = table.prefix
                if prefix.keys(at + 1)[at] == wanted and prefix.salt == seq.table.prefix.salt:
                    return True
        return False

    def cut(self, remaining: int, tokens: int, whole: bool) -> int:
        """How much of ``remaining`` fits what was asked for and what is left of the step's budget."""
        if whole:
            return remaining if remaining <= self.budget or self._alone else 0
        n = remaining if remaining < tokens else tokens
        return max(0, n if n < self.budget else self.budget)
