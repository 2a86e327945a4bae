"""The online softmax over a range of keys that lie in blocks.

A *row* is one query head of one query token; rows of one KV head share each tile of keys that is loaded. Scores are
kept in units of log 2, as ``exp2`` is what the hardware has. Products take OPERAND (the cache's dtype; float32 for
bfloat16 in the interpreter, whose dot does not know it) and add up in REAL. The cache is
``[block, head, token, channel]``, contiguous; with a FORMAT of `quantised`, TAIL bytes with the scale follow each head.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
import triton
import triton.language as tl

from pagedlab.kernels.triton.quantised import widened

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def start_rows(sink, is_first, ROWS: tl.constexpr, VALUE_PADDED: tl.constexpr, REAL: tl.constexpr):
    """Return largest score, sum and weighted values of rows that have seen nothing but, maybe, their sink."""
    top = tl.full([ROWS], float("-inf"), REAL)
    total = tl.zeros([ROWS], REAL)
    if sink is not None:
        top = tl.where(is_first, sink.to(REAL) * LOG2E, top)
        total = tl.where(is_first, total + 1, total)
    return top, total, tl.zeros([ROWS, VALUE_PADDED], REAL)


@triton.jit
def attend_range(
    query,
    position,
    slope,
    top,
    total,
    acc,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    entries,
    index,
    row,
    head,
    first,
    stop,
    block_of: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    TAIL: tl.constexpr,
    FORMAT: tl.constexpr,
    OPERAND: tl.constexpr,
    REAL: tl.constexpr,
):
    """Go on with the softmax of ``query`` [rows, PADDED] at ``position`` [rows] over keys ``first <= t < stop``.

    Returns ``top``, ``total`` and ``acc`` brought up to date. No slot outside of the range is read.
    """
    KEY_PITCH: tl.constexpr = BLOCK_SIZE * SIZE + TAIL
    VALUE_PITCH: tl.constexpr = BLOCK_SIZE * VALUE_SIZE + TAIL
    channel, value_channel = tl.arange(0, PADDED), tl.arange(0, VALUE_PADDED)
    for tile in range(first // TILE * TILE, stop, TILE):
        t = tile + tl.arange(0, TILE)
        within = (t >= first) & (t < stop)
        if BLOCK_SIZE % TILE == 0:
            block = block_of(entries, index, row, tile // BLOCK_SIZE).to(tl.int64)
        else:
            known = tl.minimum(tl.maximum(t, first), stop - 1)
            block = block_of(entries, index, row, known // BLOCK_SIZE).to(tl.int64)
        piece, offset = block * NUM_KV_HEADS + head, t % BLOCK_SIZE
        slot = piece * KEY_PITCH + offset * SIZE
        key = tl.load(
            key_cache + slot[None, :] + channel[:, None],
            mask=within[None, :] & (channel < SIZE)[:, None],
            other=0,
        )
        key = widened(key, FORMAT).to(OPERAND)
        score = tl.dot(query.to(OPERAND), key, input_precision="ieee", out_dtype=REAL)
        if FORMAT > 0:
            factor = tl.load(key_scales + (piece * KEY_PITCH + BLOCK_SIZE * SIZE) // 4)
            score = score * (factor if BLOCK_SIZE % TILE == 0 else factor[None, :])
        if SOFT_CAP > 0:
            # tanh(x) = 1 - 2 / (exp(2x) + 1)
            score = SOFT_CAP * (1 - 2 / (tl.exp2(score * (2 * SCALE / SOFT_CAP * LOG2E)) + 1)) * LOG2E
        else:
            score = score * (SCALE * LOG2E)
        distance = position[:, None] - t[None, :]
        if slope is not None:
            score -= slope[:, None] * LOG2E * distance
        seen = within[None, :] & (distance >= 0)
        if WINDOW > 0:
            seen &= distance < WINDOW
        score = tl.where(seen, score, float("-inf"))

        higher = tl.maximum(top, tl.max(score, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - finite[:, None])
        shrink = tl.exp2(top - finite)
        slot = piece * VALUE_PITCH + offset * VALUE_SIZE
        value = tl.load(
            value_cache + slot[:, None] + value_channel[None, :],
            mask=within[:, None] & (value_channel < VALUE_SIZE)[None, :],
            other=0,
        )
        value = widened(value, FORMAT)
        if FORMAT > 0:
            factor = tl.load(value_scales + (piece * VALUE_PITCH + BLOCK_SIZE * VALUE_SIZE) // 4)
            value = value * (factor if BLOCK_SIZE % TILE == 0 else factor[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(OPERAND), value.to(OPERAND), acc, input_precision="ieee", out_dtype=REAL)
        top = higher
    return top, total, acc
