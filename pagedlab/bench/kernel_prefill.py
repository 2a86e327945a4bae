"""Chunked prefill on this CPU against torch's attention on the same tokens, gathered for it beforehand.

A chunk is the last ``query_len`` tokens of each context. SDPA gets contiguous keys and values of one sequence and the
mask in each way it takes one (booleans, numbers, ``is_causal`` where the chunk is the whole context), with grouped
heads and with expanded ones, sequence by sequence and all at once; ``ratio_sdpa`` compares with the fastest at that
point. Contenders take turns in random order; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pagedlab.bench.kernel import GROUP, HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, SCALE, chunk_batch, threads_of
from pagedlab.kernels.cpu import CPUPagedAttention
from pagedlab.kernels.dense import visible
from pagedlab.registry import make, policy_names

POINTS = ((1, 256, 256), (1, 1024, 1024), (1, 256, 1024), (1, 256, 8192), (4, 64, 1024))
"""Sequences, query tokens of each, tokens of context of each."""
BLOCK_SIZE = 16


def contenders(
    num_seqs: int,
    query_len: int,
    context_len: int,
    *,
    layouts: Iterable[str],
    dtype: torch.dtype,
    rng: torch.Generator,
) -> dict[tuple[str, str], Callable[[], torch.Tensor]]:
    """Return what runs at one point, by kernel and layout: [num_seqs * query_len, num_heads, head_size] each."""
    made: dict[tuple[str, str], Callable[[], torch.Tensor]] = {}
    query = torch.randn(num_seqs, query_len, NUM_HEADS, HEAD_SIZE, generator=rng).to(dtype)
    keys, values = torch.randn(2, num_seqs, NUM_KV_HEADS, context_len, HEAD_SIZE, generator=rng).to(dtype)
    seen = visible(query_len, context_len, None, query.device)
    numbers = torch.zeros(query_len, context_len, dtype=dtype).masked_fill(~seen, float("-inf"))
    wide = [x.repeat_interleave(GROUP, dim=1) for x in (keys, values)]

    def dense(
        k: torch.Tensor, v: torch.Tensor, *, at_once: bool, **options: Any
    ) -> Callable[[], torch.Tensor]:
        q = query.transpose(1, 2)

        def run() -> torch.Tensor:
            if at_once:
                return sdpa(q, k, v, **options).transpose(1, 2).flatten(0, 1)
            parts = [sdpa(q[s, None], k[s, None], v[s, None], **options) for s in range(num_seqs)]
            return torch.cat([part[0].transpose(0, 1) for part in parts])

        return run

    masks: dict[str, dict[str, Any]] = {"booleans": {"attn_mask": seen}, "numbers": {"attn_mask": numbers}}
    if query_len == context_len:
        masks["is_causal"] = {"is_causal": True}
    for (name, mask), at_once in product(masks.items(), {True, num_seqs == 1}):
        how = name if num_seqs == 1 else f"{name}, {'at once' if at_once else 'in turn'}"
        made[f"sdpa enable_gqa, {how}", "contiguous"] = dense(
            keys, values, at_once=at_once, enable_gqa=True, **mask
        )
        made[f"sdpa expanded, {how}", "contiguous"] = dense(*wide, at_once=at_once, **mask)

    def paged(name: str) -> Callable[[], torch.Tensor]:
        layout: Any = make("layout", name)
        batch = chunk_batch(layout, num_seqs, query_len, context_len, BLOCK_SIZE, rng)
        attention = CPUPagedAttention(layout)
        caches: list[torch.Tensor] = []
        tables = torch.tensor([layout.decode(row) for row in range(num_seqs)]).flatten()
        for x in (keys, values):
            pieces = x.view(num_seqs, NUM_KV_HEADS, -1, BLOCK_SIZE, HEAD_SIZE).transpose(1, 2).flatten(0, 1)
            caches.append(torch.empty_like(pieces).contiguous())
            caches[-1][tables] = pieces
        return lambda: attention.attend(query.flatten(0, 1), caches[0], caches[1], batch, scale=SCALE)

    for name in layouts:
        made["cpu-paged", name] = paged(name)
    return made


def measure(
    *,
    points: Iterable[tuple[int, int, int]] = POINTS,
    layouts: Iterable[str] | None = None,
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    threads: Iterable[int] | None = None,
    seconds: float = 3.0,
) -> list[dict[str, Any]]:
    """Return one row per point, kernel, layout, dtype and number of threads; each point takes about ``seconds``."""
    rows: list[dict[str, Any]] = []
    names = list(policy_names("layout") if layouts is None else layouts)
    for title in dtypes:
        for count in threads or (torch.get_num_threads(),):
            for num_seqs, query_len, context_len in points:
                rng = torch.Generator().manual_seed(0)
                with torch.inference_mode(), threads_of(count):
                    forms = contenders(
                        num_seqs, query_len, context_len, layouts=names, dtype=getattr(torch, title), rng=rng
                    )
                    times = _timed(forms, seconds)
                dense = min(
                    (t for (kernel, _), t in times.items() if kernel[:4] == "sdpa"), key=statistics.median
                )
                rows += [
                    {
                        "phase": "prefill",
                        "num_seqs": num_seqs,
                        "query_len": query_len,
                        "context_len": context_len,
                        "dtype": title,
                        "threads": count,
                        "kernel": kernel,
                        "layout": layout,
                        "block_size": BLOCK_SIZE if kernel == "cpu-paged" else None,
                        "tokens_per_s": num_seqs * query_len / statistics.median(calls),
                        "ratio_sdpa": statistics.median(d / t for d, t in zip(dense, calls)),
                        "calls": len(calls),
                    }
                    for (kernel, layout), calls in times.items()
                ]
    return rows


def _timed(
    forms: dict[tuple[str, str], Callable[[], torch.Tensor]], seconds: float
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each call by contender; the i-th calls of all belong to one round."""
    for form in forms.values():
        form()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in forms}
    order, shuffle = list(forms), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while not times[order[0]] or time.perf_counter() < end:
        shuffle(order)
        for key in order:
            start = time.perf_counter()
            forms[key]()
            times[key].append(time.perf_counter() - start)
    return times
