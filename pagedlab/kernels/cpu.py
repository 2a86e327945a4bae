"""Paged attention on CPU cores: numba loops that read keys and values where they lie.

Decoding is limited by memory, so every key and value is read once, whichever query heads want it, in the order it lies
in. A cache tensor is ``[block, head, token, channel]``: the tokens of one block and one KV head are one piece::

    block 7   head 0 | token 0: c0 c1 c2 .. | token 1: c0 c1 .. | ...      <- one contiguous piece of
              head 1 | token 0: c0 c1 c2 .. | ...                             block_size * head_size numbers
    block 8   ...

One *task* is one sequence, one KV head and a tile of its query tokens; the tile's rows (query tokens times the query
heads of the group) share each key that is loaded. Over tiles of keys runs the online softmax (Milakov & Gimelshein
2018; Dao et al. 2022): scores of the tile, a new maximum, the old sums rescaled, then one pass over the values. While
the keys of a block are scored its values are fetched to the L2 cache, and while those are summed, the keys of a block
one tile on. Blocks lie anywhere, so the hardware's own prefetcher stops at the end of each; asking for the next ones
early is what makes paged decoding as fast as dense and faster.

Tasks are cut and computed without regard to who else is in the batch, so a sequence's output is the same bits in every
company and with every number of threads.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import cfunc, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic
from numba.extending import overload, register_jitable
from numpy.typing import NDArray

from pagedlab.errors import ConfigError
from pagedlab.kernels.base import AttentionBatch
from pagedlab.kernels.layouts import device_functions
from pagedlab.kernels.wide import fits, wide_tile
from pagedlab.policies.layout import Layout

KEY_TILE = 64
"""Keys per step of the online softmax: enough to make its bookkeeping small, few enough to stay in the L1 cache."""
ROW_TILE = 32
"""Rows (query tokens times heads of the group) that share a tile of keys."""

intrinsic: Any = _numba_intrinsic  # its type speaks of the function given, not of the one that comes back

# NaN and infinity keep their meaning: masked scores are -inf, and a model's own NaN must come out as NaN.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_LOOP: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy", "cache": True}

# --- what numba does not have: raw pointers, scratch on the stack, prefetch, bit casts ------------------------------
# (in this module and not in one of their own: numba's cache on disk watches one file per function)


@intrinsic
def _call(typingctx, address, arguments):
    """Call the C function at ``address`` with the numbers in the tuple ``arguments``; pointers go as integers."""

    def codegen(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.intp, arguments), codegen


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
def _itemsize(typingctx, pointer):
    """Bytes of one element."""

    def codegen(context, builder, signature, args):
        size = context.get_abi_sizeof(context.get_data_type(pointer.dtype))
        return ir.Constant(ir.IntType(64), size)

    return types.intp(pointer), codegen


@intrinsic
def _scratch(typingctx, count, like):
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
    """A cached number as the kernel computes with it. 16-bit integers are the bits of bfloat16 or float16."""
    raise NotImplementedError


@overload(_widen)
def _widen_by_type(x):
    if x is types.uint16:  # bfloat16 is the upper half of a float32
        return lambda x: _bits_to_float(np.int32(x) << np.int32(16))
    if (
        x is types.int16
    ):  # float16: move the exponent, then repair its bias by a multiplication (subnormals too)
        rebias = np.float32(2.0**112)

        def half(x):
            bits = np.int32(x)
            magnitude = (bits & np.int32(0x7FFF)) << np.int32(13)
            infinite = np.int32(0x7F800000) if magnitude >= np.int32(0x0F800000) else np.int32(0)
            sign = np.int32(-2147483648) if bits < np.int32(0) else np.int32(0)
            value = _bits_to_float(magnitude) * rebias
            return _bits_to_float(_float_to_bits(value) | infinite | sign)

        return half
    return lambda x: x


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
    query, keys, values, out, blocks, num_kv_heads, group, size, value_size, block_size, head, token, count, position,
    scale64, window, soft_cap64
):  # fmt: skip
    """Attend for query tokens ``token .. token + count``, at ``position ..`` of one sequence, in one group of heads."""
    scale, soft_cap = _like(scale64, query), _like(soft_cap64, query)
    zero = _like(0.0, query)
    rows = count * group
    pairs = rows + rows % 2
    q, acc = _scratch(pairs * size, scale), _scratch(pairs * value_size, scale)
    p = _scratch(pairs * KEY_TILE, scale)
    top, total = _scratch(rows, scale), _scratch(rows, scale)
    for r in range(rows):
        top[r], total[r] = -np.inf, zero
        source = _shift(query, (((token + r // group) * num_kv_heads + head) * group + r % group) * size)
        for d in range(size):
            q[r * size + d] = source[d] * scale
    for d in range(rows * size, pairs * size):
        q[d] = zero
    for d in range(pairs * value_size):
        acc[d] = zero

    end = position + count
    first = max(0, position - window + 1) if window > 0 else 0
    for tile in range(first, end, KEY_TILE):
        stop = min(tile + KEY_TILE, end)
        at = tile
        while at < stop:
            offset = at % block_size
            piece = min(block_size - offset, stop - at)
            start = (np.int64(blocks[at // block_size]) * num_kv_heads + head) * block_size + offset
            # While the keys of a block are scored, its values are on their way.
            _scores(
                q, rows, size, _shift(keys, start * size), piece, _shift(values, start * value_size),
                _shift(p, at - tile), zero,
            )  # fmt: skip
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
            start = (np.int64(blocks[at // block_size]) * num_kv_heads + head) * block_size + offset
            # While the values of a block are summed, the keys one tile further are on their way.
            later = min(at + KEY_TILE, end - 1)
            ahead = (np.int64(blocks[later // block_size]) * num_kv_heads + head) * block_size + offset
            _accumulate(
                _shift(p, at - tile), rows, value_size, _shift(values, start * value_size), piece,
                _shift(keys, ahead * size), acc,
            )  # fmt: skip
            at += piece

    for r in range(rows):
        target = _shift(out, (((token + r // group) * num_kv_heads + head) * group + r % group) * value_size)
        share = 1 / total[r]
        for d in range(value_size):
            target[d] = acc[r * value_size + d] * share


@functools.cache
def _tile(dtype: torch.dtype) -> Any:
    """Compile `_attend_tile` for a cache of ``dtype``; its machine code lies at ``.address`` and is kept for good.

    The batch loop calls it by address: linked in, it would be optimised again with every layout (seconds each).
    """
    real = types.float64 if dtype == torch.float64 else types.float32
    cached = {torch.bfloat16: types.uint16, torch.float16: types.int16}.get(dtype, real)
    pointers = [types.CPointer(t) for t in (real, cached, cached, real, types.int32)]
    signature = types.void(*pointers, *[types.int64] * 9, types.float64, types.int64, types.float64)
    return cfunc(signature, cache=True, fastmath=_FAST, error_model="numpy")(_attend_tile)


@functools.cache
def _batch_loop(block_of: Callable[..., Any], fingerprint: str) -> Callable[..., str]:
    """Return the loop over a batch for one layout: what is cut into tasks, and which thread takes which.

    ``fingerprint`` stands for the code of ``block_of``. numba's cache on disk knows a function by the values that it
    refers to, so one that returns its fingerprint is compiled anew when the layout's code has changed.
    """
    find = register_jitable(block_of)

    @njit(parallel=True, nogil=True, error_model="numpy", cache=True)
    def attend(
        tile_address, query, keys, values, out, num_kv_heads, group, size, value_size, block_size,
        query_start, context_lens, rows, entries, index, scale, window, soft_cap, parts
    ):  # fmt: skip
        tile = max(1, ROW_TILE // group)
        work = 0
        for s in range(rows.shape[0]):
            count, length = np.int64(query_start[s + 1] - query_start[s]), np.int64(context_lens[s])
            for j in range(0, count, tile):
                work += _work(min(tile, count - j), length - count + j, window) * num_kv_heads
        for part in prange(parts):
            mine, beyond = work * part // parts, work * (part + 1) // parts
            blocks = np.empty(context_lens.max() // block_size + 1, np.int32)
            done = 0
            for s in range(rows.shape[0]):
                count, length = np.int64(query_start[s + 1] - query_start[s]), np.int64(context_lens[s])
                found = False
                for head in range(num_kv_heads):
                    for j in range(0, count, tile):
                        n, position = min(tile, count - j), length - count + j
                        if mine <= done < beyond:
                            if not found:
                                first = max(0, length - count + 1 - window) if window > 0 else 0
                                for i in range(first // block_size, (length - 1) // block_size + 1):
                                    blocks[i] = find(entries, index, rows[s], i)
                                found = True
                            arguments = (
                                query, keys, values, out, blocks.ctypes.data, num_kv_heads, group, size, value_size,
                                block_size, head, query_start[s] + j, n, position, scale, window, soft_cap,
                            )  # fmt: skip
                            _call(tile_address, arguments)
                        done += _work(n, position, window)
        return fingerprint

    return attend


@njit(nogil=True, error_model="numpy", cache=True)
def _work(count, position, window):
    """How much a tile costs: its query tokens times the keys that it reads."""
    visible = position + count
    return count * (min(visible, count + window) if window > 0 else visible)


@njit(nogil=True, error_model="numpy", cache=True)
def _write(cache, new, slots):
    block_size = cache.shape[2]
    for i in range(new.shape[0]):
        block, offset = slots[i] // block_size, slots[i] % block_size
        for h in range(new.shape[1]):
            for d in range(new.shape[2]):
                cache[block, h, offset, d] = new[i, h, d]


# --- the implementation ---------------------------------------------------------------------------------------------

# numba's fallback thread pool (workqueue) ends the process when two Python threads enter it at once, and a notebook
# runs engines in threads; with OpenMP, where torch and numba share one pool, the lock costs nothing.
_one_launch = threading.Lock()


@functools.cache
def _most_threads() -> int:
    """Start numba's pool and return its size."""
    threads = torch.get_num_threads()
    most = int(numba.get_num_threads())
    # Starting numba's pool sizes the OpenMP pool that it shares with torch; put torch's size back.
    torch.set_num_threads(threads)
    return most


