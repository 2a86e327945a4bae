"""What a run leaves behind besides its events: one record a step, and counts over all of them."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from pagedlab.cache.accounting import Memory
from pagedlab.cache.moves import Move
from pagedlab.costs.base import StepWork
from pagedlab.errors import PagedLabError
from pagedlab.policies.block import DISK, HOST
from pagedlab.policies.prefetch import FATES


class Moved(NamedTuple):
    """Blocks that an executor has copied since the run began, by the link they went over.

    A block that comes up from the disk goes through host memory, so it counts on both links.
    """

    to_host: int = 0
    """Device to host: swapped out, or saved when they were evicted."""
    to_device: int = 0
    """Host to device: swapped in, loaded for a prefix hit, or prefetched."""
    copied: int = 0
    """Device to device: on write."""
    to_disk: int = 0
    """Host to disk: kept when the host gave them up, or stored through."""
    from_disk: int = 0
    """Disk to host memory, on the way to the device: loaded for a prefix hit, or prefetched."""

    def and_also(self, moves: Iterable[Move]) -> Moved:
        """Return the counts with ``moves`` carried out as well."""
        to_host, to_device, copied, to_disk, from_disk = self
        for move in moves:
            if move.dst_tier == HOST:
                to_host += 1
            elif move.src_tier == HOST:
                if move.dst_tier == DISK:
                    to_disk += 1
                else:
                    to_device += 1
            elif move.src_tier == DISK:
                from_disk += 1
                to_device += 1
            else:
                copied += 1
        return Moved(to_host, to_device, copied, to_disk, from_disk)


@dataclass(slots=True)
class StepRecord:
    """What one step did: a row of ``run.steps``, and of ``run.memory``.

    A simulation that leaps writes one record for ``count`` steps in which sequences merely decode: the fields are
    those of the first, each of the others took ``growth`` picoseconds longer than the one before, and stored one more
    token for each decoding sequence. `each` gives them one by one.
    """

    step: int
    start: int
    duration: int
    num_running: int
    num_waiting: int
    prefill_tokens: int
    decode_tokens: int
    moved: Moved
    """Since the run began."""
    preemptions: int
    """Since the run began."""
    recomputed_tokens: int
    """Since the run began."""
    memory: Memory
    context_tokens: int = 0
    """Sum of the decoding sequences' lengths: the keys they read."""
    prefill_pairs: int = 0
    """Query-key pairs of the prompt chunks."""
    count: int = 1
    growth: int = 0

    def end(self, i: int) -> int:
        """Return when the i-th of its steps ended (0 is the first), in picoseconds."""
        return self.start + (i + 1) * self.duration + self.growth * (i * (i + 1) // 2)

    def each(self) -> Iterator[StepRecord]:
        """Return a record for every single step."""
        if self.count == 1:
            yield self
            return
        for i in range(self.count):
            m, more = self.memory, i * self.decode_tokens
            reserved = max(0, m.reserved - more)
            held = m.stored + m.reserved + m.internal
            yield replace(
                self,
                step=self.step + i,
                start=self.end(i - 1) if i else self.start,
                duration=self.duration + i * self.growth,
                context_tokens=self.context_tokens + more,
                memory=m._replace(
                    stored=m.stored + more, reserved=reserved, internal=held - m.stored - more - reserved
                ),
                count=1,
                growth=0,
            )


@dataclass(slots=True)
class Totals:
    """Counts over a run."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    hit_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    swapped_out: int = 0
    """Sequences preempted by swapping, not blocks: those are in `moved`."""
    tier_faults: int = 0
    """Copies to or from a lower tier that failed; each cost a recompute at most."""
    moved: Moved = field(default_factory=Moved)
    prefetch: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    """Blocks by what became of their loads, see `pagedlab.policies.prefetch`."""


_NUMBERS = ("step", "start", "duration", "count", "growth", "num_running", "num_waiting", "prefill_tokens",
            "decode_tokens", "context_tokens", "prefill_pairs", "preemptions", "recomputed_tokens")  # fmt: skip
_COLUMNS = (*_NUMBERS, *Moved._fields, *Memory._fields)
_MOVED, _WIDTH = len(_NUMBERS), len(_COLUMNS)
_MEMORY = _MOVED + len(Moved._fields)
_numbers = attrgetter(*_NUMBERS)
_pack = struct.Struct(f"{_WIDTH}q").pack


class StepLog(Sequence[StepRecord]):
    """The records of a run, oldest first: a row of integers of 8 bytes for each, which `StepRecord` shows by name."""

    def __init__(self, records: Iterable[StepRecord] = ()) -> None:
        self._rows = array("q")
        for record in records:
            self.append(record)

    def note(
        self,
        step: int,
        start: int,
        duration: int,
        count: int,
        growth: int,
        num_running: int,
        num_waiting: int,
        work: StepWork,
        totals: Totals,
        memory: Memory,
    ) -> None:
        """Add a record of ``count`` steps that did ``work`` each, after which the counts are ``totals``."""
        try:
            self._rows.frombytes(
                _pack(step, start, duration, count, growth, num_running, num_waiting, work.prefill_tokens,
                      work.decode_seqs, work.context_tokens, work.prefill_pairs, totals.preemptions,
                      totals.recomputed_tokens, *totals.moved, *memory)
            )  # fmt: skip
        except struct.error:
            raise _too_long(step, start) from None

    def append(self, record: StepRecord) -> None:
        """Add a record."""
        try:
            self._rows.frombytes(_pack(*_numbers(record), *record.moved, *record.memory))
        except struct.error:
            raise _too_long(record.step, record.start) from None

    def amend_last(self, **changes: Any) -> None:
        """Change fields of the last step; where its record stands for several, it gets one of its own."""
        *before, last = self[-1].each()
        if before:
            first = replace(before[0], count=len(before), growth=self[-1].growth if len(before) > 1 else 0)
        del self._rows[-_WIDTH:]
        if before:
            self.append(first)
        self.append(replace(last, **changes))

    def __len__(self) -> int:
        return len(self._rows) // _WIDTH

    @overload
    def __getitem__(self, at: int) -> StepRecord: ...
    @overload
    def __getitem__(self, at: slice) -> list[StepRecord]: ...
    def __getitem__(self, at: int | slice) -> StepRecord | list[StepRecord]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        i = range(len(self))[at] * _WIDTH
        row = self._rows[i : i + _WIDTH]
        fields = dict(zip(_NUMBERS, row))
        return StepRecord(**fields, moved=Moved(*row[_MOVED:_MEMORY]), memory=Memory(*row[_MEMORY:]))

    def ends(self, spans: Iterable[Sequence[int]]) -> list[int]:
        """Return the ends of the steps in ``spans``, runs of (first step, how many), in picoseconds."""
        ends: list[int] = []
        rows = self._rows
        for first, count in spans:
            at = bisect_right(range(len(self)), first, key=lambda i: rows[i * _WIDTH]) - 1
            step, last = first, first + count
            while step < last:
                record = self[at]
                stop = min(last, record.step + record.count)
                ends += [record.end(i) for i in range(step - record.step, stop - record.step)]
                step, at = stop, at + 1
        return ends

    def columns(self) -> tuple[dict[str, NDArray[np.int64]], ...]:
        """Return the numbers of all records by their names, those of `Moved`, and those of `Memory`."""
        table = np.frombuffer(self._rows.tobytes(), np.int64).reshape(-1, _WIDTH).T
        columns = dict(zip(_COLUMNS, np.ascontiguousarray(table), strict=True))
        return tuple(
            {name: columns[name] for name in names} for names in (_NUMBERS, Moved._fields, Memory._fields)
        )


def _too_long(step: int, start: int) -> PagedLabError:
    return PagedLabError(
        f"step {step} began {start / 1e12:.3g} s after the run did; a run can be recorded up to 2**63 picoseconds "
        "(106 days)"
    )
