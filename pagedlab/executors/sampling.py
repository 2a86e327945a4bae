"""From logits to tokens: greedy rows all at once, the others one by one with transformers' own processors.

The draw for a token depends on the request's seed, the number of the sample and the token's position alone, so
that preemption, batching and policies cannot change it (given equal logits).
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pagedlab.engine.orders import SequenceStep
from pagedlab.engine.request import SamplingParams

_MASK = (1 << 64) - 1
_CHUNK = 1024


def draw_seed(seed: int, sample: int, position: int) -> int:
    """Return the 63-bit seed of one draw: a fixed integer hash (splitmix64) of its three arguments.

    >>> draw_seed(0, 0, 7) == draw_seed(0, 0, 7) != draw_seed(0, 1, 7)
    True
    """
    state = 0
    for part in (seed, sample, position):
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def processors(params: SamplingParams) -> LogitsProcessorList:
    """Return what `generate` would apply for these parameters, in the order in which it does."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(penalty=float(params.repetition_penalty)))
    if params.greedy:
        return chain
    if params.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        chain.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p=float(params.top_p)))
    if params.min_p > 0.0:
        chain.append(MinPLogitsWarper(min_p=float(params.min_p)))
    return chain


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Return what `torch.argmax` gives for each row of ``logits`` [n, vocab]: the first NaN, or the first largest.

    torch's argmax takes a number at a time and its amax sixteen; so the chunk with the answer is found by the latter,
    which for 16 rows of 49,152 takes 0.05 ms instead of 0.65 (float32), 0.2 instead of 2.8 (bfloat16).
    """
    vocab = logits.shape[1]
    chunks = vocab // _CHUNK
    if chunks < 2:
        return logits.argmax(-1)
    tops = logits[:, : chunks * _CHUNK].unflatten(-1, (chunks, _CHUNK)).amax(-1)
    if vocab % _CHUNK:
        tops = torch.cat([tops, logits[:, chunks * _CHUNK :].amax(-1, keepdim=True)], dim=1)
    # A short last chunk is looked at together with the end of the one before it, where nothing is as large.
    start = (tops.argmax(-1) * _CHUNK).clamp_max(vocab - _CHUNK)
    window = logits.gather(1, start[:, None] + torch.arange(_CHUNK, device=logits.device))
    best: torch.Tensor = start + window.argmax(-1)
    return best


def sample(logits: torch.Tensor, steps: Sequence[SequenceStep]) -> tuple[list[list[int]], dict[int, str]]:
    """Draw ``steps[i].num_samples`` tokens from row i of ``logits`` [len(steps), vocab].

    Returns the tokens row by row, and for each row that cannot be trusted (NaN) the reason, with no tokens.
    Greedy takes the lowest index among equal logits, as `torch.argmax` does.
    """
    best = greedy(logits)
    # argmax lands on a NaN if there is one, so the value there tells without another pass over the logits.
    broken = logits.gather(-1, best[:, None])[:, 0].isnan().tolist()
    tokens: list[list[int]] = []
    failures: dict[int, str] = {}
    for i, (token, step) in enumerate(zip(best.tolist(), steps, strict=True)):
        params = step.sampling
        if broken[i]:
            failures[i] = f"the model's logits at position {step.context_len - 1} are not numbers (NaN)"
            tokens.append([])
            continue
        if params.greedy and params.repetition_penalty == 1.0:
            tokens.append([token] * step.num_samples)
        else:
            tokens.append(_draw(logits[i], step))
    return tokens, failures


def _draw(row: torch.Tensor, step: SequenceStep) -> list[int]:
    params = step.sampling
    # `generate` works on a float32 copy of the logits; float64 stays what it is.
    scores = row[None].to(torch.float32) if row.dtype.itemsize < 4 else row[None].clone()
    history = torch.tensor([list(step.history)], device=row.device, dtype=torch.long)
    scores = processors(params)(history, scores)  # type: ignore[arg-type]
    if params.greedy:
        return [int(scores[0].argmax())] * step.num_samples
    # Drawn on the CPU, in float32, so that one seed says the same on every device.
    probabilities = scores[0].softmax(-1).to("cpu", torch.float32)
    generator = torch.Generator()
    drawn = []
    for i in range(step.num_samples):
        generator.manual_seed(draw_seed(params.seed or 0, step.sample_index + i, step.context_len))
        drawn.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return drawn
