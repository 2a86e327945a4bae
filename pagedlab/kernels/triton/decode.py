"""Decode: one query token a sequence, its context cut into pieces that run side by side (flash-decoding).

Piece i of a sequence covers ``split_len`` keys; each leaves its normalised output and the logarithm (base 2) of its
sum, and `reduce_splits` adds them one after the other, so that how many pieces a *neighbour* has changes no bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
import triton
import triton.language as tl

from pagedlab.kernels.triton.tiles import attend_range, start_rows


@triton.jit(do_not_specialize=["split_len", "num_splits"])
def decode_splits(
    out,
    parts,
    part_sums,
    query,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slopes,
    sinks,
    entries,
    index,
    sequences,
    query_start,
    context_lens,
    rows,
    split_len,
    num_splits,
    query_token_stride,
    query_head_stride,
    block_of: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    TAIL: tl.constexpr,
    FORMAT: tl.constexpr,
    OPERAND: tl.constexpr,
    REAL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Attend in program (i, KV head, split) for one piece of the context of ``sequences[i]``.

    Without SPLIT there is one piece and ``out`` [num_tokens, num_heads, VALUE_SIZE] is written; with it ``parts``
    [num_decodes, num_heads, num_splits, VALUE_SIZE] and ``part_sums`` [num_decodes, num_heads, num_splits].
    """
    number, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(sequences + number)
    token = tl.load(query_start + sequence).to(tl.int64)
    length = tl.load(context_lens + sequence)
    row = tl.load(rows + sequence)
    visible = 0
    if WINDOW > 0:
        visible = tl.maximum(length - WINDOW, 0)
    begin = visible // TILE * TILE + split * split_len
    if begin < length:
        r = tl.arange(0, ROWS)
        live = r < GROUP
        head = kv_head * GROUP + r
        channel = tl.arange(0, PADDED)
        q = tl.load(
            query + token * query_token_stride + head[:, None] * query_head_stride + channel[None, :],
            mask=live[:, None] & (channel < SIZE)[None, :],
            other=0.0,
        )
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + head, mask=live, other=0.0).to(REAL)
        sink = None
        if sinks is not None:
            sink = tl.load(sinks + head, mask=live, other=0.0)
        top, total, acc = start_rows(sink, split == 0, ROWS, VALUE_PADDED, REAL)
        top, total, acc = attend_range(
            q, tl.full([ROWS], 0, tl.int32) + (length - 1), slope, top, total, acc,
            key_cache, value_cache, key_scales, value_scales, entries, index, row, kv_head,
            tl.maximum(begin, visible), tl.minimum(begin + split_len, length),
            block_of, NUM_KV_HEADS, BLOCK_SIZE, SIZE, VALUE_SIZE, PADDED, VALUE_PADDED, TILE,
            SCALE, WINDOW, SOFT_CAP, TAIL, FORMAT, OPERAND, REAL,
        )  # fmt: skip
        acc = acc / total[:, None]
        value_channel = tl.arange(0, VALUE_PADDED)
        stored = live[:, None] & (value_channel < VALUE_SIZE)[None, :]
        if SPLIT:
            part = (number.to(tl.int64) * NUM_KV_HEADS * GROUP + head) * num_splits + split
            tl.store(parts + part[:, None] * VALUE_SIZE + value_channel[None, :], acc, mask=stored)
            tl.store(part_sums + part, top + tl.log2(total), mask=live)
        else:
            target = (token * NUM_KV_HEADS * GROUP + head) * VALUE_SIZE
            tl.store(
                out + target[:, None] + value_channel[None, :], acc.to(out.dtype.element_ty), mask=stored
            )


@triton.jit(do_not_specialize=["split_len", "num_splits"])
def reduce_splits(
    out,
    parts,
    part_sums,
    sequences,
    query_start,
    context_lens,
    split_len,
    num_splits,
    NUM_HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    REAL: tl.constexpr,
):
    """Join in program (i, head) the pieces of ``sequences[i]`` in order."""
    number, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(sequences + number)
    token = tl.load(query_start + sequence).to(tl.int64)
    length = tl.load(context_lens + sequence)
    visible = 0
    if WINDOW > 0:
        visible = tl.maximum(length - WINDOW, 0) // TILE * TILE
    count = tl.cdiv(length - visible, split_len)
    channel = tl.arange(0, VALUE_PADDED)
    real = channel < VALUE_SIZE
    part = (number.to(tl.int64) * NUM_HEADS + head) * num_splits
    top = tl.load(part_sums + part)
    acc = tl.load(parts + part * VALUE_SIZE + channel, mask=real, other=0.0)
    total = tl.full([], 1.0, REAL)
    for split in range(1, count):
        here = tl.load(part_sums + part + split)
        value = tl.load(parts + (part + split) * VALUE_SIZE + channel, mask=real, other=0.0)
        higher = tl.maximum(top, here)
        shrink, weight = tl.exp2(top - higher), tl.exp2(here - higher)
        acc = acc * shrink + value * weight
        total = total * shrink + weight
        top = higher
    target = (token * NUM_HEADS + head) * VALUE_SIZE
    tl.store(out + target + channel, (acc / total).to(out.dtype.element_ty), mask=real)
