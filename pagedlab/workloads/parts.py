"""What generators and readers of traces are made of: arrivals, lengths, outputs of fixed length, private prompts."""

from __future__ import annotations

import random
from functools import lru_cache

from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt

Span = int | tuple[int, int]
"""A number of tokens, or the smallest and the largest of a uniform draw."""

PRIVATE_BLOCK = 720_720 * 1024
"""Tokens per id where nothing is shared: longer than any prompt, so one id is enough, and it is never a whole block.

It is a multiple of every number up to 16 and of the powers of two up to 16,384, so such a prompt fits any usual size of
block.
"""

MAX_TOKENS = 1 << 28
"""No prompt and no output is longer; more is a broken file."""


def private_prompt(unique: int, num_tokens: int) -> HashedPrompt:
    """Return a prompt of ``num_tokens`` tokens that shares nothing with any other; ``unique`` is its own number."""
    return HashedPrompt((unique,), num_tokens, PRIVATE_BLOCK)


@lru_cache(maxsize=65536)
def fixed_sampling(output: int) -> SamplingParams:
    """Return parameters for an output of exactly that many tokens; requests of equal length share one object."""
    return SamplingParams(max_tokens=output, ignore_eos=True)


@lru_cache(maxsize=65536)
def fixed_hints(output: int, agent_step: int | None = None) -> Hints:
    """Return hints that announce the length, shared likewise."""
    return Hints(output_len=output, agent_step=agent_step)


def fixed(
    name: str,
    prompt: list[int] | HashedPrompt,
    output: int,
    arrival: float,
    session: str | None = None,
    *,
    request_class: str | None = None,
    agent_step: int | None = None,
    follows: str | None = None,
    think_time: float = 0.0,
    text: str | None = None,
) -> Request:
    """Return a request whose output has ``output`` tokens, neither more nor fewer, and whose hints say so."""
    return Request(
        request_id=name,
        prompt=prompt,
        arrival=arrival,
        sampling=fixed_sampling(output),
        hints=fixed_hints(output, agent_step),
        session=session,
        request_class=request_class,
        follows=follows,
        think_time=think_time,
        text=text,
    )


class Arrivals:
    """Arrival times in seconds, in order: at ``rate`` a second on average, or all at 0.

    The gaps are gamma distributed with shape ``burstiness``: 1 is Poisson, less comes in bursts (the variance of a gap
    is the squared mean divided by the shape), more comes evenly.
    """

    def __init__(self, rng: random.Random, rate: float | None, burstiness: float = 1.0) -> None:
        if rate is not None and not 0 < rate < float("inf"):
            raise WorkloadError(f"rate must be above 0 requests a second, not {rate!r}")
        if not 0 < burstiness < float("inf"):
            raise WorkloadError(f"burstiness must be above 0 (1: Poisson), not {burstiness!r}")
        # Its own generator, so that the rate changes when requests come and not what they are.
        self._rng = random.Random(rng.getrandbits(64))
        self._rate, self._shape = rate, burstiness
        self._at = 0.0

    def __next__(self) -> float:
        at = self._at
        if self._rate is not None:
            if self._shape == 1.0:
                self._at += self._rng.expovariate(self._rate)
            else:
                self._at += self._rng.gammavariate(self._shape, 1 / (self._shape * self._rate))
        return at


def gap(rng: random.Random, mean: float) -> float:
    """Return an exponential pause of ``mean`` seconds."""
    return rng.expovariate(1.0) * mean


def draw(rng: random.Random, span: Span, what: str) -> int:
    """Return a length from ``span``; ``what`` names it in the error for a span that is none."""
    low, high = (span, span) if isinstance(span, int) else span
    if not 1 <= low <= high:
        raise WorkloadError(f"{what}={span!r} must be a length or (shortest, longest), at least 1 token")
    return rng.randint(low, high)


def check_counts(**counts: int) -> None:
    """Raise `WorkloadError` for the first that is not a whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise WorkloadError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_least(low: float, **values: float) -> None:
    """Raise `WorkloadError` for the first that is not a finite number of at least ``low``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < float("inf"):
            raise WorkloadError(f"{name} must be a number of at least {low:g}, not {value!r}")
