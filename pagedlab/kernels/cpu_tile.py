"""One task of the CPU kernel for any CPU and any head: some query tokens of one sequence, in one group of heads.

Keys and values lie in blocks, ``[block, head, token, channel]``, each block and head one piece (`cpu`)::

    float32, float64       numbers
    bfloat16, float16      their bits, widened as they are read
    int8, e4m3             numbers to be multiplied by the scale that lies behind the piece (`scaled`)

Over tiles of 64 keys runs the online softmax; a sink is its first score. While the keys of a block are scored its
values are fetched to the L2 cache, and while those are summed, the keys of a block one tile on.

(All in this one file: numba's cache on disk watches one file per function.)
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic
from numba.extending import overload

KEY_TILE = 64
"""Keys per step of the online softmax: enough to make its bookkeeping small, few enough to stay in the L1 cache."""
ROW_TILE = 32
"""Rows (query tokens times heads of the group) that share a tile of keys."""

intrinsic: Any = _numba_intrinsic  # its type speaks of the function given, not of the one that comes back

# NaN and infinity keep their meaning: masked scores are -inf, and a model's own NaN must come out as NaN.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_LOOP: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy", "cache": True}

# --- what numba does not have: raw pointers, scratch on the stack, prefetch, bit casts ------------------------------


@intrinsic
def _shift(typingctx, pointer, offset):
    """``pointer + offset`` elements."""
    return pointer(pointer, types.intp), lambda context, builder, signature, args: builder.gep(
        args[0], [args[1]]
    )


@intrinsic
def _like(typingctx, x, pointer):
    """``x`` as the type that ``pointer`` points to."""

    def codegen(context, builder, signature, args):
        return context.cast(builder, args[0], types.float64, pointer.dtype)

    return pointer.dtype(types.float64, pointer), codegen


@intrinsic
def _given(typingctx, pointer):
    """Whether ``pointer`` is not null."""
    return types.boolean(pointer), lambda c, builder, s, args: cgutils.is_not_null(builder, args[0])


@intrinsic
def _scale_behind(typingctx, pointer, offset):
    """Return the float32 that lies at ``pointer[offset]``."""

    def codegen(context, builder, signature, args):
        place = builder.bitcast(builder.gep(args[0], [args[1]]), ir.FloatType().as_pointer())
        return builder.load(place)

    return types.float32(pointer, types.intp), codegen


@intrinsic
def _itemsize(typingctx, pointer):
    """Bytes of one element."""

    def codegen(context, builder, signature, args):
        size = context.get_abi_sizeof(context.get_data_type(pointer.dtype))
        return ir.Constant(ir.IntType(64), size)

    return types.intp(pointer), codegen


@intrinsic
def scratch(typingctx, count, like):
    """Pointer to ``count`` numbers of ``like``'s type on this function's stack.

    The stack rather than an array: LLVM then knows that stores to it change no key and no value, and vectorises.
    """

    def codegen(context, builder, signature, args):
        memory = builder.alloca(context.get_value_type(signature.args[1]), size=args[0])
        memory.align = 64
        return memory

    return types.CPointer(like)(types.intp, like), codegen


@intrinsic
def _prefetch(typingctx, pointer, offset):
    """Ask for the cache line of ``pointer[offset]``, harmless at any address.

    To the L2 cache, which can wait for twice as many lines at once as the L1 cache: 16 GB/s on one core instead of 10.
    """

    def codegen(context, builder, signature, args):
        i32, voidptr = ir.IntType(32), cgutils.voidptr_t
        kind = ir.FunctionType(ir.VoidType(), [voidptr, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        address = builder.bitcast(builder.gep(args[0], [args[1]]), voidptr)
        builder.call(function, [address, i32(0), i32(2), i32(1)])
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def _bits_to_float(typingctx, bits):
    return types.float32(types.int32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


def _widen(x: Any) -> Any:
    """A cached number as the kernel computes with it, unscaled. 16 bits are those of bfloat16 or float16."""
    raise NotImplementedError


@overload(_widen)
def _widen_by_type(x):
    if x is types.int8:
        return lambda x: np.float32(x)
    if x is types.uint16:  # bfloat16 is the upper half of a float32
        return lambda x: _bits_to_float(np.int32(x) << np.int32(16))
    if x is types.int16:
        return _small_float(np.int16, 3, 2.0**112, 2.0**16)
    if x is types.uint8:
        return _small_float(np.int8, 4, 2.0**120, 480.0)
    return lambda x: x


def _small_float(signed: Any, spread: int, rebias: float, beyond: float) -> Any:
    """Widen float16 or e4m3: move the bits, then repair the exponent's bias by a multiplication (subnormals too).

    The sign is moved along, so that copies of it stand in the way of the exponent. Numbers from ``beyond`` on are
    infinity or NaN.
    """
    left = 32 - np.iinfo(signed).bits
    mask, bias, largest = -(2**31) + 2 ** (31 - spread) - 1, np.float32(rebias), np.float32(beyond)

    def widen(x):
        value = _bits_to_float(np.int32(((np.int64(signed(x)) << left) >> spread) & mask)) * bias
        infinite = np.int32(0x7F800000) if abs(value) >= largest else np.int32(0)
        return _bits_to_float(_float_to_bits(value) | infinite)

    return widen


@intrinsic
def _float_to_bits(typingctx, x):
    return types.int32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(32))


def _exp(x: Any) -> Any:
    """Return e to the x <= 0: libm's in float64; in float32 a polynomial that LLVM can vectorise (Cephes)."""
    raise NotImplementedError


