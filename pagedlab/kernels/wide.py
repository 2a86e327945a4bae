"""The CPU kernel's tile on AVX-512, for bfloat16, float32 and bytes: two small matrix products in registers.

`cpu.py` cuts a batch into tasks (one sequence, one KV head, some of its query tokens) and runs the online softmax over
tiles of 64 keys; this is the same task for heads of 64, 128, .. channels on a CPU that has 32 registers of 16 floats::

    keys of a tile, wherever their blocks lie        turned once: [word of 4 bytes][64 keys]
    scores [rows, 64]     += word of a query (spread over a vector) * 64 keys
    sums   [rows, 64 ch]  += weight of a key (spread over a vector) * 64 channels of its value

So no sum ever has to be added up across a register. A word is two bfloat16, of which the CPU has a dot product; values
are widened in place, even and odd channels apart (a shift, a mask), and put back in order at the end. While the keys of
a tile are turned, those of the next tile are fetched to the L2 cache, and while its values are summed, the next tile's
values; after the last tile, the first one of the next head.

A cache of one byte a channel is turned four bytes a word and becomes the query's bfloat16 or float32 on the way. Scores
are multiplied by the scales of the keys' blocks, weights by those of the values'.

A word of float32 is one number: chunks of a prompt take 0.6 of the time that `cpu_tile` takes, and decoding, which
waits for memory, 0.9 to 1.

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
    BYTES,
    FINGERPRINT,
    KEYS,
    add_1,
    add_2,
    add_3,
    add_6,
    fetch,
    has_wide,
    largest_64,
    score_1,
    score_2,
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
def _float_at(typingctx, address):
    pointer = ir.FloatType().as_pointer()
    return types.float32(types.int64), lambda c, b, s, args: b.load(b.inttoptr(args[0], pointer))


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
def _places(blocks, tile, end, shape, head, item, keys, values, key_at, value_at):
    """Find the addresses of 64 keys and of their values from ``tile`` on, in caches at ``keys`` and ``values``.

    From ``end`` on stands the last key again: read, and never counted.
    """
    num_kv_heads, key_step, value_step, block_size = shape[0], shape[2] * item, shape[3] * item, shape[4]
    key, value = keys, values
    t, n, block, offset = 0, min(KEYS, end - tile), tile // block_size, tile % block_size
    while t < n:
        piece = (np.int64(blocks[block]) * num_kv_heads + head) * item
        key, value = (
            keys + piece * shape[5] + offset * key_step,
            values + piece * shape[6] + offset * value_step,
        )
        rest = block_size - offset
        if item == 1:
            fetch(key + rest * key_step)
            fetch(value + rest * value_step)
        count = min(rest, n - t)
        for i in range(count):
            key_at[t + i] = key + i * key_step
            value_at[t + i] = value + i * value_step
        t, block, offset = t + count, block + 1, 0
        key, value = key + (count - 1) * key_step, value + (count - 1) * value_step
    for i in range(n, KEYS):
        key_at[i], value_at[i] = key, value


@njit(**_LOOP)
def _scales(tile, end, shape, key_at, value_at, key_scales, value_scales):
    """Read the scales behind the blocks of the keys ``tile .. end``, 64 at most, and of their values."""
    block_size = shape[4]
    t, n, rest = 0, min(KEYS, end - tile), block_size - tile % block_size
    while t < n:
        key_scale, value_scale = (
            _float_at(key_at[t] + rest * shape[2]),
            _float_at(value_at[t] + rest * shape[3]),
        )
        stop = min(n, t + rest)
        for i in range(t, stop):
            key_scales[i], value_scales[i] = key_scale, value_scale
        t, rest = stop, block_size


@njit(forceinline=True, **_LOOP)
def _put(sums, share, value_size, target, per_word):
    """Write ``sums * share`` in order: the first numbers of 16 words stand together, the second ones, .."""
    for d in range(0, value_size, 16 * per_word):
        for i in range(16):
            for k in range(per_word):
                target[d + per_word * i + k] = _narrow(sums[d + 16 * k + i] * share, target[0])


def _per_word(kind: Any) -> Any:
    """How many numbers of ``kind`` a word holds."""
    raise NotImplementedError


@overload(_per_word, inline="always")
def _per_word_by_type(kind):
    if kind is types.float32:
        return lambda kind: 1
    return (lambda kind: 2) if kind is types.uint16 else (lambda kind: 4)


def fits(dtype: torch.dtype, stored: torch.dtype, size: int, value_size: int) -> bool:
    """Whether `wide_tile` takes heads of these sizes."""
    return has_wide(dtype, stored) and size * stored.itemsize % 64 == 0 and value_size % KEYS == 0


@functools.cache
def wide_tile(dtype: torch.dtype, stored: torch.dtype, fingerprint: int = FINGERPRINT) -> Any:
    """Compile a task for queries and output of ``dtype``, and a cache of ``stored``; its code lies at ``.address``.

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
        window = shape[7]
        kind, held = _first(query), _first(keys)
        item = 4 // _per_word(held)
        scale, soft_cap = np.float32(reals[0]), np.float32(reals[1])
        rows = count * group
        words, lines = size // _per_word(kind), _per_word(held) // _per_word(kind)
        q = scratch(rows * size, kind)
        turned = scratch(words * KEYS, _ZERO)
        p, acc = scratch(rows * KEYS, _ZERO), scratch(rows * value_size, _ZERO)
        top, total = scratch(rows, _ZERO), scratch(rows, _ZERO)
        key_at, value_at = scratch(KEYS, 0), scratch(KEYS, 0)
        key_next, value_next = scratch(KEYS, 0), scratch(KEYS, 0)
        key_scales, value_scales = scratch(KEYS, _ZERO), scratch(KEYS, _ZERO)
        for t in range(KEYS):
            key_scales[t] = value_scales[t] = _ONE
        sink = _address(sinks) != 0 and end == position + count
        for r in range(rows):
            top[r], total[r] = _MINUS_INFINITY, _ZERO
            if sink:
                top[r], total[r] = sinks[head * group + r % group], _ONE
            source = _shift(query, (((token + r // group) * num_kv_heads + head) * group + r % group) * size)
            for d in range(size):
                q[r * size + d] = source[d]
        for d in range(rows * value_size):
            acc[d] = _ZERO
        caches = _address(keys), _address(values)
        _places(blocks, first, end, shape, head, item, *caches, key_next, value_next)
        for tile in range(first, end, KEYS):
            n = min(KEYS, end - tile)
            key_at, key_next = key_next, key_at
            value_at, value_next = value_next, value_at
            if item == 1:
                _scales(tile, end, shape, key_at, value_at, key_scales, value_scales)
            if tile + KEYS < end:
                _places(blocks, tile + KEYS, end, shape, head, item, *caches, key_next, value_next)
            elif (
                part < 0 and head + 1 < num_kv_heads
            ):  # most likely the next task: the same tokens for the next head
                _places(blocks, first, end, shape, head + 1, item, *caches, key_next, value_next)
            for t in range(0, n, 16):
                for w in range(0, words // lines, 16):
                    turn_16(
                        _address(key_at) + t * 8,
                        w * 4,
                        _address(turned) + (w * lines * KEYS + t) * 4,
                        _address(key_next) + t * 8,
                        kind,
                        held,
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
                elif rows - r >= 2:
                    score_2(x, words * 4, _address(turned), words, target, kind)
                    r += 2
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
                for t in range(KEYS):
                    row[t] *= scale * key_scales[t]
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
                largest = largest_64(_address(row), top[r])
                shrink = _exp(top[r] - largest)
                added = _weigh(row, largest)
                top[r], total[r] = largest, total[r] * shrink + added
                if item == 1:
                    for t in range(KEYS):
                        row[t] *= value_scales[t]
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
                        add_6(weights, _address(value_at), at, n, target, pitch, _address(value_next), held)
                        r += 6
                    elif rows - r >= 3:
                        add_3(weights, _address(value_at), at, n, target, pitch, _address(value_next), held)
                        r += 3
                    elif rows - r >= 2:
                        add_2(weights, _address(value_at), at, n, target, pitch, _address(value_next), held)
                        r += 2
                    else:
                        add_1(weights, _address(value_at), at, n, target, pitch, _address(value_next), held)
                        r += 1

        for r in range(rows):
            sums = _shift(acc, r * value_size)
            if part >= 0:
                row = _shift(partial, (part + r) * (value_size + 2))
                row[value_size], row[value_size + 1] = top[r], total[r]
                _put(sums, _ONE, value_size, row, _per_word(held))
            else:
                at = ((token + r // group) * num_kv_heads + head) * group + r % group
                _put(sums, _ONE / total[r], value_size, _shift(out, at * value_size), _per_word(held))

    kind = types.uint16 if dtype == torch.bfloat16 else types.float32
    signature = task_signature(kind, BYTES.get(stored, kind), types.float32)
    return cfunc(signature, cache=True, fastmath=_FAST, error_model="numpy")(attend_tile)
