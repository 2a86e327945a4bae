"""Prefill and mixed batches: chunks of any length, each after a cached prefix of any length, in one launch.

A *tile* is up to TOKENS query tokens of one sequence, with all query heads of one KV head: ROWS rows that share each
key. The host lists the tiles (`sequence, first token of the chunk`), so no program is started in vain.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
import triton
import triton.language as tl

from pagedlab.kernels.triton.tiles import attend_range, start_rows


@triton.jit
def prefill_tiles(
    out,
    query,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slopes,
    sinks,
    entries,
    index,
    tiles,
    query_start,
    context_lens,
    rows,
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
):
    """Attend in program (i, KV head) for the tile ``tiles[i]``; writes ``out`` [num_tokens, num_heads, VALUE_SIZE]."""
    TOKENS: tl.constexpr = ROWS // GROUP
    number, kv_head = tl.program_id(0), tl.program_id(1)
    sequence, chunk = tl.load(tiles + 2 * number), tl.load(tiles + 2 * number + 1)
    begin = tl.load(query_start + sequence)
    count = tl.load(query_start + sequence + 1) - begin
    length = tl.load(context_lens + sequence)
    row = tl.load(rows + sequence)
    before = length - count

    r = tl.arange(0, ROWS)
    token = chunk + r // GROUP
    head = kv_head * GROUP + r % GROUP
    live = (r < TOKENS * GROUP) & (token < count)
    channel = tl.arange(0, PADDED)
    place = (begin + token).to(tl.int64)
    q = tl.load(
        query + place[:, None] * query_token_stride + head[:, None] * query_head_stride + channel[None, :],
        mask=live[:, None] & (channel < SIZE)[None, :],
        other=0.0,
    )
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head, mask=live, other=0.0).to(REAL)
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head, mask=live, other=0.0)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(before + chunk - WINDOW + 1, 0)
    stop = before + tl.minimum(chunk + TOKENS, count)
    top, total, acc = start_rows(sink, True, ROWS, VALUE_PADDED, REAL)
    top, total, acc = attend_range(
        q, before + token, slope, top, total, acc,
        key_cache, value_cache, key_scales, value_scales, entries, index, row, kv_head, first, stop,
        block_of, NUM_KV_HEADS, BLOCK_SIZE, SIZE, VALUE_SIZE, PADDED, VALUE_PADDED, TILE,
        SCALE, WINDOW, SOFT_CAP, TAIL, FORMAT, OPERAND, REAL,
    )  # fmt: skip
    value_channel = tl.arange(0, VALUE_PADDED)
    target = (place * NUM_KV_HEADS * GROUP + head) * VALUE_SIZE
    tl.store(
        out + target[:, None] + value_channel[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=live[:, None] & (value_channel < VALUE_SIZE)[None, :],
    )
