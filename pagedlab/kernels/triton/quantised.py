"""Keys and values in one byte each: fp8 (e4m3) or int8, with a scale for each block and KV head.

::

    one block, one head   | token 0: c0 c1 .. | token 1: c0 c1 .. | ... | scale, float32 | 12 bytes unused |

The scale lies behind the bytes that it belongs to, so blocks are copied, swapped and forgotten with it. It grows with
the largest channel of a block; what the block holds already is then rounded again. fp8 scales are powers of two, so
that this second rounding loses nothing but the smallest numbers, and how a prompt was cut into chunks changes little.

fp8 is OCP's e4m3 where the hardware reads it (sm_89 and later) and where it is decoded from its bits (sm_80, the
interpreter), and e4m3fnuz on gfx942, whose bias is one larger. Rounding is to nearest even, and saturates.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
import triton
import triton.language as tl

E4M3 = tl.constexpr(1)
E4M3_BITS = tl.constexpr(2)
E4M3_FNUZ = tl.constexpr(3)
INT8 = tl.constexpr(4)


@triton.jit
def widened(bits, FORMAT: tl.constexpr):
    """Return the numbers, float32, that ``bits`` (uint8) stand for; without a format, ``bits`` are the numbers."""
    if FORMAT == 0:
        return bits
    elif FORMAT == INT8:
        return bits.to(tl.int8, bitcast=True).to(tl.float32)
    elif FORMAT == E4M3:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif FORMAT == E4M3_FNUZ:
        return bits.to(tl.float8e4b8, bitcast=True).to(tl.float32)
    else:
        # The bits moved to where float16 has them: the same number 256 times smaller, as the bias is 15 and not 7.
        wide = bits.to(tl.uint16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256)


@triton.jit
def narrowed(x, FORMAT: tl.constexpr):
    """Return the bits (uint8) of the nearest numbers of FORMAT to ``x``, float32 within its range."""
    if FORMAT == INT8:
        # Adding 1.5 * 2**23 leaves no bits for a fraction.
        whole = (tl.minimum(tl.maximum(x, -127.0), 127.0) + 12582912.0) - 12582912.0
        return whole.to(tl.int8).to(tl.uint8, bitcast=True)
    else:
        FNUZ: tl.constexpr = FORMAT == E4M3_FNUZ
        LARGEST: tl.constexpr = 240.0 if FNUZ else 448.0
        LEAST: tl.constexpr = 120 if FNUZ else 121
        SHRINK: tl.constexpr = 0.0078125 if FNUZ else 0.00390625
        size = tl.minimum(tl.abs(x), LARGEST)
        # Three bits after the first: adding 1.5 * 2**(exponent + 20) leaves no others.
        exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, LEAST)
        shift = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
        size = (size + shift) - shift
        bits = ((size * SHRINK).to(tl.float16).to(tl.uint16, bitcast=True) >> 7).to(tl.uint8)
        sign = ((x.to(tl.int32, bitcast=True) >> 24) & 0x80).to(tl.uint8)
        if FNUZ:  # no negative zero: its bits are NaN
            sign = tl.where(bits == 0, 0, sign).to(tl.uint8)
            return tl.where(x != x, 0x80, bits | sign).to(tl.uint8)
        else:
            return tl.where(x != x, 0x7F, bits | sign).to(tl.uint8)


@triton.jit
def fitting_scale(largest, FORMAT: tl.constexpr):
    """Return the scale for numbers up to ``largest``; NaN and infinity come back as such."""
    if FORMAT == INT8:
        return tl.maximum(largest / 127, 1e-30, propagate_nan=tl.PropagateNan.ALL)
    else:
        LARGEST: tl.constexpr = 240.0 if FORMAT == E4M3_FNUZ else 448.0
        bits = tl.maximum(largest / LARGEST, 1e-30).to(tl.int32, bitcast=True)
        return (((bits + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_quantised(
    cache,
    scales,
    new,
    order,
    runs,
    slots,
    token_stride,
    head_stride,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    TAIL: tl.constexpr,
    CHUNK: tl.constexpr,
    FORMAT: tl.constexpr,
    FIXED: tl.constexpr,
):
    """Store in program (run, head) the tokens of one block: ``order[runs[run] : runs[run + 1]]``, by ascending slot.

    A run that begins at the block's first slot begins a new scale; any other goes on with the block's. FIXED keeps the
    scale as it is. ``scales`` is ``cache`` as float32.
    """
    run, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(runs + run), tl.load(runs + run + 1)
    slot = tl.load(slots + tl.load(order + begin))
    held = (slot % BLOCK_SIZE).to(tl.int32)
    piece = (slot // BLOCK_SIZE * NUM_KV_HEADS + head) * (BLOCK_SIZE * SIZE + TAIL)
    place = (piece + BLOCK_SIZE * SIZE) // 4
    channel = tl.arange(0, PADDED)
    real = (channel < SIZE)[None, :]
    if FIXED:
        scale = tl.load(scales + place)
    else:
        largest = tl.zeros([CHUNK, PADDED], tl.float32)
        for at in range(begin, end, CHUNK):
            i = at + tl.arange(0, CHUNK)
            token = tl.load(order + i, mask=i < end, other=0).to(tl.int64)
            x = tl.load(
                new + token[:, None] * token_stride + head * head_stride + channel[None, :],
                mask=(i < end)[:, None] & real,
                other=0,
            ).to(tl.float32)
            # int8 has no NaN, so its scale must be one.
            largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        broken = tl.max(tl.max((largest != largest).to(tl.int32), 1), 0) > 0
        scale = fitting_scale(tl.max(tl.max(largest, 1), 0), FORMAT)
        if FORMAT == INT8:
            scale = tl.where(broken, float("nan"), scale)
        if held > 0:
            old = tl.load(scales + place)
            scale = tl.maximum(scale, old, propagate_nan=tl.PropagateNan.ALL)
            if scale != old:
                for at in range(0, held, CHUNK):
                    i = at + tl.arange(0, CHUNK)
                    where = cache + piece + i[:, None] * SIZE + channel[None, :]
                    known = (i < held)[:, None] & real
                    x = widened(tl.load(where, mask=known, other=0), FORMAT) * (old / scale)
                    tl.store(where, narrowed(x, FORMAT), mask=known)
        tl.debug_barrier()  # all threads have read the old scale
        tl.store(scales + place, scale)
    for at in range(begin, end, CHUNK):
        i = at + tl.arange(0, CHUNK)
        token = tl.load(order + i, mask=i < end, other=0).to(tl.int64)
        x = tl.load(
            new + token[:, None] * token_stride + head * head_stride + channel[None, :],
            mask=(i < end)[:, None] & real,
            other=0,
        ).to(tl.float32)
        offset = tl.load(slots + token, mask=i < end, other=0) % BLOCK_SIZE
        where = cache + piece + offset[:, None] * SIZE + channel[None, :]
        tl.store(where, narrowed(x / scale, FORMAT), mask=(i < end)[:, None] & real)
