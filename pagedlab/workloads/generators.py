"""Synthetic workloads. Each is a function of its parameters and its seed alone."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.errors import WorkloadError, nearest
from pagedlab.workloads.source import PREAMBLE, ask, reply
from pagedlab.workloads.workload import Workload

Span = int | tuple[int, int]
"""A number of tokens, or the smallest and the largest of a uniform draw."""

CONTENT_IDS = 1 << 30
"""Random contents are drawn from so many ids: equal ones by chance are rare before they meet a vocabulary."""


def chat(
    seed: int = 0,
    *,
    conversations: int = 16,
    turns: int = 4,
    max_tokens: int = 32,
    rate: float = 16.0,
    think_time: float = 0.5,
) -> Workload:
    """Conversations with a growing history, each turn a request that repeats all before it.

    The texts look like Python source that is written piece by piece, and all begin with the same preamble, so
    prefixes are shared between turns and between conversations. The history holds scripted answers, not what the
    model says. Conversations begin at ``rate`` a second (Poisson); between the turns of one pass ``think_time``
    seconds on average (exponential).
    """
    _check_counts(conversations=conversations, turns=turns, max_tokens=max_tokens)
    rng = random.Random(seed)
    requests = []
    begin = 0.0
    for c in range(conversations):
        at, history = begin, PREAMBLE
        for t in range(turns):
            question, arguments = ask(rng)
            prompt = history + question
            requests.append(
                Request(
                    request_id=f"chat-{c}-{t}",
                    prompt=(),
                    text=prompt,
                    arrival=at,
                    sampling=SamplingParams(max_tokens=max_tokens),
                    session=f"chat-{c}",
                )
            )
            history = prompt + reply(rng, arguments)
            at += _gap(rng, think_time)
        begin += _gap(rng, 1 / rate if rate > 0 else 0.0)
    requests.sort(key=lambda r: r.arrival)
    about = f"{conversations} conversations of {turns} turns; each turn repeats the history before it."
    return Workload("chat", tuple(requests), about)


def shared_prefix(
    seed: int = 0,
    *,
    num_requests: int = 64,
    num_prefixes: int = 4,
    prefix: Span = 256,
    tail: Span = (8, 64),
    output: Span = (16, 64),
    rate: float | None = None,
) -> Workload:
    """A few long prefixes (system prompts), each followed by a tail of the request's own."""
    _check_counts(num_requests=num_requests, num_prefixes=num_prefixes)
    rng = random.Random(seed)
    shared = [_ids(rng, _draw(rng, prefix, "prefix")) for _ in range(num_prefixes)]
    arrive = _Arrivals(rng, rate)
    requests = []
    for i in range(num_requests):
        which = rng.randrange(num_prefixes)
        prompt = shared[which] + _ids(rng, _draw(rng, tail, "tail"))
        requests.append(
            _fixed(f"shared-{i}", prompt, _draw(rng, output, "output"), next(arrive), f"prefix-{which}")
        )
    about = f"{num_requests} requests over {num_prefixes} shared prefixes; outputs of fixed length."
    return Workload("shared-prefix", tuple(requests), about, content_ids=True)


def mixed_lengths(
    seed: int = 0,
    *,
    num_requests: int = 64,
    prompt: Span = (32, 256),
    output: Span = (16, 128),
    rate: float | None = None,
) -> Workload:
    """Random token ids of mixed lengths, nothing shared; each request's output has a fixed length of its own."""
    _check_counts(num_requests=num_requests)
    rng = random.Random(seed)
    arrive = _Arrivals(rng, rate)
    requests = [
        _fixed(
            f"mixed-{i}", _ids(rng, _draw(rng, prompt, "prompt")), _draw(rng, output, "output"), next(arrive)
        )
        for i in range(num_requests)
    ]
    about = f"{num_requests} requests of random tokens; outputs of fixed length."
    return Workload("mixed-lengths", tuple(requests), about, content_ids=True)


