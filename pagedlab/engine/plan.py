"""What the engine shows to schedulers and prefetchers while a step is being planned."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly
from functools import cached_property
from typing import TYPE_CHECKING

from pagedlab.cache.kv_cache import KVCache
from pagedlab.engine.sequence import Sequence, Status
from pagedlab.errors import PolicyError
from pagedlab.policies.block import Block
from pagedlab.policies.prefetch import Waiting
from pagedlab.policies.scheduler import Schedulable

if TYPE_CHECKING:
    from pagedlab.engine.engine import Engine


class Plan:
    """One step in the making, as the scheduler sees it (`pagedlab.policies.scheduler.Step`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.running: ReadOnly[Sequence] = tuple(engine.running)
        self.budget = engine.config.max_num_batched_tokens
        self.entries: dict[Sequence, int] = {}
        self.lost: set[Sequence] = set()
        """Preempted while this plan was made."""

    @cached_property
    def waiting(self) -> ReadOnly[Sequence]:
        """The queue as it was when first asked for."""
        return tuple(self._engine.waiting)

    @property
    def seats(self) -> int:
        """Sequences that may still be admitted (a request of n samples takes n)."""
        taken = sum(1 + s.to_fork for s in self._engine.running)
        return self._engine.config.max_num_seqs - taken

    def grant(self, sequence: Schedulable, tokens: int, *, whole: bool = False) -> int:
        """See `pagedlab.policies.scheduler.Step.grant`."""
        engine, seq = self._engine, sequence
        assert isinstance(seq, Sequence)
        if seq in self.entries:
            name = type(engine.policies.scheduler).__name__
            raise PolicyError(f"scheduler {name} asked twice for {seq!r} in one step")
        n = 0
        if seq.status is Status.RUNNING:
            n = self.cut(seq.remaining, tokens, whole)
            if n and not engine.make_room(seq, seq.num_computed + n, self):
                n = 0
        elif seq.status is Status.WAITING and seq not in self.lost and self.seats > seq.to_fork:
            n = engine.admit(seq, tokens, whole, self)
        if n:
            self.entries[seq] = n
            self.budget -= n
        return n

    def cut(self, remaining: int, tokens: int, whole: bool) -> int:
        """How much of ``remaining`` fits what was asked for and what is left of the step's budget."""
        if whole:
            return remaining if remaining <= self.budget or not self.entries else 0
        return max(0, min(remaining, tokens, self.budget))


class CacheResidency:
    """Where prefixes lie (`pagedlab.policies.prefetch.Residency`)."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def prefix(self, sequence: Waiting) -> list[Block]:
        """Return the cached blocks of the sequence's prefix, each in its highest tier."""
        assert isinstance(sequence, Sequence)
        return self._cache.match(sequence.table.prefix, len(sequence.tokens) - 1).blocks