def launch(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a parallel numba function with ``arguments`` and, last, the number of threads: as many as torch uses."""
    threads = min(torch.get_num_threads(), _most_threads())
    with _one_launch:
        if numba.get_num_threads() != threads:
            numba.set_num_threads(threads)
        function(*arguments, threads)


_AS_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def _view(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's own memory as an array; 16-bit floats, which numpy or numba do not have, as their bits."""
    bits = _AS_BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).detach().numpy()


class CPUPagedAttention:
    """Decode and chunked prefill straight from the blocks, for caches of float32, bfloat16, float16 and float64.

    Arithmetic is float64 for a float64 cache and float32 otherwise. Uses as many threads as torch does
    (``torch.set_num_threads``).
    """

    axis_order: tuple[str, ...] = ("block", "head", "token", "channel")

    def __init__(self, layout: Layout, **params: Any) -> None:
        block_of = device_functions(layout).numba
        block_of = getattr(block_of, "py_func", block_of)
        code = block_of.__code__
        digest = hashlib.sha256(code.co_code + repr((code.co_consts, code.co_names)).encode()).hexdigest()
        self._batch_loop = _batch_loop(block_of, digest)
        _most_threads()

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Return an empty [num_blocks, num_kv_heads, block_size, head_size]."""
        return torch.empty(num_blocks, num_kv_heads, block_size, head_size, dtype=dtype, device=device)

    def write(self, cache: torch.Tensor, new: torch.Tensor, batch: AttentionBatch) -> None:
        """Store ``new`` [num_tokens, num_kv_heads, head_size] at ``batch.slots``."""
        _write(_view(cache), _view(new.to(cache.dtype).contiguous()), batch.slots)

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [num_tokens, num_heads, value_head_size]; see `pagedlab.kernels.base`."""
        if alibi_slopes is not None or sinks is not None:
            lacking = "ALiBi slopes" if alibi_slopes is not None else "attention sinks"
            raise ConfigError(f"kernel 'cpu-paged' has no {lacking}; 'gather-sdpa' and 'dense' have")
        dtype = key_cache.dtype
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        num_tokens, num_heads, size = query.shape
        _, num_kv_heads, block_size, value_size = value_cache.shape
        if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
            raise ValueError("cpu-paged reads cache tensors by address: they must be contiguous")
        if query.dtype == dtype and fits(dtype, size, value_size):
            computed, tile = dtype, wide_tile(dtype)
        else:
            tile = _tile(dtype)
        q = query.to(computed).contiguous()
        out = torch.empty(num_tokens, num_heads, value_size, dtype=computed)
        if num_tokens == 0:
            return out.to(query.dtype)
        launch(
            self._batch_loop,
            tile.address,
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
            num_kv_heads,
            num_heads // num_kv_heads,
            size,
            value_size,
            block_size,
            batch.query_start,
            batch.context_lens,
            batch.rows,
            batch.entries,
            batch.index,
            float(scale),
            sliding_window or 0,
            float(soft_cap or 0.0),
        )
        return out if computed == query.dtype else out.to(query.dtype)
