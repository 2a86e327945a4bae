"""The contract of cost models: work in, integer picoseconds out.

A step's work is a handful of sums, so its cost does not grow with the batch, and time is integer, so a leap over n
steps can equal n steps exactly. What an engine may leap over are steps in which D sequences decode one token each;
then only the sum of their context lengths C changes, by D a step. A model that is linear in C says so with `linear`::

    step_ps(work) == fixed + slope * work.context_tokens            # integers, exactly
    n steps       == n * fixed + slope * (n * C + D * n * (n - 1) // 2)
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from pagedlab.policies.base import Policy


@dataclass(slots=True)
class StepWork:
    """What one step has to do, as sums over its batch. Lengths in tokens."""

    prefill_tokens: int = 0
    """Tokens of prompt chunks (sequences that compute more than one token, or do not sample yet)."""
    prefill_pairs: int = 0
    """Query-key pairs of the chunks: the sum of chunk * context before it + chunk * (chunk + 1) // 2."""
    prefill_seqs: int = 0
    """Chunks."""
    decode_seqs: int = 0
    """Sequences that compute one token and sample."""
    context_tokens: int = 0
    """Sum of the decoding sequences' lengths, the new token included: the keys they read."""
    samples: int = 0
    """Rows of logits: sequences that sample a token."""


class CostModel(Policy):
    """Contract of slot ``cost``: how long a step takes, and how long a copy between tiers."""

    slot: ClassVar[str] = "cost"

    @abstractmethod
    def step_ps(self, work: StepWork) -> int:
        """Return the duration of one step in picoseconds, at least 1."""

    def linear(self, work: StepWork) -> tuple[int, int] | None:
        """Return integers (fixed, slope) with ``step_ps == fixed + slope * context_tokens`` for every
        ``context_tokens``, the other sums as in ``work``; None if there are none (such steps are walked).
        """
        return None

    def transfer_ps(self, num_bytes: int, link: str) -> int:
        """Return picoseconds to move ``num_bytes`` over ``link``: ``"host"`` (host memory to device or back),
        ``"disk-read"`` or ``"disk-write"`` (disk to host memory, and back).
        """
        return 0
