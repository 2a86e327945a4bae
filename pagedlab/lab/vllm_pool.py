"""How many blocks a vLLM run had, where its log does not say so.

Whoever is admitted for the first time after waiting for room comes when nobody who was preempted waits any more (those
stand at the front of the queue), and when there is about as much room as it needs. At that moment the blocks of all who
have been scheduled and have not ended are the pool, but for less than one prompt's. So time stamps of requests alone
tell the pool's size to one or two percent; without a queue, the catalogue's guess has to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from pagedlab.costs import find_hardware, find_model, pool_blocks
from pagedlab.costs.vllm_log import VllmRequest, VllmRun
from pagedlab.engine.request import Request
from pagedlab.policies.lookup import make_prefix

WAITED = 0.1
"""Seconds in the queue from which on a request counts as one that waited."""
NEARLY_FULL = 0.85
"""Of the largest demand: who waited while there was less did so for tokens of a step, not for room."""
LEAST_SEEN = 8
"""Admissions that have to speak for a size."""


class PoolGuess(NamedTuple):
    """About how many blocks there are, and how far, in natural logarithms, that may be off."""

    num_blocks: int
    sigma: float


def likely_pool(run: VllmRun, model: str, hardware: str, block_size: int) -> int:
    """Return how many blocks the catalogue says fit beside the weights."""
    share = float(run.settings.get("gpu_memory_utilization") or 0.9)
    return pool_blocks(find_model(model), find_hardware(hardware), run.tensor_parallel, block_size, share)


def observed_pool(seen: VllmRun, requests: Sequence[Request], block_size: int) -> int | None:
    """Return how many blocks the requests of ``seen`` had between them when one of them had waited for room, the null
    block included; None if too few had.

    ``requests`` are the same with their tokens (and perhaps more). A beginning that several have counts once; an output
    grows evenly between its first and last token.
    """
    tokens = {r.request_id: r.prompt for r in requests}
    prompts = {
        r.request_id: make_prefix(list(tokens[r.request_id]), block_size).keys(r.input_tokens // block_size)
        for r in seen.requests
    }
    waiters = [r for r in seen.requests if r.scheduled - r.queued > WAITED]
    demands = [_demand(now.scheduled, seen.requests, prompts, block_size) for now in waiters]
    full = [d for d in demands if d >= NEARLY_FULL * max(demands)]
    return round(median(full)) if len(full) >= LEAST_SEEN else None


def _demand(at: float, known: Sequence[VllmRequest], prompts: dict[str, list[int]], block_size: int) -> int:
    """Return the blocks of those who have been scheduled ``at`` that time and have not ended, and the null block."""
    shared: set[int] = set()
    own = 1
    for r in known:
        if r.scheduled <= at < r.last_token:
            share = max(0.0, at - r.first_token) / max(r.last_token - r.first_token, 1e-9)
            tokens = r.input_tokens + int(share * r.output_tokens)
            shared.update(prompts[r.request_id])
            own += -(-tokens // block_size) - len(prompts[r.request_id])
    return own + len(shared)
