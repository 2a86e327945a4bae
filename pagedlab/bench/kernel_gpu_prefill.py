"""How fast does a GPU compute chunks of prompts over the paged cache, next to dense attention and to a matrix product?

A chunk is the last ``query_len`` tokens of each context; 32 query heads over 8 KV heads of 128 in bfloat16. Beside
`triton-paged` runs the flash backend of torch's scaled_dot_product_attention on contiguous keys and values with the
causal mask that ends at the last key, with grouped heads and with heads expanded beforehand (``ratio_sdpa`` compares
with the faster), and a large matrix product, whose rate is what the matrix units give here. Rates count two operations
for each multiplication of query-key pairs that the mask lets through. Turns, buffers, graphs and tuning are those of
`pagedlab.bench.kernel_gpu`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pagedlab.bench import kernel_gpu
from pagedlab.bench.kernel import chunk_batch
from pagedlab.bench.kernel_gpu import Form, Key, Paged
from pagedlab.policies.layout import CSR, Layout, Padded

POINTS = ((1, 8192, 8192), (8, 1024, 1024), (1, 2048, 32_768), (8, 512, 8192))
"""Sequences, query tokens of each, tokens of context of each."""
PRODUCT = 8192
"""Rows, columns and inner size of the matrix product."""


def forms(
    query: torch.Tensor, context_len: int, block_sizes: Iterable[int], rng: torch.Generator
) -> dict[Key, Form]:
    """Return the contenders by kernel, layout and block size; ``query`` [num_seqs, query_len, num_heads, head_size]."""
    from pagedlab.kernels.triton.paged import TritonPagedAttention

    num_seqs, query_len, num_heads, size = query.shape
    num_kv_heads = kernel_gpu.NUM_KV_HEADS
    heads_first = query.transpose(1, 2)
    whole = query_len == context_len
    mask: dict[str, Any] = (
        {"is_causal": True} if whole else {"attn_mask": causal_lower_right(query_len, context_len)}
    )
    flash = [SDPBackend.FLASH_ATTENTION] if query.device.type == "cuda" else [SDPBackend.MATH]
    wide = torch.empty(2, num_seqs, num_heads, context_len, size, dtype=query.dtype, device=query.device)
    wide.normal_()
    product = torch.randn(2, PRODUCT, PRODUCT, dtype=query.dtype, device=query.device)

    def grouped(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(flash):
            return sdpa(heads_first, k, v, enable_gqa=True, **mask)

    def expanded(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(flash):
            return sdpa(heads_first, wide[0], wide[1], **mask)

    def multiply(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return product[0] @ product[1]

    def paged(layout: Layout, block_size: int) -> Form:
        batch = chunk_batch(layout, num_seqs, query_len, context_len, block_size, rng)
        shape = (num_seqs * context_len // block_size, num_kv_heads, block_size, size)
        return Paged(TritonPagedAttention(layout, autotune=True), query.flatten(0, 1), shape, batch)

    made: dict[Key, Form] = {
        ("sdpa enable_gqa", "contiguous", None): grouped,
        ("sdpa expanded", "contiguous", None): expanded,
        ("matmul", "contiguous", None): multiply,
    }
    for layout, block_size in itertools.product((Padded, CSR), block_sizes):
        made["triton-paged", layout.name, block_size] = paged(layout(), block_size)
    return made


def measure(
    *,
    points: Iterable[tuple[int, int, int]] = POINTS,
    block_sizes: Iterable[int] = (16, 32),
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 20,
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Return one row per point, kernel, layout and block size."""
    rows: list[dict[str, Any]] = []
    sizes = list(block_sizes)
    rng = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads, size = kernel_gpu.NUM_HEADS, kernel_gpu.NUM_KV_HEADS, kernel_gpu.HEAD_SIZE
    with torch.inference_mode():
        for num_seqs, query_len, context_len in points:
            shape = (2, num_seqs, num_kv_heads, context_len, size)
            buffers = [torch.randn(shape, dtype=dtype, device=device) for _ in range(2)]
            query = torch.randn(num_seqs, query_len, num_heads, size, dtype=dtype, device=device)
            contenders = forms(query, context_len, sizes, rng)
            times, graphs = kernel_gpu.race(contenders, buffers, rounds)
            median = {key: statistics.median(seconds) for key, seconds in times.items()}
            dense = min((s for (name, _, _), s in median.items() if name.startswith("sdpa")), default=None)
            pairs = num_seqs * (query_len * (context_len - query_len) + query_len * (query_len + 1) // 2)
            work = dict.fromkeys(median, 4 * num_heads * size * pairs)
            work["matmul", "contiguous", None] = 2 * PRODUCT**3
            rate = {key: work[key] / seconds for key, seconds in median.items()}
            most = rate["matmul", "contiguous", None]
            rows += [
                {
                    "num_seqs": num_seqs,
                    "query_len": query_len,
                    "context_len": context_len,
                    "dtype": str(dtype).removeprefix("torch."),
                    "kernel": key[0],
                    "layout": key[1],
                    "block_size": key[2],
                    "tflop_per_s": rate[key] / 1e12,
                    "ratio_sdpa": None if dense is None or key[0] == "matmul" else dense / median[key],
                    "ratio_matmul": rate[key] / most,
                    "graph": graphs[key],
                    **kernel_gpu.chosen(contenders[key]),
                }
                for key in times
            ]
    return rows
