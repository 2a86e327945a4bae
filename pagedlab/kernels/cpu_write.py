"""Writing the CPU kernel's caches: numbers as they are, or one byte a channel with a scale behind each block and head.

Bytes and scales are those of the Triton kernels (`pagedlab.kernels.triton.quantised`): int8 by the block's largest
channel, e4m3 by a power of two, so that a block that is rounded again loses nothing but its smallest numbers.

(All in this one file: numba's cache on disk watches one file per function.)
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="call-arg, import-untyped"
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic as _numba_intrinsic

intrinsic: Any = _numba_intrinsic  # its type speaks of the function given, not of the one that comes back


@njit(nogil=True, error_model="numpy", cache=True)
def write_numbers(cache, new, slots):
    """Store ``new`` [num_tokens, num_kv_heads, size] at ``slots`` of a cache [block, head, token, channel]."""
    block_size = cache.shape[2]
    for i in range(new.shape[0]):
        block, offset = slots[i] // block_size, slots[i] % block_size
        for h in range(new.shape[1]):
            for d in range(new.shape[2]):
                cache[block, h, offset, d] = new[i, h, d]


@njit(nogil=True, error_model="numpy", cache=True)
def _as_int8(x):
    """The nearest whole number to ``x``, to even, up to 127: adding 1.5 * 2**23 leaves no bits for a fraction."""
    x = x if x > np.float32(-127) else np.float32(-127)
    x = x if x < np.float32(127) else np.float32(127)
    return np.uint8(np.int8((x + np.float32(12582912)) - np.float32(12582912)))


@intrinsic
def _bits(typingctx, x):
    return types.int32(types.float32), lambda c, b, s, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def _of_bits(typingctx, bits):
    return types.float32(types.int32), lambda c, b, s, args: b.bitcast(args[0], ir.FloatType())


@njit(nogil=True, error_model="numpy", cache=True)
def _as_e4m3(x):
    """The nearest number of e4m3 to ``x``, to even, up to 448; NaN stays NaN.

    Three bits come after the first one, so adding 1.5 * 2**(exponent + 20) leaves no others.
    """
    size = abs(x) if abs(x) < np.float32(448) else np.float32(448)
    exponent = max(_bits(size) >> 23, 121)
    shift = _of_bits(np.int32(((exponent + 20) << 23) | 0x400000))
    size = (size + shift) - shift
    code = (_bits(size) >> 20) - 960 if size >= np.float32(2.0**-6) else np.int64(size * np.float32(512))
    return np.uint8(code | ((_bits(x) >> 24) & 0x80)) if x == x else np.uint8(0x7F)


@njit(nogil=True, error_model="numpy", cache=True)
def _of_e4m3(code):
    """The number that ``code`` stands for: its bits where float32 has them, and the exponent's bias repaired."""
    moved = np.int32(((np.int64(np.int8(code)) << 24) >> 4) & ~0x78000000)  # without the copies of the sign
    return _of_bits(moved) * np.float32(2.0**120) if code & 0x7F != 0x7F else np.float32(np.nan)


@njit(nogil=True, error_model="numpy", cache=True)
def _largest_bits(new, fp8):
    """The bits of the largest size of ``new``: whole numbers in the order of what they stand for, NaN above all.

    NaN does not count for fp8, which has its own.
    """
    largest = np.int32(0)
    for d in range(new.shape[0]):
        bits = np.int32(_bits(new[d]) & 0x7FFFFFFF)
        bits = np.int32(0) if fp8 and bits > 0x7F800000 else bits
        largest = max(largest, bits)
    return largest


@njit(nogil=True, error_model="numpy", cache=True)
def _fitting_scale(largest, fp8):
    """The scale for numbers up to ``largest``: for fp8 a power of two."""
    scale = largest / np.float32(448 if fp8 else 127)
    scale = np.float32(1e-30) if scale < np.float32(1e-30) else scale  # keeps NaN
    return _of_bits(np.int32((_bits(scale) + 0x7FFFFF) & ~0x7FFFFF)) if fp8 else scale


@njit(nogil=True, error_model="numpy", cache=True)
def _store(held, new, scale, fp8):
    if fp8:
        for d in range(new.shape[0]):
            held[d] = _as_e4m3(new[d] / scale)
    else:
        for d in range(new.shape[0]):
            held[d] = _as_int8(new[d] / scale)


@njit(nogil=True, error_model="numpy", cache=True)
def _store_again(held, factor, fp8):
    """Round what is held again, to a scale that is larger by ``1 / factor``."""
    if fp8:
        for d in range(held.shape[0]):
            held[d] = _as_e4m3(_of_e4m3(held[d]) * factor)
    else:
        for d in range(held.shape[0]):
            held[d] = _as_int8(np.float32(np.int8(held[d])) * factor)


@njit(nogil=True, error_model="numpy", cache=True)
def write_bytes(cache, scales, new, order, runs, slots, block_size, fixed, fp8):
    """Store ``order[runs[k] : runs[k + 1]]``, the tokens of one block by ascending slot, for all k.

    Tokens from a block's first slot on begin a new scale, others may raise the block's, and what it holds is then
    rounded again. ``fixed`` keeps all scales. ``scales`` is ``cache`` as float32.
    """
    size, place = new.shape[2], scales.shape[2] - 4
    for run in range(runs.shape[0] - 1):
        begin, end = runs[run], runs[run + 1]
        block, filled = slots[order[begin]] // block_size, slots[order[begin]] % block_size
        for head in range(new.shape[1]):
            held, scale = cache[block, head], scales[block, head, place]
            if not fixed:
                old, largest = scale, np.int32(0)
                for i in range(begin, end):
                    largest = max(largest, _largest_bits(new[order[i], head], fp8))
                scale = _fitting_scale(_of_bits(largest), fp8)
                if filled > 0:
                    scale = old if old > scale or old != old else scale
                    if scale != old:
                        _store_again(held[: filled * size], old / scale, fp8)
                scales[block, head, place] = scale
            for i in range(begin, end):
                offset = slots[order[i]] % block_size * size
                _store(held[offset : offset + size], new[order[i], head], scale, fp8)
