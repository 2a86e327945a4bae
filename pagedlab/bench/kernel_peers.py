"""Who else reads a paged cache on a CPU, beside dense attention: gather + SDPA, flex_attention, one-byte caches.

Gather + SDPA comes in two forms: kernel `gather-sdpa` goes sequence by sequence, so that what was gathered is still in
the caches when it is read, and is the faster; ``gather-batch`` gathers the whole batch at once.

Each is a contender of `pagedlab.bench.kernel_grid`: a function of keys and values in one piece of memory, which it
takes for blocks in random order.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pagedlab.bench.kernel import HEAD_SIZE, NUM_KV_HEADS, SCALE, chunk_batch
from pagedlab.kernels.cpu import CPUPagedAttention
from pagedlab.kernels.gather import GatherSDPA
from pagedlab.policies.layout import Layout

PAGE = 128
"""Tokens of a page of flex_attention: its own default block of keys."""

Form = Callable[[torch.Tensor, torch.Tensor], Any]


def gather_form(
    query: torch.Tensor, layout: Layout, context_len: int, block_size: int, rng: torch.Generator
) -> Form:
    """Kernel `gather-sdpa`: each context copied together, then attention; blocks are [block, token, head, channel]."""
    batch = chunk_batch(layout, len(query), 1, context_len, block_size, rng)
    shape = (len(query) * context_len // block_size, block_size, NUM_KV_HEADS, HEAD_SIZE)
    attention = GatherSDPA(layout)
    return lambda k, v: attention.attend(query, k.view(shape), v.view(shape), batch, scale=SCALE)


def gather_batch_form(
    query: torch.Tensor, layout: Layout, context_len: int, block_size: int, rng: torch.Generator
) -> Form:
    """Gather + SDPA as it is mostly written: the contexts of the whole batch copied at once, then one grouped call."""
    batch = chunk_batch(layout, len(query), 1, context_len, block_size, rng)
    shape = (len(query) * context_len // block_size, block_size, NUM_KV_HEADS, HEAD_SIZE)
    tables = torch.tensor([layout.decode(int(row)) for row in batch.rows])
    alone = query[:, :, None]

    def together(x: torch.Tensor) -> torch.Tensor:
        return x.view(shape)[tables].flatten(1, 2).transpose(1, 2)

    return lambda k, v: sdpa(alone, together(k), together(v), scale=SCALE, enable_gqa=True)


def byte_form(
    kv_dtype: str,
    query: torch.Tensor,
    layout: Layout,
    context_len: int,
    block_size: int,
    rng: torch.Generator,
    pool_bytes: int,
) -> Form:
    """`cpu-paged` over as many tokens in one byte a channel, in caches of its own, one for each stretch in turn."""
    batch = chunk_batch(layout, len(query), 1, context_len, block_size, rng)
    attention = CPUPagedAttention(layout, kv_dtype=kv_dtype)
    count = len(query) * context_len // block_size
    slots = torch.arange(count * block_size).numpy()
    new = torch.randn(count * block_size, NUM_KV_HEADS, HEAD_SIZE, generator=rng)

    def cache() -> torch.Tensor:
        return attention.allocate(
            count, block_size, NUM_KV_HEADS, HEAD_SIZE, dtype=query.dtype, device=query.device
        )

    first = cache()
    decoded, batch.slots = batch.slots, slots
    attention.write(first, new, batch)
    batch.slots = decoded
    pairs = [(first.clone(), first.clone()) for _ in range(max(1, pool_bytes // (2 * first.nbytes)))]
    of_stretch: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def form(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at = k.data_ptr()
        keys, values = of_stretch.setdefault(at, pairs[len(of_stretch) % len(pairs)])
        return attention.attend(query, keys, values, batch, scale=SCALE)

    return form


def flex_form(query: torch.Tensor, context_len: int, page: int, rng: torch.Generator) -> Form:
    """Compiled flex_attention over a paged cache: keys and values [1, kv_heads, all tokens, head_size], pages anywhere.

    A block mask names each sequence's pages (as torch's own paged cache for flex_attention does). Raises what the
    compiler raises where there is none.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    num_seqs, per_seq = len(query), context_len // page
    pages = num_seqs * per_seq
    order = torch.randperm(pages, generator=rng).view(num_seqs, 1, 1, per_seq).int()
    whole = torch.zeros(num_seqs, 1, 1, pages, dtype=torch.int32)
    whole[..., :per_seq] = order
    none = torch.zeros(num_seqs, 1, 1, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(whole),
        none + per_seq,
        whole,
        BLOCK_SIZE=(PAGE, page),
        seq_lengths=(1, num_seqs * context_len),
        compute_q_blocks=False,
    )
    torch._dynamo.reset()  # or after a few sizes it would run uncompiled
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    alone = query[:, :, None]
    shape = (1, NUM_KV_HEADS, num_seqs * context_len, HEAD_SIZE)

    def form(k: torch.Tensor, v: torch.Tensor) -> Any:
        keys, values = (x.view(shape).expand(num_seqs, -1, -1, -1) for x in (k, v))
        return compiled(alone, keys, values, block_mask=mask, scale=SCALE, enable_gqa=True)

    trial = torch.zeros(shape, dtype=query.dtype)
    form(trial, trial)
    return form
