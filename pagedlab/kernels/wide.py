"""The CPU kernel's tile on AVX-512, for bfloat16, and float32 chunks: two small matrix products in registers.

`cpu.py` cuts a batch into tasks (one sequence, one KV head, some of its query tokens) and runs the online softmax over
tiles of 64 keys; this is the same task for heads of 64, 128, .. channels on a CPU that has 32 registers of 16 floats::

    keys of a tile, wherever their blocks lie        turned once: [word of 4 bytes][64 keys]
    scores [rows, 64]     += word of a query (spread over a vector) * 64 keys
    sums   [rows, 64 ch]  += weight of a key (spread over a vector) * 64 channels of its value

So no sum ever has to be added up across a register. A word is two bfloat16, of which the CPU has a dot product; values
are widened in place, even and odd channels apart (a shift, a mask), and put back in order at the end. While the keys of
a tile are turned, those of the next tile are fetched to the L2 cache, and while its values are summed, the next tile's
values; after the last tile, the first one of the next head.

The loops take float32 as well (a word is one number): chunks of a prompt take 0.7 to 0.8 of the time. Decoding waits
for memory there, and turning keys costs more than it saves (13 ms for what `cpu_tile` does in 12).

(All but the products in this one file: numba's cache on disk watches one file per function.)
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="call-arg, var-annotated, unreachable, import-untyped"
from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic as _numba_intrinsic
from numba.extending import overload

from pagedlab.kernels.avx512 import (
    FINGERPRINT,
    KEYS,
    add_1,
    add_3,
    add_6,
    has_wide,
    score_1,
    score_3,
    score_6,
    turn_16,
)  # fmt: skip
from pagedlab.kernels.cpu_tile import scratch, task_signature

intrinsic: Any = _numba_intrinsic
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_LOOP: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy", "cache": True}


@intrinsic
def _address(typingctx, pointer):
    return types.int64(pointer), lambda c, b, s, args: b.ptrtoint(args[0], ir.IntType(64))


@intrinsic
def _shift(typingctx, pointer, offset):
    return pointer(pointer, types.intp), lambda c, b, s, args: b.gep(args[0], [args[1]])


@intrinsic
def _first(typingctx, pointer):
    """A number of the type that ``pointer`` points to."""
    return pointer.dtype(pointer), lambda c, b, s, args: b.load(args[0])


@intrinsic
def _to_float(typingctx, bits):
    return types.float32(types.int32), lambda c, b, s, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def _to_bits(typingctx, x):
    return types.uint32(types.float32), lambda c, b, s, args: b.bitcast(args[0], ir.IntType(32))


def _narrow(x: Any, kind: Any) -> Any:
    """A float32 as it is stored, rounded to nearest even; NaN stays NaN."""
    raise NotImplementedError


@overload(_narrow)
def _narrow_by_type(x, kind):
    if kind is types.uint16:

        def narrow(x, kind):
            bits = _to_bits(x)
            even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
            return np.uint16(rounded) if x == x else np.uint16(0x7FC0)

        return narrow
    return lambda x, kind: x


def _scaled(x: Any, scale: Any) -> Any:
    """A query's number times ``scale``; pairs of bfloat16 keep their bits, and their scores are scaled."""
    raise NotImplementedError


@overload(_scaled)
def _scaled_by_type(x, scale):
    return (lambda x, scale: x) if x is types.uint16 else (lambda x, scale: x * scale)


_LOG2E, _LN2_HI, _LN2_LO = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ZERO, _ONE, _HALF, _LOW = np.float32(0), np.float32(1), np.float32(0.5), np.float32(-87)
_MINUS_INFINITY = np.float32(-np.inf)


@njit(forceinline=True, **_LOOP)
def _exp(x):
    """Exponential of x <= 0 (Cephes' expf, which LLVM can vectorise)."""
    y = _LOW if x < _LOW else x  # keeps NaN
    n = np.floor(y * _LOG2E + _HALF)
    r = (y - n * _LN2_HI) - n * _LN2_LO
    p = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    scaled = (p * r * r + r + _ONE) * _to_float((np.int32(n) + np.int32(127)) << np.int32(23))
    return _ZERO if x < _LOW else scaled


