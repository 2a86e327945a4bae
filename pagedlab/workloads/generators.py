"""Synthetic workloads. Each is a function of its parameters and its seed alone."""

from __future__ import annotations

import random

from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.workloads.content import empty_text
from pagedlab.workloads.parts import Arrivals, Span, check_counts, draw, fixed, gap, private_prompt
from pagedlab.workloads.source import PREAMBLE, ask, reply
from pagedlab.workloads.workload import Workload

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
    check_counts(conversations=conversations, turns=turns, max_tokens=max_tokens)
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
            at += gap(rng, think_time)
        begin += gap(rng, 1 / rate if rate > 0 else 0.0)
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
    burstiness: float = 1.0,
    hash_block: int | None = None,
) -> Workload:
    """A few long prefixes (system prompts), each followed by a tail of the request's own.

    With ``hash_block`` the prompts are hashes of that many tokens each instead of token ids: far less memory for large
    workloads. (The lengths drawn from one seed differ between the two forms.)
    """
    check_counts(num_requests=num_requests, num_prefixes=num_prefixes)
    rng = random.Random(seed)
    about = f"{num_requests} requests over {num_prefixes} shared prefixes; outputs of fixed length."
    if hash_block is not None:
        nothing = empty_text(rng, hash_block)
        texts = [nothing.fork() for _ in range(num_prefixes)]
        for which, text in enumerate(texts):
            text.add_shared(which, draw(rng, prefix, "prefix"))
        arrive = Arrivals(rng, rate, burstiness)
        requests = []
        for i in range(num_requests):
            which = rng.randrange(num_prefixes)
            text = texts[which].fork()
            text.add(draw(rng, tail, "tail"))
            length = draw(rng, output, "output")
            requests.append(fixed(f"shared-{i}", text.prompt(), length, next(arrive), f"prefix-{which}"))
        return Workload("shared-prefix", tuple(requests), about, content_ids=True)
    shared = [_ids(rng, draw(rng, prefix, "prefix")) for _ in range(num_prefixes)]
    arrive = Arrivals(rng, rate, burstiness)
    requests = []
    for i in range(num_requests):
        which = rng.randrange(num_prefixes)
        prompt = shared[which] + _ids(rng, draw(rng, tail, "tail"))
        requests.append(
            fixed(f"shared-{i}", prompt, draw(rng, output, "output"), next(arrive), f"prefix-{which}")
        )
    return Workload("shared-prefix", tuple(requests), about, content_ids=True)


def mixed_lengths(
    seed: int = 0,
    *,
    num_requests: int = 64,
    prompt: Span = (32, 256),
    output: Span = (16, 128),
    rate: float | None = None,
    burstiness: float = 1.0,
    hashed: bool = False,
) -> Workload:
    """Random token ids of mixed lengths, nothing shared; each request's output has a fixed length of its own.

    With ``hashed`` only the lengths are kept: a prompt is one private hash, and a million requests are cheap. (The
    lengths drawn from one seed differ between the two forms.)
    """
    check_counts(num_requests=num_requests)
    rng = random.Random(seed)
    arrive = Arrivals(rng, rate, burstiness)
    requests = []
    for i in range(num_requests):
        length = draw(rng, prompt, "prompt")
        ids = private_prompt(i, length) if hashed else _ids(rng, length)
        requests.append(fixed(f"mixed-{i}", ids, draw(rng, output, "output"), next(arrive)))
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
    burstiness: float = 1.0,
) -> Workload:
    """Each request asks for ``n`` samples of one prompt, which share its blocks until they part."""
    check_counts(num_requests=num_requests, n=n)
    rng = random.Random(seed)
    arrive = Arrivals(rng, rate, burstiness)
    requests = []
    for i in range(num_requests):
        length = draw(rng, output, "output")
        sampling = SamplingParams(
            max_tokens=length, n=n, temperature=temperature, ignore_eos=True, seed=rng.randrange(1 << 31)
        )
        ids = _ids(rng, draw(rng, prompt, "prompt"))
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


def _ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(CONTENT_IDS) for _ in range(n)]
