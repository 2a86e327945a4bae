"""What a run leaves behind besides its events: one record a step, and counts over all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagedlab.cache.accounting import Memory


@dataclass(slots=True)
class StepRecord:
    """What one step did: a row of ``run.steps``, and of ``run.memory``."""

    step: int
    start: int
    duration: int
    num_running: int
    num_waiting: int
    prefill_tokens: int
    decode_tokens: int
    moves: int
    preemptions: int
    """Since the run began."""
    memory: Memory


@dataclass(slots=True)
class Totals:
    """Counts over a run."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    hit_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    swapped_out: int = 0
    prefetch: dict[str, int] = field(
        default_factory=lambda: {"done": 0, "refused": 0, "useful": 0, "useless": 0}
    )
