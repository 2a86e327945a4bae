"""More synthetic workloads: conversations and agents in closed loop, retrieval, published lengths, bare block accesses.

Each is a function of its parameters and its seed alone. With ``hash_block`` a prompt is kept as one id for so many
tokens instead of token by token; lengths, arrivals and what is shared are the same. Hashes say nothing of what is
generated, so `Workload.outputs` is only there in the token form.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from itertools import accumulate, islice

from pagedlab.engine.request import Request
from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt
from pagedlab.workloads.content import empty_text
from pagedlab.workloads.parts import (
    Arrivals,
    Span,
    check_counts,
    check_least,
    draw,
    fixed,
    gap,
    private_prompt,
)
from pagedlab.workloads.workload import Workload


def conversations(
    seed: int = 0,
    *,
    sessions: int = 16,
    turns: Span = (2, 6),
    system: Span = 64,
    question: Span = (16, 64),
    answer: Span = (16, 128),
    think_time: float = 5.0,
    rate: float | None = 1.0,
    burstiness: float = 1.0,
    closed_loop: bool = True,
    hash_block: int | None = None,
) -> Workload:
    """Conversations in tokens: each turn repeats the history, and is sent after a pause once the answer is there.

    All begin with the same system prompt of ``system`` tokens. Conversations begin at ``rate`` a second; the pause
    before each further turn is exponential with mean ``think_time`` seconds. The history holds the answers in
    `Workload.outputs`. Without ``closed_loop`` the turns come at their nominal times, as if answers took no time.
    """
    check_counts(sessions=sessions)
    check_least(0, think_time=think_time)
    rng = random.Random(seed)
    opening = empty_text(rng, hash_block)
    opening.add_shared("system", draw(rng, system, "system"))
    arrive = Arrivals(rng, rate, burstiness)
    requests: list[Request] = []
    outputs: dict[str, list[int]] = {}
    for s in range(sessions):
        text, at, before, pause = opening.fork(), next(arrive), None, 0.0
        for t in range(draw(rng, turns, "turns")):
            text.add(draw(rng, question, "question"))
            name, length = f"conversation-{s}-{t}", draw(rng, answer, "answer")
            requests.append(
                fixed(
                    name,
                    text.prompt(),
                    length,
                    at,
                    f"conversation-{s}",
                    follows=before,
                    think_time=pause if closed_loop else 0.0,
                )
            )
            if (said := text.add(length)) is not None:
                outputs[name] = said
            pause = gap(rng, think_time)
            at += pause
            before = name if closed_loop else None
    requests.sort(key=lambda r: r.arrival)
    about = f"{sessions} conversations over one system prompt; each turn repeats the history before it."
    return Workload("conversations", tuple(requests), about, content_ids=True, outputs=outputs or None)


def agents(
    seed: int = 0,
    *,
    num_agents: int = 8,
    steps: Span = (4, 10),
    system: Span = 256,
    task: Span = (64, 256),
    action: Span = (16, 96),
    observation: Span = (16, 256),
    pause: float = 2.0,
    rate: float | None = 0.5,
    burstiness: float = 1.0,
    closed_loop: bool = True,
    hash_block: int | None = None,
) -> Workload:
    """Agents that call a tool after every step: the context grows by what was said and what the tool answered.

    All share a system prompt (tools and rules) and each has a task of its own. A tool takes ``pause`` seconds on
    average (exponential); then the next step follows. `Hints.agent_step` counts the steps from 0. Agents start at
    ``rate`` a second.
    """
    check_counts(num_agents=num_agents)
    check_least(0, pause=pause)
    rng = random.Random(seed)
    opening = empty_text(rng, hash_block)
    opening.add_shared("system", draw(rng, system, "system"))
    arrive = Arrivals(rng, rate, burstiness)
    requests: list[Request] = []
    outputs: dict[str, list[int]] = {}
    for a in range(num_agents):
        text, at, before, waited = opening.fork(), next(arrive), None, 0.0
        text.add(draw(rng, task, "task"))
        for step in range(draw(rng, steps, "steps")):
            name, length = f"agent-{a}-{step}", draw(rng, action, "action")
            requests.append(
                fixed(
                    name,
                    text.prompt(),
                    length,
                    at,
                    f"agent-{a}",
                    agent_step=step,
                    follows=before,
                    think_time=waited if closed_loop else 0.0,
                )
            )
            if (said := text.add(length)) is not None:
                outputs[name] = said
            text.add(draw(rng, observation, "observation"))
            waited = gap(rng, pause)
            at += waited
            before = name if closed_loop else None
    requests.sort(key=lambda r: r.arrival)
    about = f"{num_agents} agents with a tool call after every step; contexts only grow."
    return Workload("agents", tuple(requests), about, content_ids=True, outputs=outputs or None)


def rag(
    seed: int = 0,
    *,
    num_requests: int = 64,
    documents: int = 50,
    per_prompt: int = 3,
    alpha: float = 1.0,
    order: str = "popular-first",
    system: Span = 64,
    document: Span = (64, 256),
    question: Span = (16, 64),
    output: Span = (16, 64),
    rate: float | None = None,
    burstiness: float = 1.0,
    hash_block: int | None = None,
) -> Workload:
    """Retrieval: a system prompt, ``per_prompt`` different documents, a question of the request's own.

    The k-th document is drawn with a weight of 1 / k**alpha (Zipf). In ``order`` "popular-first" the documents of a
    prompt stand by rank, so that prompts share prefixes; in order "drawn" they stand as they were drawn.
    """
    check_counts(num_requests=num_requests, documents=documents, per_prompt=per_prompt)
    check_least(0, alpha=alpha)
    if per_prompt > documents:
        raise WorkloadError(
            f"per_prompt={per_prompt} different documents need as many; documents={documents}"
        )
    if order not in ("popular-first", "drawn"):
        raise WorkloadError(f"order must be popular-first or drawn, not {order!r}")
    rng = random.Random(seed)
    opening = empty_text(rng, hash_block)
    opening.add_shared("system", draw(rng, system, "system"))
    lengths = [draw(rng, document, "document") for _ in range(documents)]
    weights = _zipf(documents, alpha)
    arrive = Arrivals(rng, rate, burstiness)
    requests = []
    for i in range(num_requests):
        drawn = _different(rng, weights, per_prompt)
        text = opening.fork()
        for which in sorted(drawn) if order == "popular-first" else drawn:
            text.add_shared(which, lengths[which])
        text.add(draw(rng, question, "question"))
        requests.append(fixed(f"rag-{i}", text.prompt(), draw(rng, output, "output"), next(arrive)))
    about = f"{num_requests} questions over {documents} documents, {per_prompt} in each prompt."
    return Workload("rag", tuple(requests), about, content_ids=True)


def _different(rng: random.Random, weights: list[float], n: int) -> list[int]:
    """Draw ``n`` different ranks; where the weights leave hardly a chance, the most popular that are left."""
    drawn: dict[int, None] = {}
    for _ in range(100 * n):
        drawn[bisect(weights, rng.random() * weights[-1], hi=len(weights) - 1)] = None
        if len(drawn) == n:
            return list(drawn)
    left = (rank for rank in range(len(weights)) if rank not in drawn)
    return [*drawn, *islice(left, n - len(drawn))]


def sharegpt_like(
    seed: int = 0,
    *,
    num_requests: int = 64,
    rate: float | None = None,
    burstiness: float = 1.0,
    hashed: bool = False,
) -> Workload:
    """Lengths like ShareGPT's: log-normal with means of 161 input and 338 output tokens, nothing shared.

    The means are those of the vLLM paper (Kwon et al. 2023, figure 11). The spreads are a choice: sigma 1.2 within 4 to
    1,024 tokens for inputs, sigma 1.0 within 4 to 2,048 for outputs. The means hold after clipping.
    """
    return _lengths(
        "sharegpt-like",
        seed,
        num_requests,
        (161, 1.2, 4, 1024),
        (338, 1.0, 4, 2048),
        rate,
        burstiness,
        hashed,
    )


def alpaca_like(
    seed: int = 0,
    *,
    num_requests: int = 64,
    rate: float | None = None,
    burstiness: float = 1.0,
    hashed: bool = False,
) -> Workload:
    """Lengths like Alpaca's: log-normal with means of 19 input and 58 output tokens, nothing shared.

    The means are those of the vLLM paper (Kwon et al. 2023, figure 11). The spreads are a choice: sigma 0.5 within 4 to
    256 tokens for inputs, sigma 0.9 within 2 to 512 for outputs. The means hold after clipping.
    """
    return _lengths(
        "alpaca-like",
        seed,
        num_requests,
        (19, 0.5, 4, 256),
        (58, 0.9, 2, 512),
        rate,
        burstiness,
        hashed,
    )


def zipf(
    seed: int = 0,
    *,
    num_requests: int = 256,
    blocks: int = 64,
    alpha: float = 1.0,
    block: int = 16,
    tail: int = 1,
    output: int = 1,
    rate: float | None = None,
    burstiness: float = 1.0,
    hashed: bool = False,
) -> Workload:
    """Accesses to single blocks, the k-th of ``blocks`` with a weight of 1 / k**alpha.

    A prompt is one block of ``block`` tokens and ``tail`` tokens of its own: an engine always computes at least one
    token, so a prompt without a tail would never hit. ``tail=0`` gives the bare stream of accesses. ``hashed`` keeps
    prompts as hashes of ``block`` tokens.
    """
    check_counts(num_requests=num_requests, blocks=blocks)
    check_least(0, alpha=alpha)
    rng = random.Random(seed)
    access = _Accesses(rng, block, tail, hashed)
    arrive = Arrivals(rng, rate, burstiness)
    drawn = rng.choices(range(blocks), cum_weights=_zipf(blocks, alpha), k=num_requests)
    requests = [
        fixed(f"zipf-{i}", access.prompt(which), output, next(arrive)) for i, which in enumerate(drawn)
    ]
    about = f"{num_requests} accesses to {blocks} blocks, Zipf with alpha {alpha:g}."
    return Workload("zipf", tuple(requests), about, content_ids=True)


def scan_loop(
    seed: int = 0,
    *,
    num_requests: int = 256,
    loop: int = 32,
    scan: float = 0.5,
    block: int = 16,
    tail: int = 1,
    output: int = 1,
    rate: float | None = None,
    burstiness: float = 1.0,
    hashed: bool = False,
) -> Workload:
    """A loop over ``loop`` blocks, mixed with a scan of blocks that never come again.

    Each access belongs to the scan with probability ``scan``, else it is the next one of the loop: recency alone keeps
    what the scan brought. Blocks and tails as in ``zipf``.
    """
    check_counts(num_requests=num_requests, loop=loop)
    if not 0 <= scan <= 1:
        raise WorkloadError(f"scan must be a share from 0 to 1, not {scan!r}")
    rng = random.Random(seed)
    access = _Accesses(rng, block, tail, hashed)
    arrive = Arrivals(rng, rate, burstiness)
    requests = []
    looped, scanned = rng.randrange(loop), loop
    for i in range(num_requests):
        if rng.random() < scan:
            which = scanned
            scanned += 1
        else:
            which = looped
            looped = (looped + 1) % loop
        requests.append(fixed(f"scan-loop-{i}", access.prompt(which), output, next(arrive)))
    about = f"{num_requests} accesses: a loop over {loop} blocks, and a scan with a share of {scan:g}."
    return Workload("scan-loop", tuple(requests), about, content_ids=True)


class _Accesses:
    """Prompts of one block each, and a tail that nobody shares."""

    def __init__(self, rng: random.Random, block: int, tail: int, hashed: bool) -> None:
        check_counts(block=block)
        if isinstance(tail, bool) or not isinstance(tail, int) or not 0 <= tail < block:
            raise WorkloadError(
                f"tail must be a whole number from 0 to {block - 1} (block - 1), not {tail!r}"
            )
        self._block, self._tail, self._hashed = block, tail, hashed
        self._empty = empty_text(rng, None)
        self._made: dict[int, HashedPrompt] = {}
        self._unique = 0

    def prompt(self, which: int) -> list[int] | HashedPrompt:
        if not self._hashed:
            text = self._empty.fork()
            text.add_shared(which, self._block)
            if self._tail:
                text.add(self._tail)
            return text.prompt()
        if self._tail:
            # Blocks have even ids and tails odd ones, so neither needs to know how many there are of the other.
            self._unique += 1
            return HashedPrompt((2 * which, 2 * self._unique + 1), self._block + self._tail, self._block)
        if which not in self._made:
            self._made[which] = HashedPrompt((2 * which,), self._block, self._block)
        return self._made[which]


def _lengths(
    name: str,
    seed: int,
    num_requests: int,
    prompt: tuple[float, float, int, int],
    output: tuple[float, float, int, int],
    rate: float | None,
    burstiness: float,
    hashed: bool,
) -> Workload:
    check_counts(num_requests=num_requests)
    rng = random.Random(seed)
    empty = empty_text(rng, None)
    arrive = Arrivals(rng, rate, burstiness)
    ins, outs = LogNormal(*prompt), LogNormal(*output)
    requests = []
    for i in range(num_requests):
        length = ins.draw(rng)
        if hashed:
            ids: list[int] | HashedPrompt = private_prompt(i, length)
        else:
            text = empty.fork()
            text.add(length)
            ids = text.prompt()
        requests.append(fixed(f"{name}-{i}", ids, outs.draw(rng), next(arrive)))
    about = (
        f"{num_requests} requests; log-normal lengths with means of {prompt[0]:g} and {output[0]:g} tokens."
    )
    return Workload(name, tuple(requests), about, content_ids=True)


class LogNormal:
    """Whole lengths from a log-normal distribution, clipped to ``low`` and ``high``, whose mean *then* is ``mean``."""

    def __init__(self, mean: float, sigma: float, low: int, high: int) -> None:
        if not low < mean < high or not sigma > 0:
            raise WorkloadError(f"a mean of {mean} within {low} to {high} with sigma {sigma} is impossible")
        self.sigma, self.low, self.high = sigma, low, high
        # The clipped mean grows with mu: halve the interval until mu is exact.
        a, b = math.log(low) - 10 * sigma, math.log(high) + 10 * sigma
        for _ in range(80):
            self.mu = (a + b) / 2
            if self._mean() < mean:
                a = self.mu
            else:
                b = self.mu

    def _mean(self) -> float:
        mu, sigma = self.mu, self.sigma
        low, high = ((math.log(edge) - mu) / sigma for edge in (self.low, self.high))
        inside = math.exp(mu + sigma * sigma / 2) * (_normal(high - sigma) - _normal(low - sigma))
        return self.low * _normal(low) + inside + self.high * (1 - _normal(high))

    def draw(self, rng: random.Random) -> int:
        """Return one length."""
        return min(max(round(rng.lognormvariate(self.mu, self.sigma)), self.low), self.high)


def _normal(x: float) -> float:
    """Return the normal distribution's cumulative probability."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _zipf(n: int, alpha: float) -> list[float]:
    """Return cumulative weights of ranks 0 to n - 1."""
    return list(accumulate((k + 1) ** -alpha for k in range(n)))
