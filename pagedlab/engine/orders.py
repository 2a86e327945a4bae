"""The orders of one step: plain, serialisable data, all that an executor ever learns from the engine.

The executor owns the KV tensors of every tier. It carries out ``moves`` one after the other (their order
matters: a block may be saved to the host, then overwritten), and runs the model once over ``batch``. It never
decides anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from pagedlab.cache.moves import Move
from pagedlab.costs.base import StepWork
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.engine.script import Script
from pagedlab.policies.block import DEVICE, DISK, HOST, TIER_NAMES

__all__ = [
    "DEVICE",
    "DISK",
    "HOST",
    "TIER_NAMES",
    "Damage",
    "Executor",
    "Fallible",
    "Move",
    "Scripted",
    "SequenceStep",
    "StepOrders",
    "StepResult",
    "TierFault",
]


@dataclass(slots=True)
class SequenceStep:
    """What one sequence does in a step: compute keys and values of ``tokens`` at positions ``start``, ``start
    + 1``, ...

    ``table`` lists its physical blocks and covers at least ``start + len(tokens)`` tokens. ``table_version``
    changes whenever the table did other than grow at its end, so an executor that keeps an encoded copy knows
    when to append and when to start over. ``num_samples`` is 0 while a prompt is still being prefilled, 1
    when the step ends at the last known token, and n where n parallel samples part: the executor then draws
    that many tokens from the last position, the i-th as sample number ``sample_index + i``. ``history`` is
    every token up to and including ``tokens`` (for repetition penalties; read only).
    """

    seq_id: int
    tokens: list[int]
    start: int
    table: Sequence[int]
    table_version: int
    num_samples: int
    sample_index: int
    sampling: SamplingParams
    history: Sequence[int]

    @property
    def context_len(self) -> int:
        """Tokens in the cache once this step has run."""
        return self.start + len(self.tokens)


@dataclass(slots=True)
class StepOrders:
    """Everything an executor does in one step."""

    step: int
    moves: deque[Move]
    batch: list[SequenceStep]
    ended: list[int] = field(default_factory=list)
    """Sequences whose rows an executor may forget: finished, cancelled or preempted since the last step."""
    work: StepWork = field(default_factory=StepWork)
    """The same in sums: all that a `Scripted` executor gets (its ``batch`` is empty)."""
    wait_ps: int = 0
    """Picoseconds until prefetched blocks that the batch reads have come over the link, where that takes time."""


@dataclass(slots=True)
class StepResult:
    """What came of a batch, entry by entry.

    ``samples[i]`` holds ``batch[i].num_samples`` token ids (empty while prefilling; unread where outputs are
    scripted). ``failures`` maps an
    entry to the reason why its keys, values and logits are not to be trusted (NaN logits): the engine ends
    that request alone. ``duration_ps`` is how long the step took in picoseconds, for a clock that does not
    run by itself.
    """

    samples: list[list[int]]
    failures: dict[int, str] = field(default_factory=dict)
    duration_ps: int = 0


class TierFault(NamedTuple):
    """A copy to or from a place in a lower tier failed, and why."""

    tier: int
    block: int
    reason: str


class Damage(NamedTuple):
    """What moves have left undone: the faults, and every place that does not hold now what was to be put there.

    A place is (tier, block). What was copied on from a spoiled place is spoiled, what was written over is whole again,
    and a place that could not be read is spoiled itself.
    """

    faults: list[TierFault]
    spoiled: set[tuple[int, int]]


class Executor(Protocol):
    """Carries out orders: a real model, or a cost model.

    A cost model also has the methods of `Scripted`.
    """

    eos_token_ids: frozenset[int]
    max_model_len: int
    """Longest sequence in tokens that it can run."""

    def prepare(
        self,
        *,
        num_blocks: int,
        block_size: int,
        host_blocks: int,
        max_num_seqs: int,
        disk_blocks: int = 0,
        disk_path: str | None = None,
    ) -> None:
        """Make room for a run: cache tensors of every tier, and a file in ``disk_path`` (None: where temporary files
        go) for the disk's. Called once before the first step.
        """

    def move(self, moves: deque[Move]) -> None:
        """Carry out ``moves`` from the left, popping each as it is done, so that a fault can be resumed."""

    def execute(self, orders: StepOrders) -> StepResult:
        """Run ``orders.batch``. An exception means that nothing of the batch counts; the engine may order it
        again.
        """

    def detokenize(self, tokens: Sequence[int]) -> str | None:
        """Return the text of ``tokens``, or None if this executor knows no text (then stop strings are
        refused).
        """


@runtime_checkable
class Fallible(Protocol):
    """What an executor has besides if one of its tiers can fail."""

    def take_damage(self) -> Damage | None:
        """Return what the moves since the last call have left undone, and think no more of it; None if nothing."""


@runtime_checkable
class Scripted(Protocol):
    """What an executor has besides if it knows beforehand what will be said, and how long steps take."""

    def script(self, request: Request, sample_index: int, unique: int) -> Script:
        """Return the output of one sequence; ``unique`` is a number that no other sequence has."""

    def linear(self, work: StepWork) -> tuple[int, int] | None:
        """See `pagedlab.costs.base.CostModel.linear`."""

    def load_ps(self, num_blocks: int, from_disk: int = 0) -> int:
        """Return picoseconds in which so many blocks come to the device, ``from_disk`` of them read from the disk."""