@overload(_exp)
def _exp_by_type(x):
    if x is types.float64:
        return lambda x: math.exp(x)
    low, log2e, ln2_hi, ln2_lo = map(np.float32, (-87.0, 1.44269504, 0.693359375, -2.12194440e-4))
    c0, c1, c2 = map(np.float32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3))
    c3, c4, c5 = map(np.float32, (4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1))
    zero, half, one = map(np.float32, (0.0, 0.5, 1.0))

    def exp32(x):
        y = low if x < low else x  # keeps NaN
        n = np.floor(y * log2e + half)
        r = (y - n * ln2_hi) - n * ln2_lo
        p = ((((c0 * r + c1) * r + c2) * r + c3) * r + c4) * r + c5
        scaled = (p * r * r + r + one) * _bits_to_float((np.int32(n) + np.int32(127)) << np.int32(23))
        return zero if x < low else scaled

    return exp32


# --- the loops ------------------------------------------------------------------------------------------------------


@njit(forceinline=True, **_LOOP)
def _dot_2x4(q0, q1, k0, k1, k2, k3, size, zero):
    """Eight dot products over ``size`` channels: each number is loaded once and used two or four times."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero
    for d in range(size):
        x0, x1, x2, x3 = _widen(k0[d]), _widen(k1[d]), _widen(k2[d]), _widen(k3[d])
        a0 += q0[d] * x0
        a1 += q0[d] * x1
        a2 += q0[d] * x2
        a3 += q0[d] * x3
        b0 += q1[d] * x0
        b1 += q1[d] * x1
        b2 += q1[d] * x2
        b3 += q1[d] * x3
    return a0, a1, a2, a3, b0, b1, b2, b3


@njit(forceinline=True, **_LOOP)
def _scores(q, rows, size, keys, count, ahead, p, zero):
    """``p[r, t] = q[r] . keys[t]`` for ``rows`` x ``count``, four keys and two rows at a time.

    ``p`` has KEY_TILE columns. It and ``q`` have an even number of rows: the last is padding if ``rows`` is odd.
    """
    line = 64 // _itemsize(keys)
    for t in range(0, count - 3, 4):
        k0, k1 = _shift(keys, t * size), _shift(keys, (t + 1) * size)
        k2, k3 = _shift(keys, (t + 2) * size), _shift(keys, (t + 3) * size)
        for c in range(t * size, (t + 4) * size, line):
            _prefetch(ahead, c)
        for r in range(0, rows, 2):
            q0, q1 = _shift(q, r * size), _shift(q, (r + 1) * size)
            at = r * KEY_TILE + t
            if size == 64:  # written out for LLVM: a constant makes the most common case a third faster
                a0, a1, a2, a3, b0, b1, b2, b3 = _dot_2x4(q0, q1, k0, k1, k2, k3, 64, zero)
            else:
                a0, a1, a2, a3, b0, b1, b2, b3 = _dot_2x4(q0, q1, k0, k1, k2, k3, size, zero)
            p[at], p[at + 1], p[at + 2], p[at + 3] = a0, a1, a2, a3
            at += KEY_TILE
            p[at], p[at + 1], p[at + 2], p[at + 3] = b0, b1, b2, b3
    for t in range(count - count % 4, count):
        k0 = _shift(keys, t * size)
        for r in range(rows):
            q0 = _shift(q, r * size)
            a0 = zero
            for d in range(size):
                a0 += q0[d] * _widen(k0[d])
            p[r * KEY_TILE + t] = a0


@njit(forceinline=True, **_LOOP)
def _add_4x2(a0, a1, a2, a3, b0, b1, b2, b3, v0, v1, v2, v3, s0, s1, size):
    """Add four weighted values to the sums of two rows."""
    for d in range(size):
        x0, x1, x2, x3 = _widen(v0[d]), _widen(v1[d]), _widen(v2[d]), _widen(v3[d])
        s0[d] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
        s1[d] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3


@njit(forceinline=True, **_LOOP)
def _accumulate(p, rows, size, values, count, ahead, acc):
    """``acc[r] += sum of p[r, t] * values[t]``, four values and two rows at a time; rows padded as in `_scores`."""
    line = 64 // _itemsize(values)
    for t in range(0, count - 3, 4):
        v0, v1 = _shift(values, t * size), _shift(values, (t + 1) * size)
        v2, v3 = _shift(values, (t + 2) * size), _shift(values, (t + 3) * size)
        for c in range(t * size, (t + 4) * size, line):
            _prefetch(ahead, c)
        for r in range(0, rows, 2):
            at = r * KEY_TILE + t
            a0, a1, a2, a3 = p[at], p[at + 1], p[at + 2], p[at + 3]
            at += KEY_TILE
            b0, b1, b2, b3 = p[at], p[at + 1], p[at + 2], p[at + 3]
            s0, s1 = _shift(acc, r * size), _shift(acc, (r + 1) * size)
            if size == 64:
                _add_4x2(a0, a1, a2, a3, b0, b1, b2, b3, v0, v1, v2, v3, s0, s1, 64)
            else:
                _add_4x2(a0, a1, a2, a3, b0, b1, b2, b3, v0, v1, v2, v3, s0, s1, size)
    for t in range(count - count % 4, count):
        v0 = _shift(values, t * size)
        for r in range(rows):
            a0 = p[r * KEY_TILE + t]
            s0 = _shift(acc, r * size)
            for d in range(size):
                s0[d] += a0 * _widen(v0[d])


@njit(nogil=True, error_model="numpy", cache=True, fastmath=_FAST | {"nnan"})
def _largest(p, count, start):
    """Largest of ``start`` and ``p[:count]``. NaN may be passed over here: it comes back with the exponentials."""
    for t in range(count):
        start = p[t] if p[t] > start else start
    return start


def _attend_tile(
    query, keys, values, out, partial, blocks, slopes, sinks, shape, reals,
    head, token, count, position, first, end, part,
):  # fmt: skip
    """Attend for query tokens ``token .. token + count``, at ``position ..`` of a sequence, over keys ``first .. end``.

    ``shape``: KV heads, query heads of each, channels of a key and of a value, tokens of a block, numbers from one
    block and head to the next among keys and among values, sliding window (0: none), query tokens of a task.
    ``reals``: scale, soft cap (0: none). If ``part`` is not negative, sums, top and total go to the rows of ``partial``
    from there on, to be joined with those of other keys.
    """
    num_kv_heads, group, size, value_size = shape[0], shape[1], shape[2], shape[3]
    block_size, key_pitch, value_pitch, window = shape[4], shape[5], shape[6], shape[7]
    scale, soft_cap = _like(reals[0], query), _like(reals[1], query)
    zero = _like(0.0, query)
    rows = count * group
    pairs = rows + rows % 2
    q, acc = scratch(pairs * size, scale), scratch(pairs * value_size, scale)
    p = scratch(pairs * KEY_TILE, scale)
    top, total = scratch(rows, scale), scratch(rows, scale)
    sink = _given(sinks) and end == position + count
    for r in range(rows):
        top[r], total[r] = -np.inf, zero
        if sink:
            top[r], total[r] = sinks[head * group + r % group], _like(1.0, query)
        source = _shift(query, (((token + r // group) * num_kv_heads + head) * group + r % group) * size)
        for d in range(size):
            q[r * size + d] = source[d] * scale
    for d in range(rows * size, pairs * size):
        q[d] = zero
    for d in range(pairs * value_size):
        acc[d] = zero

    for tile in range(first, end, KEY_TILE):
        stop = min(tile + KEY_TILE, end)
        at = tile
        while at < stop:
            offset = at % block_size
            piece = min(block_size - offset, stop - at)
            start = np.int64(blocks[at // block_size]) * num_kv_heads + head
            # While the keys of a block are scored, its values are on their way.
            if _itemsize(keys) == 1:
                _prefetch(values, start * value_pitch + block_size * value_size)
            _scores(
                q, rows, size, _shift(keys, start * key_pitch + offset * size), piece,
                _shift(values, start * value_pitch + offset * value_size), _shift(p, at - tile), zero,
            )  # fmt: skip
            if _itemsize(keys) == 1:
                step = _scale_behind(keys, start * key_pitch + block_size * size)
                for r in range(rows):
                    for t in range(at - tile, at - tile + piece):
                        p[r * KEY_TILE + t] *= step
            at += piece

        for r in range(rows):
            here = position + r // group
            low = max(0, here - window + 1 - tile) if window > 0 else 0
            high = min(stop, here + 1) - tile
            row = _shift(p, r * KEY_TILE)
            if high <= low:
                for t in range(stop - tile):
                    row[t] = zero
                continue
            if soft_cap > 0:
                for t in range(low, high):
                    row[t] = soft_cap * math.tanh(row[t] / soft_cap)
            if _given(slopes):
                slope, distance = slopes[head * group + r % group], here - tile
                for t in range(low, high):
                    row[t] -= slope * _like(np.float64(distance - t), query)
            for t in range(low):
                row[t] = -np.inf
            for t in range(high, stop - tile):
                row[t] = -np.inf
            largest = _largest(row, stop - tile, top[r])
            shrink = _exp(top[r] - largest)
            added = zero
            for t in range(stop - tile):
                e = _exp(row[t] - largest)
                row[t] = e
                added += e
            top[r], total[r] = largest, total[r] * shrink + added
            if shrink != 1:
                for d in range(value_size):
                    acc[r * value_size + d] *= shrink

        at = tile
        while at < stop:
            offset = at % block_size
            piece = min(block_size - offset, stop - at)
            start = np.int64(blocks[at // block_size]) * num_kv_heads + head
            if _itemsize(values) == 1:
                step = _scale_behind(values, start * value_pitch + block_size * value_size)
                for r in range(rows):
                    for t in range(at - tile, at - tile + piece):
                        p[r * KEY_TILE + t] *= step
            # While the values of a block are summed, the keys one tile further are on their way.
            later = min(at + KEY_TILE, end - 1)
            ahead = np.int64(blocks[later // block_size]) * num_kv_heads + head
            if _itemsize(keys) == 1:
                _prefetch(keys, ahead * key_pitch + block_size * size)
            _accumulate(
                _shift(p, at - tile), rows, value_size,
                _shift(values, start * value_pitch + offset * value_size), piece,
                _shift(keys, ahead * key_pitch + offset * size), acc,
            )  # fmt: skip
            at += piece

    for r in range(rows):
        if part >= 0:
            target, share = _shift(partial, (part + r) * (value_size + 2)), _like(1.0, query)
            target[value_size], target[value_size + 1] = top[r], total[r]
        else:
            target = _shift(
                out, (((token + r // group) * num_kv_heads + head) * group + r % group) * value_size
            )
            share = 1 / total[r]
        for d in range(value_size):
            target[d] = acc[r * value_size + d] * share


@functools.cache
def tile(dtype: torch.dtype) -> Any:
    """Compile `_attend_tile` for a cache of ``dtype``; its machine code lies at ``.address`` and is kept for good.

    The batch loop calls it by address: linked in, it would be optimised again with every layout (seconds each).
    """
    real = types.float64 if dtype == torch.float64 else types.float32
    bits = {torch.bfloat16: types.uint16, torch.float16: types.int16, torch.float8_e4m3fn: types.uint8}
    cached = types.int8 if dtype == torch.int8 else bits.get(dtype, real)
    return cfunc(task_signature(real, cached, real), cache=True, fastmath=_FAST, error_model="numpy")(
        _attend_tile
    )


def task_signature(query: Any, cached: Any, real: Any) -> Any:
    """Return the types of a task's arguments: queries and outputs, the cache, and what sums are taken in."""
    numbers = (query, cached, cached, query, real, types.int32, real, real, types.int64, types.float64)
    return types.void(*map(types.CPointer, numbers), *[types.int64] * 7)
