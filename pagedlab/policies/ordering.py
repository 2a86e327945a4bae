"""Schedulers that do not take the queue as it comes: shortest-first, priority, longest-prefix.

All let decoding sequences go on and compute prompts in chunks up to the token budget; they differ in whose prompt is
next. Who is next and finds no room holds back all behind, or the large would never get in. An order costs
O(waiting log waiting) whenever the scheduler is asked.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pagedlab.policies.base import param
from pagedlab.policies.scheduler import Decision, Schedulable, Scheduler, Step, decoding
from pagedlab.registry import register

_SECOND = 10**12
"""`Schedulable.arrival` is in picoseconds."""


class _Ranked(Scheduler):
    """Prompts, begun or waiting, by a rank that does not change while a sequence waits; the lowest is next."""

    steady_decode: ClassVar[bool] = True

    max_chunk: int = param(8192, low=1, unit="tokens", help="longest piece of one prompt in one step")

    @abstractmethod
    def rank(self, sequence: Schedulable) -> float:
        """Return the sequence's place; ties are broken by admission and arrival."""

    def plan(self, step: Step) -> Decision:
        begun = []
        for sequence in step.running:
            if sequence.remaining == 1:
                step.grant(sequence, 1)
            else:
                begun.append(sequence)
        running, held_back = set(begun), False
        for sequence in sorted([*begun, *step.waiting], key=self.rank):
            if sequence in running:
                step.grant(sequence, self.max_chunk)
            elif not held_back:
                held_back = not step.grant(sequence, self.max_chunk)
        return decoding(step)


@register("scheduler", "shortest-first")
class ShortestFirst(_Ranked):
    """The least work first: what is left of the prompt, and the output if that is to count.

    Waiting is worth ``ageing`` tokens a second, so a request is overtaken only by those that are shorter by more than
    that; 0 is the textbook's rule, under which a long request starves as long as short ones keep coming.
    """

    work: str = param(
        "prompt",
        choices=("prompt", "total"),
        help="tokens left to compute, or these and the expected output (without a hint: the longest possible)",
    )
    ageing: float = param(100.0, low=0.0, high=1e6, unit="tokens/s", help="what a second of waiting is worth")

    def rank(self, sequence: Schedulable) -> float:
        work = sequence.remaining
        if self.work == "total":
            work += max(0, sequence.expected_len - sequence.num_tokens)
        # All grow older alike, so it is enough to know since when.
        return work + self.ageing * sequence.arrival / _SECOND


@register("scheduler", "priority")
class ByPriority(_Ranked):
    """The highest priority first, then the earliest arrival; ``ageing`` raises a waiting request by levels a second."""

    ageing: float = param(0.0, low=0.0, high=1e6, unit="levels/s", help="what a second of waiting is worth")

    def rank(self, sequence: Schedulable) -> float:
        return self.ageing * sequence.arrival / _SECOND - sequence.priority


@register("scheduler", "longest-prefix")
class LongestPrefix(Scheduler):
    """The waiting request of which the most is cached first, while it still is (SGLang's LPM; Zheng et al., 2024).

    Looks every waiting request up, so a queue longer than ``max_queue`` is taken as it comes. What is cached changes
    from step to step: as long as several wait for room, the scheduler is asked at every step.
    """

    steady_decode: ClassVar[bool] = True

    max_chunk: int = param(8192, low=1, unit="tokens", help="longest piece of one prompt in one step")
    max_queue: int = param(128, low=1, unit="requests", help="longest queue that is put in order")

    def plan(self, step: Step) -> Decision:
        for sequence in step.running:
            step.grant(sequence, self.max_chunk)
        if step.seats <= 0:
            return decoding(step)
        ordered = 1 < len(step.waiting) <= self.max_queue
        queue = sorted(step.waiting, key=step.cached, reverse=True) if ordered else step.waiting
        for sequence in queue:
            if not step.grant(sequence, self.max_chunk):
                break
        return None if ordered and step.seats > 0 else decoding(step)
