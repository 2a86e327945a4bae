"""How fast does paged attention read the KV cache on this CPU, next to dense attention and to a plain copy?

Decode, one token of each of 16 sequences with 1,024 tokens of context, 16 query heads over 8 KV heads of 64. Every
form in which torch's scaled_dot_product_attention can be asked for grouped heads runs beside it, and the fastest at
each point is what ``ratio_dense`` compares with. All take turns inside one loop, so a slow moment of the machine hits
them alike, and go round through buffers that together are larger than the last-level cache. ``gb_per_s`` counts the
bytes of keys and values (for the copy: bytes read plus bytes written) at the median; ``gb_per_s_best`` at the fastest.

Where there is a GPU, `pagedlab.bench.kernel_gpu` adds its rows.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pagedlab.kernels.base import AttentionBatch
from pagedlab.kernels.cpu import CPUPagedAttention
from pagedlab.policies.layout import CSR, Layout, Padded

NUM_SEQS, CONTEXT_LEN, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 16, 1024, 16, 8, 64
GROUP = NUM_HEADS // NUM_KV_HEADS
SCALE = HEAD_SIZE**-0.5


def dense_forms(query: torch.Tensor) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """The ways to say grouped-query attention with torch; ``query`` [num_seqs, num_heads, head_size]."""
    alone = query[:, :, None]
    grouped = query.view(NUM_SEQS, NUM_KV_HEADS, GROUP, HEAD_SIZE)

    def expanded(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, None].expand(-1, -1, GROUP, -1, -1).flatten(1, 2)

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(GROUP, dim=1)

    return {
        "sdpa enable_gqa": lambda k, v: sdpa(alone, k, v, enable_gqa=True),
        "sdpa regrouped": lambda k, v: sdpa(grouped, k, v),
        "sdpa expand": lambda k, v: sdpa(alone, expanded(k), expanded(v)),
        "sdpa repeat": lambda k, v: sdpa(alone, repeated(k), repeated(v)),
    }


def decode_batch(
    layout: Layout, num_seqs: int, context_len: int, block_size: int, rng: torch.Generator
) -> AttentionBatch:
    """One token of each of ``num_seqs`` sequences, whose blocks lie in random order."""
    per_seq = context_len // block_size
    order = torch.randperm(num_seqs * per_seq, generator=rng).tolist()
    layout.reset(max_rows=num_seqs, max_blocks=per_seq)
    for row in range(num_seqs):
        layout.open(row, order[row * per_seq : (row + 1) * per_seq])
    entries, index = layout.arrays()
    return AttentionBatch(
        query_start=np.arange(num_seqs + 1, dtype=np.int32),
        context_lens=np.full(num_seqs, context_len, np.int32),
        rows=np.arange(num_seqs, dtype=np.int32),
        slots=np.zeros(num_seqs, np.int64),
        entries=entries,
        index=index,
        block_size=block_size,
        max_query_len=1,
        max_context_len=context_len,
    )


def paged_form(
    layout: Layout, block_size: int, query: torch.Tensor, rng: torch.Generator
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Paged attention over the same memory, cut into blocks that the sequences hold in random order."""
    batch = decode_batch(layout, NUM_SEQS, CONTEXT_LEN, block_size, rng)
    attention = CPUPagedAttention(layout)
    shape = (NUM_SEQS * CONTEXT_LEN // block_size, NUM_KV_HEADS, block_size, HEAD_SIZE)
    return lambda k, v: attention.attend(query, k.view(shape), v.view(shape), batch, scale=SCALE)


def _copy(target: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Half of the bytes read, and as many written."""
    return target.copy_(key)


def measure(
    *,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    threads: Iterable[int] = (1, 2),
    block_sizes: Iterable[int] = (16, 32),
    rounds: int = 5,
    buffer_bytes: int = 512 * 2**20,
) -> list[dict[str, Any]]:
    """Return one row per kernel, layout, block size, dtype and number of threads."""
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    rng = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        nbytes = 2 * NUM_SEQS * NUM_KV_HEADS * CONTEXT_LEN * HEAD_SIZE * dtype.itemsize
        shape = (2, NUM_SEQS, NUM_KV_HEADS, CONTEXT_LEN, HEAD_SIZE)
        buffers = [
            torch.randn(shape, generator=rng).to(dtype) for _ in range(max(2, -(-buffer_bytes // nbytes)))
        ]
        target = torch.empty_like(buffers[0][0])
        query = torch.randn(NUM_SEQS, NUM_HEADS, HEAD_SIZE, generator=rng).to(dtype)
        runs: dict[tuple[str, str, int | None], Callable[[torch.Tensor, torch.Tensor], Any]] = {
            (name, "contiguous", None): form for name, form in dense_forms(query).items()
        }
        runs["copy", "contiguous", None] = partial(_copy, target)
        for layout, block_size in itertools.product((Padded, CSR), block_sizes):
            runs["cpu-paged", layout.name, block_size] = paged_form(layout(), block_size, query, rng)
        for count in threads:
            torch.set_num_threads(count)
            turn = itertools.cycle(buffers)

            def timed(run: Callable[[torch.Tensor, torch.Tensor], Any], turn: Any = turn) -> float:
                k, v = next(turn)
                start = time.perf_counter()
                run(k, v)
                return time.perf_counter() - start

            for run in runs.values():
                timed(run)  # compile, and fill the thread pools
            times = {key: [timed(run) for _ in range(3)] for key, run in runs.items()}
            fastest = min(map(min, times.values()))
            for _ in range(rounds * len(buffers)):
                for key, run in runs.items():
                    if min(times[key]) < 10 * fastest:  # three times are enough for the hopeless
                        times[key].append(timed(run))
            rows += _rows(times, nbytes, dtype, count)
    torch.set_num_threads(before)
    return rows


def _rows(
    times: dict[tuple[str, str, int | None], list[float]], nbytes: int, dtype: torch.dtype, threads: int
) -> list[dict[str, Any]]:
    median = {key: statistics.median(seconds) for key, seconds in times.items()}
    dense = min(seconds for (name, _, _), seconds in median.items() if name.startswith("sdpa"))
    copy = median["copy", "contiguous", None]
    return [
        {
            "num_seqs": NUM_SEQS,
            "context_len": CONTEXT_LEN,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": threads,
            "kernel": name,
            "layout": layout,
            "block_size": block_size,
            "gb_per_s": nbytes / median[name, layout, block_size] / 1e9,
            "gb_per_s_best": nbytes / min(seconds) / 1e9,
            "ratio_dense": dense / median[name, layout, block_size],
            "ratio_copy": copy / median[name, layout, block_size],
        }
        for (name, layout, block_size), seconds in times.items()
    ]


def main(json: bool = False) -> list[dict[str, Any]]:
    """Measure the CPU, and the GPU where there is one; return the rows (the command line prints them)."""
    rows = measure()
    if torch.cuda.is_available():
        from pagedlab.bench import kernel_gpu

        rows += kernel_gpu.measure()
    return rows
