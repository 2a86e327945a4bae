"""How fast the cache keeps its books: admit and free prompts on one core, prefix caching and events on.

The work: 768-token prompts, of which 512 come from one of 100 shared prefixes (popularity is
Pareto-distributed) and 256 are fresh, through a pool of 2,048 blocks of 16 tokens; tokens are made
beforehand. ``admit`` admits, computes and frees each prompt; ``decode`` appends 256 more tokens to each, one
at a time, before it is freed. Where vLLM's Python package can be imported, its `KVCacheManager` does the same
work in the same process, alternating.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from pagedlab.cache.kv_cache import KVCache
from pagedlab.cache.table import BlockTable
from pagedlab.events import EventLog
from pagedlab.policies import LRU, ChainedHash, Drop
from pagedlab.policies.allocator import FreeList
from pagedlab.policies.lookup import Prefix

BLOCK_SIZE = 16
NUM_BLOCKS = 2048
SHARED, FRESH, NUM_PREFIXES = 512, 256, 100
DECODE_TOKENS = 256
PARETO_SHAPE = 1.16
"""The shape at which 20% of the prefixes get 80% of the requests."""

Contender = Callable[[list[list[int]], int], float]


def make_prompts(num_requests: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of 768 token ids: a shared prefix of 512 and 256 of their own."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(50_000) for _ in range(SHARED)] for _ in range(NUM_PREFIXES)]
    prompts = []
    for _ in range(num_requests):
        which = min(int(rng.paretovariate(PARETO_SHAPE)) - 1, NUM_PREFIXES - 1)
        prompts.append(prefixes[which] + [rng.randrange(50_000) for _ in range(FRESH)])
    return prompts


def pagedlab_seconds(prompts: list[list[int]], decode: int) -> float:
    """Time pagedlab's cache over ``prompts``, each extended by ``decode`` tokens one at a time."""
    cache = KVCache(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        allocator=FreeList(),
        lookup=ChainedHash(),
        eviction=LRU(),
        swap=Drop(),
        events=EventLog(),
    )
    work = [list(prompt) for prompt in prompts]
    start = time.perf_counter()
    for seq_id, tokens in enumerate(work):
        num_prompt = len(tokens)
        table = BlockTable(seq_id, Prefix(tokens, BLOCK_SIZE), num_prompt + decode)
        match = cache.match(table.prefix, num_prompt - 1)
        if not cache.admit(table, match, num_prompt):
            raise RuntimeError("the pool is too small for one prompt")
        cache.commit(table, num_prompt - match.num_tokens)
        for token in range(decode):
            tokens.append(token)
            if not cache.grow(table, num_prompt + token + 1):
                raise RuntimeError("the pool is too small for one prompt")
            cache.commit(table, 1)
        cache.release(table)
    return time.perf_counter() - start


def contenders() -> dict[str, Contender]:
    """Return the implementations that can be run here."""
    found: dict[str, Contender] = {"pagedlab": pagedlab_seconds}
    try:
        from pagedlab.bench.cache_vllm import vllm_seconds
    except Exception:  # any way in which an engine for other hardware fails to import here
        return found
    found["vllm"] = vllm_seconds
    return found


def measure(num_requests: int = 2000, decode_requests: int = 300, repeats: int = 5) -> list[dict[str, Any]]:
    """Run every contender ``repeats`` times, alternating, and return a row for each kind of work and
    contender.
    """
    found = contenders()
    # What the imports left behind is no part of the work: a full collection over it would hit one contender by chance.
    gc.collect()
    gc.freeze()
    rows = []
    for name, count, decode in (("admit", num_requests, 0), ("decode", decode_requests, DECODE_TOKENS)):
        prompts = make_prompts(count)
        rates: dict[str, list[float]] = {who: [] for who in found}
        for _ in range(repeats):
            for who, seconds in found.items():
                rates[who].append(count / seconds(prompts, decode))
        for who, values in rates.items():
            rows.append(
                {
                    "work": name,
                    "contender": who,
                    "requests_per_s": round(statistics.median(values)),
                    "best": round(max(values)),
                    "worst": round(min(values)),
                    "requests": count,
                    "decode_tokens": decode,
                    "block_size": BLOCK_SIZE,
                    "num_blocks": NUM_BLOCKS,
                    "repeats": repeats,
                }
            )
            if who != "pagedlab":
                ours = statistics.median(rates["pagedlab"])
                rows[-1]["ratio_pagedlab"] = round(ours / statistics.median(values), 2)
    return rows


def main(json: bool = False) -> list[dict[str, Any]]:
    """Measure and return the rows (the command line prints them)."""
    return measure()