@njit(nogil=True, error_model="numpy", cache=True, fastmath=_FAST | {"nnan"})
def _largest(row, start):
    """Largest of ``start`` and 64 scores. NaN may be passed over here: it comes back with the exponentials."""
    for t in range(KEYS):
        start = row[t] if row[t] > start else start
    return start


@njit(**_LOOP)
def _weigh(row, largest):
    """Turn 64 scores into weights and return their sum."""
    added = _ZERO
    for t in range(KEYS):
        e = _exp(row[t] - largest)
        row[t] = e
        added += e
    return added


@njit(**_LOOP)
def _places(blocks, tile, end, block_size, num_kv_heads, head, place):
    """Number the rows of the cache where 64 keys from ``tile`` on lie.

    From ``end`` on stands the last key again: read, and never counted.
    """
    block, offset = tile // block_size, tile % block_size
    row = (np.int64(blocks[block]) * num_kv_heads + head) * block_size
    for t in range(KEYS):
        place[t] = row + offset
        if tile + t + 1 < end:
            offset += 1
            if offset == block_size:
                block, offset = block + 1, 0
                row = (np.int64(blocks[block]) * num_kv_heads + head) * block_size


@njit(forceinline=True, **_LOOP)
def _put(sums, share, value_size, target, kind):
    """Write ``sums * share``, which stand apart by even and odd channels if a word holds two, in order."""
    if _paired(kind):
        for d in range(0, value_size, 32):
            for i in range(16):
                target[d + 2 * i] = _narrow(sums[d + i] * share, target[0])
                target[d + 2 * i + 1] = _narrow(sums[d + 16 + i] * share, target[0])
    else:
        for d in range(value_size):
            target[d] = _narrow(sums[d] * share, target[0])


def _paired(kind: Any) -> Any:
    """Whether a word holds two numbers of ``kind``."""
    raise NotImplementedError


@overload(_paired, inline="always")
def _paired_by_type(kind):
    if kind is types.uint16:
        return lambda kind: True
    return lambda kind: False


def fits(dtype: torch.dtype, size: int, value_size: int) -> bool:
    """Whether `wide_tile` takes heads of these sizes."""
    return has_wide(dtype) and size * dtype.itemsize % 64 == 0 and value_size % KEYS == 0


