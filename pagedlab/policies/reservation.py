"""Slot `reservation`: how much room a request claims when it is admitted.

PagedAttention claims what the step at hand writes and grows block by block. The systems before it claimed the
whole request at once; with a contiguous allocator that is what the paper compares against. What turns out not
to be needed is waste; what turns out to be missing is grown on demand.

The three Orca variants are those of Kwon et al., "Efficient Memory Management for Large Language Model
Serving with PagedAttention" (SOSP 2023), section 6.1.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

from pagedlab.policies.base import Policy
from pagedlab.registry import register


class Claimant(Protocol):
    """What a reservation sees of the sequence that asks for room; all in tokens."""

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""

    @property
    def num_tokens(self) -> int:
        """Tokens known now: the prompt and what was generated so far."""

    @property
    def max_len(self) -> int:
        """Longest that it can become: prompt and its limit of new tokens."""

    @property
    def expected_len(self) -> int:
        """Prompt and the expected output, if the request came with that hint; else ``max_len``."""


class Reservation(Policy):
    """Contract: one number per admission."""

    slot: ClassVar[str] = "reservation"

    @abstractmethod
    def claim(self, sequence: Claimant, step_end: int, max_model_len: int) -> int:
        """Return the tokens to have room for, in all: at least ``step_end``, which is what this step fills, and at
        most ``max_model_len``. The engine raises a smaller claim.
        """


@register("reservation", "on-demand")
class OnDemand(Reservation):
    """Claim only what the next step writes (PagedAttention)."""

    def claim(self, sequence: Claimant, step_end: int, max_model_len: int) -> int:
        return step_end


@register("reservation", "full-prompt")
class FullPrompt(Reservation):
    """Claim all that is known when the request is admitted, whatever piece of it this step computes (vLLM's first
    scheduler; the share of blocks that it kept free besides is ``Config.watermark``).
    """

    def claim(self, sequence: Claimant, step_end: int, max_model_len: int) -> int:
        return sequence.num_tokens


@register("reservation", "max")
class Max(Reservation):
    """Claim the longest sequence that the model allows (FasterTransformer, Orca-Max)."""

    def claim(self, sequence: Claimant, step_end: int, max_model_len: int) -> int:
        return max_model_len


@register("reservation", "pow2")
class Pow2(Reservation):
    """Claim the prompt and the output's length rounded up to a power of two (Orca-Pow2)."""

    def claim(self, sequence: Claimant, step_end: int, max_model_len: int) -> int:
        output = max(_foreseen(sequence) - sequence.prompt_len, 1)
        return min(sequence.prompt_len + (1 << (output - 1).bit_length()), max_model_len)


@register("reservation", "oracle")
class Oracle(Reservation):
    """Claim exactly what the request will need (Orca-Oracle; takes the expected output length as the
    truth).
    """

    def claim(self, sequence: Claimant, step_end: int, max_model_len: int) -> int:
        return _foreseen(sequence) - 1  # the last token is never fed back, so never stored


def _foreseen(sequence: Claimant) -> int:
    """The expected length, or once that has proved too short, the longest possible."""
    return sequence.expected_len if sequence.expected_len > sequence.num_tokens else sequence.max_len