def parallel_samples(
    seed: int = 0,
    *,
    num_requests: int = 8,
    n: int = 4,
    prompt: Span = (32, 128),
    output: Span = 32,
    temperature: float = 1.0,
    rate: float | None = None,
) -> Workload:
    """Each request asks for ``n`` samples of one prompt, which share its blocks until they part."""
    _check_counts(num_requests=num_requests, n=n)
    rng = random.Random(seed)
    arrive = _Arrivals(rng, rate)
    requests = []
    for i in range(num_requests):
        length = _draw(rng, output, "output")
        sampling = SamplingParams(
            max_tokens=length, n=n, temperature=temperature, ignore_eos=True, seed=rng.randrange(1 << 31)
        )
        ids = _ids(rng, _draw(rng, prompt, "prompt"))
        requests.append(
            Request(
                request_id=f"parallel-{i}",
                prompt=ids,
                arrival=next(arrive),
                sampling=sampling,
                hints=Hints(output_len=length),
            )
        )
    return Workload(
        "parallel-samples", tuple(requests), f"{num_requests} requests of {n} samples each.", content_ids=True
    )


GENERATORS: dict[str, Callable[..., Workload]] = {
    "chat": chat,
    "mixed-lengths": mixed_lengths,
    "parallel-samples": parallel_samples,
    "shared-prefix": shared_prefix,
}


def load(name: str, **params: Any) -> Workload:
    """Return a workload by name; raises `WorkloadError` for an unknown name or parameter, with the nearest.

    >>> len(load("mixed-lengths", num_requests=5))
    5
    """
    if name not in GENERATORS:
        raise WorkloadError(
            f"no workload {name!r}; known: {', '.join(GENERATORS)}{nearest(name, GENERATORS)}"
        )
    allowed = inspect.signature(GENERATORS[name]).parameters
    for key in params:
        if key not in allowed:
            raise WorkloadError(
                f"workload {name!r} has no parameter {key!r}; it has: {', '.join(allowed)}{nearest(key, allowed)}"
            )
    return GENERATORS[name](**params)


def list_workloads() -> list[dict[str, Any]]:
    """One row per workload: ``name``, ``summary`` (first docstring line) and ``params`` with their defaults."""
    rows = []
    for name, make in GENERATORS.items():
        params = {p.name: p.default for p in inspect.signature(make).parameters.values()}
        rows.append({"name": name, "summary": (make.__doc__ or "").strip().split("\n")[0], "params": params})
    return rows


def _fixed(name: str, prompt: list[int], output: int, arrival: float, session: str | None = None) -> Request:
    return Request(
        request_id=name,
        prompt=prompt,
        arrival=arrival,
        sampling=SamplingParams(max_tokens=output, ignore_eos=True),
        hints=Hints(output_len=output),
        session=session,
    )


class _Arrivals:
    """Arrival times in seconds: Poisson at ``rate`` a second, or all at 0."""

    def __init__(self, rng: random.Random, rate: float | None) -> None:
        if rate is not None and not rate > 0:
            raise WorkloadError(f"rate must be above 0 requests a second, not {rate!r}")
        # Its own generator, so that the rate changes when requests come and not what they are.
        self._rng = random.Random(rng.getrandbits(64))
        self._rate = rate
        self._at = 0.0

    def __next__(self) -> float:
        at = self._at
        if self._rate is not None:
            self._at += self._rng.expovariate(self._rate)
        return at


def _gap(rng: random.Random, mean: float) -> float:
    return rng.expovariate(1.0) * mean


def _ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(CONTENT_IDS) for _ in range(n)]


def _draw(rng: random.Random, span: Span, what: str) -> int:
    low, high = (span, span) if isinstance(span, int) else span
    if not 1 <= low <= high:
        raise WorkloadError(f"{what}={span!r} must be a length or (shortest, longest), at least 1 token")
    return rng.randint(low, high)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise WorkloadError(f"{name} must be a whole number of at least 1, not {value!r}")
