"""Slot `scheduler`: which sequences run this step, and with how many tokens.

A scheduler asks, the engine grants. `plan` walks over the running and waiting sequences in whatever order it
likes and calls ``step.grant(sequence, tokens)``; the engine finds the prefix, allocates, preempts, and
returns how many tokens it granted (0: no room, no seat or no budget). A running sequence that needs memory
may cost others theirs (slot `preemption`); a waiting one is only admitted into room that is there, and not in a step
in which somebody was preempted.

`plan` returns how long its decision stands. None: one step, ask again; a policy that says nothing is never
wrong. `UNTIL_EVENT`: grant the same sequences one token each, and nobody else, until something happens (an arrival,
a finish, a cancellation, a block shortage, a sequence that is preempted). The engine then repeats the decision
without asking, and a simulator leaps.

A class that says ``steady_decode = True`` leaves decoding to the engine: every sequence whose prompt is done gets its
one token each step before `plan` is asked, and ``step.running`` holds only the others. That is what iteration-level
schedulers do anyway; said in one word, the engine need not look at every sequence in every step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import ClassVar, Final, Literal, Protocol

from pagedlab.policies.base import Policy, param
from pagedlab.registry import register

UNTIL_EVENT: Final = "until-event"


class Schedulable(Protocol):
    """What a scheduler sees of a sequence; all lengths in tokens."""

    @property
    def remaining(self) -> int:
        """Known tokens not yet computed: 1 while decoding, more while prefilling."""

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""

    @property
    def num_tokens(self) -> int:
        """Tokens known now: the prompt and what was generated so far."""

    @property
    def expected_len(self) -> int:
        """Prompt and the expected output, if the request came with that hint; else the longest that it can become."""

    @property
    def priority(self) -> int:
        """Higher runs first."""

    @property
    def arrival(self) -> int:
        """When the request arrived, in picoseconds of the engine's clock."""

    @property
    def request_id(self) -> str:
        """The request (group) it belongs to."""

    @property
    def request_output(self) -> int:
        """Output tokens of that request so far, in all its samples."""

    @property
    def request_ended(self) -> bool:
        """True once every sample of that request has ended."""

    @property
    def salt(self) -> Hashable:
        """The request's tenant."""

    @property
    def session(self) -> str | None:
        """The request's session."""


class Step(Protocol):
    """One step as a scheduler sees it. ``running`` and ``waiting`` are snapshots in order of admission and of
    the queue.
    """

    @property
    def running(self) -> Sequence[Schedulable]:
        """Sequences that hold blocks."""

    @property
    def decoding(self) -> int:
        """Sequences that decode without being asked for (``steady_decode``)."""

    @property
    def waiting(self) -> Sequence[Schedulable]:
        """The queue, front first; preempted sequences return to the front."""

    @property
    def budget(self) -> int:
        """Tokens that may still be granted this step."""

    @property
    def seats(self) -> int:
        """Sequences that may still be admitted."""

    def cached(self, sequence: Schedulable) -> int:
        """Tokens of the sequence that are in the cache now and need not be computed. Changes nothing."""

    def grant(self, sequence: Schedulable, tokens: int, *, whole: bool = False) -> int:
        """Ask for up to ``tokens`` of a sequence; return how many were granted, after budget and memory.

        ``whole`` asks for all that remains or nothing; alone in a step it may exceed the budget (or a long
        prompt could never run unchunked). Once somebody was preempted in this step, whoever waits gets 0.
        """


Decision = Literal["until-event"] | None


class Scheduler(Policy):
    """Contract: one pass over the sequences."""

    slot: ClassVar[str] = "scheduler"
    steady_decode: ClassVar[bool] = False

    def reset(self) -> None:
        """Forget the last run."""

    @abstractmethod
    def plan(self, step: Step) -> Decision:
        """Ask for grants in order of importance."""


def decoding(step: Step) -> Decision:
    """The decision stands if everyone decodes: whoever waits has just been refused, and is asked about again when a
    sequence has left or joined.
    """
    for sequence in step.running:
        if sequence.remaining != 1:
            return None
    return UNTIL_EVENT


@register("scheduler", "static-batch")
class StaticBatch(Scheduler):
    """Fill a batch, run it until its last sequence ends, then fill the next (`generate`,
    FasterTransformer).
    """

    steady_decode: ClassVar[bool] = True

    def plan(self, step: Step) -> Decision:
        if not step.running and not step.decoding:
            for sequence in step.waiting:
                if not step.grant(sequence, sequence.remaining, whole=True):
                    break
            return None
        for sequence in step.running:
            step.grant(sequence, sequence.remaining, whole=True)
        return decoding(step)


@register("scheduler", "iteration-level")
class IterationLevel(Scheduler):
    """Admit and retire at every step, prompts whole (Orca, OSDI 2022)."""

    steady_decode: ClassVar[bool] = True

    def plan(self, step: Step) -> Decision:
        for sequence in step.running:
            step.grant(sequence, sequence.remaining, whole=True)
        for sequence in step.waiting:
            if not step.grant(sequence, sequence.remaining, whole=True):
                break
        return decoding(step)


@register("scheduler", "prefill-first")
class PrefillFirst(Scheduler):
    """Whole prompts before anything else; who decodes waits for a step without prompts (vLLM's first scheduler).

    First tokens come early, and every admission is a stall in everybody else's output.
    """

    def plan(self, step: Step) -> Decision:
        granted = 0
        for sequence in step.running:
            if sequence.remaining > 1:
                granted += step.grant(sequence, sequence.remaining, whole=True)
        for sequence in step.waiting:
            tokens = step.grant(sequence, sequence.remaining, whole=True)
            if not tokens:
                break
            granted += tokens
        if granted:
            return None
        for sequence in step.running:
            step.grant(sequence, 1)
        return decoding(step)


@register("scheduler", "chunked-prefill")
class ChunkedPrefill(Scheduler):
    """Running sequences first, then prompts in chunks up to the token budget (Sarathi-Serve, OSDI 2024;
    vLLM).
    """

    steady_decode: ClassVar[bool] = True

    max_chunk: int = param(8192, low=1, unit="tokens", help="longest piece of one prompt in one step")

    def plan(self, step: Step) -> Decision:
        for sequence in step.running:
            step.grant(sequence, self.max_chunk)
        for sequence in step.waiting:
            if not step.grant(sequence, self.max_chunk):
                break
        return decoding(step)