@functools.cache
def wide_tile(dtype: torch.dtype, fingerprint: int = FINGERPRINT) -> Any:
    """Compile a task for queries, cache and output of ``dtype``; its machine code lies at ``.address``.

    ``fingerprint`` stands for the code of `pagedlab.kernels.avx512`: the function refers to it, so numba's cache on
    disk does not take it for the one that was compiled before that code changed.
    """

    def attend_tile(
        query, keys, values, out, partial, blocks, slopes, sinks, shape, reals,
        head, token, count, position, first, end, part,
    ):  # fmt: skip
        """Attend for query tokens ``token .. token + count``: arguments as in `pagedlab.kernels.cpu_tile`."""
        if not fingerprint:
            return
        num_kv_heads, group, size, value_size = shape[0], shape[1], shape[2], shape[3]
        block_size, window = shape[4], shape[7]
        kind = _first(query)
        scale, soft_cap = np.float32(reals[0]), np.float32(reals[1])
        rows = count * group
        item = 2 if _paired(kind) else 4
        words = size * item // 4
        q = scratch(rows * size, kind)
        turned = scratch(words * KEYS, _ZERO)
        p, acc = scratch(rows * KEYS, _ZERO), scratch(rows * value_size, _ZERO)
        top, total = scratch(rows, _ZERO), scratch(rows, _ZERO)
        key_at, value_at, place = scratch(KEYS, 0), scratch(KEYS, 0), scratch(KEYS, 0)
        key_next, value_next = scratch(KEYS, 0), scratch(KEYS, 0)
        sink = _address(sinks) != 0 and end == position + count
        for r in range(rows):
            top[r], total[r] = _MINUS_INFINITY, _ZERO
            if sink:
                top[r], total[r] = sinks[head * group + r % group], _ONE
            source = _shift(query, (((token + r // group) * num_kv_heads + head) * group + r % group) * size)
            for d in range(size):
                q[r * size + d] = _scaled(source[d], scale)
        for d in range(rows * value_size):
            acc[d] = _ZERO

        _places(blocks, first, end, block_size, num_kv_heads, head, place)
        for t in range(KEYS):
            key_next[t] = _address(keys) + place[t] * size * item
            value_next[t] = _address(values) + place[t] * value_size * item
        for tile in range(first, end, KEYS):
            n = min(KEYS, end - tile)
            for t in range(KEYS):
                key_at[t], value_at[t] = key_next[t], value_next[t]
            if tile + KEYS < end:
                _places(blocks, tile + KEYS, end, block_size, num_kv_heads, head, place)
            elif (
                part < 0 and head + 1 < num_kv_heads
            ):  # most likely the next task: the same tokens for the next head
                _places(blocks, first, end, block_size, num_kv_heads, head + 1, place)
            for t in range(KEYS):
                key_next[t] = _address(keys) + place[t] * size * item
                value_next[t] = _address(values) + place[t] * value_size * item
            for t in range(0, n, 16):
                for w in range(0, words, 16):
                    turn_16(
                        _address(key_at) + t * 8,
                        w * 4,
                        _address(turned) + (w * KEYS + t) * 4,
                        _address(key_next) + t * 8,
                    )
            r = 0
            while r < rows:
                x, target = _address(q) + r * words * 4, _address(p) + r * KEYS * 4
                if rows - r >= 6:
                    score_6(x, words * 4, _address(turned), words, target, kind)
                    r += 6
                elif rows - r >= 3:
                    score_3(x, words * 4, _address(turned), words, target, kind)
                    r += 3
                else:
                    score_1(x, words * 4, _address(turned), words, target, kind)
                    r += 1

            for r in range(rows):
                here = position + r // group
                low = max(0, here - window + 1 - tile) if window > 0 else 0
                high = min(end, min(tile + KEYS, here + 1)) - tile
                row = _shift(p, r * KEYS)
                if high <= low:
                    for t in range(KEYS):
                        row[t] = _ZERO
                    continue
                if _paired(kind):
                    for t in range(KEYS):
                        row[t] *= scale
                if soft_cap > 0:
                    for t in range(low, high):
                        row[t] = soft_cap * np.float32(math.tanh(row[t] / soft_cap))
                if _address(slopes) != 0:
                    slope, distance = slopes[head * group + r % group], here - tile
                    for t in range(low, high):
                        row[t] -= slope * np.float32(distance - t)
                for t in range(low):
                    row[t] = _MINUS_INFINITY
                for t in range(high, KEYS):
                    row[t] = _MINUS_INFINITY
                largest = _largest(row, top[r])
                shrink = _exp(top[r] - largest)
                added = _weigh(row, largest)
                top[r], total[r] = largest, total[r] * shrink + added
                if shrink != 1:
                    for d in range(value_size):
                        acc[r * value_size + d] *= shrink

            for channel in range(0, value_size, KEYS):
                r = 0
                while r < rows:
                    weights, target = (
                        _address(p) + r * KEYS * 4,
                        _address(acc) + (r * value_size + channel) * 4,
                    )
                    at, pitch = channel * item, value_size * 4
                    if rows - r >= 6:
                        add_6(weights, _address(value_at), at, n, target, pitch, _address(value_next), kind)
                        r += 6
                    elif rows - r >= 3:
                        add_3(weights, _address(value_at), at, n, target, pitch, _address(value_next), kind)
                        r += 3
                    else:
                        add_1(weights, _address(value_at), at, n, target, pitch, _address(value_next), kind)
                        r += 1

        for r in range(rows):
            sums = _shift(acc, r * value_size)
            if part >= 0:
                row = _shift(partial, (part + r) * (value_size + 2))
                row[value_size], row[value_size + 1] = top[r], total[r]
                _put(sums, _ONE, value_size, row, kind)
            else:
                at = ((token + r // group) * num_kv_heads + head) * group + r % group
                _put(sums, _ONE / total[r], value_size, _shift(out, at * value_size), kind)

    kind = types.uint16 if dtype == torch.bfloat16 else types.float32
    signature = task_signature(kind, kind, types.float32)
    return cfunc(signature, cache=True, fastmath=_FAST, error_model="numpy")(attend_tile)
