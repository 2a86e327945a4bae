"""The CPU kernel's tile on AVX-512, for queries and caches of bfloat16: two small matrix products in registers.

`cpu.py` cuts a batch into tasks (one sequence, one KV head, some of its query tokens) and runs the online softmax over
tiles of 64 keys; this is the same task for heads of 64, 128, .. channels on a CPU that has 32 registers of 16 floats::

    keys of a tile, wherever their blocks lie        turned once: [word of 4 bytes][64 keys]
    scores [rows, 64]     += word of a query (spread over a vector) * 64 keys
    sums   [rows, 64 ch]  += weight of a key (spread over a vector) * 64 channels of its value

So no sum ever has to be added up across a register. A word is two bfloat16, of which the CPU has a dot product; values
are widened in place, even and odd channels apart (a shift, a mask), and put back in order at the end. While the keys of
a tile are turned, those of the next tile are fetched to the L2 cache, and while its values are summed, the next tile's
values; after the last tile, the first one of the next head.

The loops take float32 as well (a word is one number), but there decoding waits for memory, and turning keys costs more
than it saves (13 ms for what `cpu.py` does in 12); so `fits` says no.

(All in this one file: numba's cache on disk watches one file per function.)
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="call-arg, var-annotated, unreachable, import-untyped"
from __future__ import annotations

import functools
import math
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic
from numba.extending import overload

KEYS = 64
"""Keys of a tile, and channels of a value summed at a time: four vectors of 16."""

intrinsic: Any = _numba_intrinsic
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_LOOP: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy", "cache": True}
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16)
_SAME = ir.Constant(_WORDS, [_I32(0)] * 16)


@functools.cache
def has_wide(dtype: torch.dtype) -> bool:
    """Whether this CPU, and numba as it is set, have what the loops of this file need for ``dtype``."""
    if dtype not in (torch.float32, torch.bfloat16) or any(
        getattr(numba.config, name, None) for name in ("CPU_NAME", "CPU_FEATURES")
    ):
        return False
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:
        return False
    # Before LLVM 17 the instruction for bfloat16 was called another way.
    pairs = features.get("avx512bf16", False) and llvm.llvm_version_info[0] >= 17
    return bool(features.get("avx512f", False) and (pairs or dtype == torch.float32))


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 32)


def _function(b, result, arguments, name):
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, arguments), name)


def _load(b, address, kind, align=4):
    loaded = b.load(b.inttoptr(address, kind.as_pointer()))
    loaded.align = align
    return loaded


def _store(b, value, address):
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 4


def _fetch(b, address):
    """Ask for a cache line, to the L2 cache: harmless at any address."""
    kinds = [cgutils.voidptr_t, _I32, _I32, _I32]
    function = _function(b, ir.VoidType(), kinds, "llvm.prefetch.p0")
    b.call(function, [b.inttoptr(address, cgutils.voidptr_t), _I32(0), _I32(2), _I32(1)])


def _spread(b, one):
    kind = ir.VectorType(one.type, 16)
    undefined = ir.Constant(kind, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, one, _I32(0)), undefined, _SAME)


def _loop(b, count, starts, body):
    """Emit ``for i in range(count)`` (once at least) over values carried along; return them after the loop."""
    before, loop = b.block, b.function.append_basic_block("loop")
    after = b.function.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(_I64)
    i.add_incoming(_I64(0), before)
    carried = [b.phi(start.type) for start in starts]
    for phi, start in zip(carried, starts, strict=True):
        phi.add_incoming(start, before)
    ends = body(i, carried)
    following = b.add(i, _I64(1))
    i.add_incoming(following, b.block)
    for phi, end in zip(carried, ends, strict=True):
        phi.add_incoming(end, b.block)
    b.cbranch(b.icmp_signed("<", following, count), loop, after)
    b.position_at_end(after)
    return ends


@intrinsic
def _turn_16(typingctx, addresses, offset, out, ahead):
    """Read 16 words at ``offset`` from each of 16 addresses; write word j of all, 16 numbers, to line j of ``out``.

    A line is KEYS words long. The cache lines at ``offset`` from the addresses ``ahead`` are fetched meanwhile.
    """

    def generate(context, b, signature, args):
        addresses, offset, out, ahead = args
        x = []
        for j in range(16):
            x.append(_load(b, b.add(_load(b, b.add(addresses, _I64(8 * j)), _I64, 8), offset), _WORDS))
            _fetch(b, b.add(_load(b, b.add(ahead, _I64(8 * j)), _I64, 8), offset))

        def mix(one, other, lanes):
            return b.shuffle_vector(one, other, ir.Constant(_WORDS, [_I32(lane) for lane in lanes]))

        def unpack(one, other, width, start):
            """Of each 128 bits, take ``width`` words from ``start`` on of both in turn: one instruction."""
            lanes = [
                lane + start + (i // width) // 2 * width + i % width + 16 * (i // width % 2)
                for lane in range(0, 16, 4)
                for i in range(4)
            ]
            return mix(one, other, lanes)

        def quarters(one, other, odd):
            """Take the even or the odd two of the four pieces of 128 bits, of both."""
            return mix(
                one,
                other,
                [16 * of + 4 * (2 * k + odd) + i for of in (0, 1) for k in (0, 1) for i in range(4)],
            )

        y = [unpack(x[j & ~1], x[j | 1], 1, 2 * (j & 1)) for j in range(16)]
        # y[4 k + c] then holds words c, c + 4, c + 8, c + 12 of rows 4 k .. 4 k + 3, one after the other.
        y = [
            unpack(y[j // 4 * 4 + (j & 2) // 2], y[j // 4 * 4 + (j & 2) // 2 + 2], 2, 2 * (j & 1))
            for j in range(16)
        ]
        for c in range(4):
            near = [quarters(y[c], y[4 + c], odd) for odd in (0, 1)]
            far = [quarters(y[8 + c], y[12 + c], odd) for odd in (0, 1)]
            for piece in range(4):
                x[4 * piece + c] = quarters(near[piece & 1], far[piece & 1], piece // 2)
        for j in range(16):
            _store(b, x[j], b.add(out, _I64(4 * KEYS * j)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _score_rows(rows):
    @intrinsic
    def score(typingctx, query, stride, keys, words, out, kind):
        """``out[r, 64 keys] = sum over words of query[r] * keys``."""
        paired = kind is types.uint16

        def generate(context, b, signature, args):
            query, stride, keys, words, out, _ = args
            starts = [b.add(query, b.mul(stride, _I64(r))) for r in range(rows)]
            if paired:
                add = _function(b, _FLOATS, [_FLOATS, _PAIRS, _PAIRS], "llvm.x86.avx512bf16.dpbf16ps.512")
            else:
                add = _function(b, _FLOATS, [_FLOATS, _FLOATS, _FLOATS], "llvm.fma.v16f32")

            def body(i, sums):
                line = b.add(keys, b.mul(i, _I64(4 * KEYS)))
                columns = [_load(b, b.add(line, _I64(64 * v)), _WORDS) for v in range(4)]
                columns = [b.bitcast(c, _PAIRS if paired else _FLOATS) for c in columns]
                new = []
                for r in range(rows):
                    word = _load(b, b.add(starts[r], b.mul(i, _I64(4))), _I32 if paired else _F32)
                    word = _spread(b, word)
                    word = b.bitcast(word, _PAIRS) if paired else word
                    for v in range(4):
                        s = sums[4 * r + v]
                        new.append(b.call(add, [s, word, columns[v]] if paired else [word, columns[v], s]))
                return new

            zero = ir.Constant(_FLOATS, [ir.Constant(_F32, 0.0)] * 16)
            for k, s in enumerate(_loop(b, words, [zero] * (4 * rows), body)):
                _store(b, s, b.add(out, _I64(64 * k)))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64, types.int64, kind), generate

    return score


def _add_rows(rows):
    @intrinsic
    def add(typingctx, weights, values, offset, count, sums, stride, ahead, kind):
        """``sums[r, 64 channels] += sum over keys of weights[r, key] * value`` at ``offset`` from ``values[key]``."""
        paired = kind is types.uint16

        def generate(context, b, signature, args):
            weights, values, offset, count, sums, stride, ahead, _ = args
            places = [
                b.add(sums, b.add(b.mul(stride, _I64(r)), _I64(64 * v)))
                for r in range(rows)
                for v in range(4)
            ]
            fma = _function(b, _FLOATS, [_FLOATS, _FLOATS, _FLOATS], "llvm.fma.v16f32")

            def body(i, carried):
                slot = b.mul(i, _I64(8))
                value = b.add(_load(b, b.add(values, slot), _I64, 8), offset)
                coming = b.add(_load(b, b.add(ahead, slot), _I64, 8), offset)
                channels = []
                for v in range(2 if paired else 4):
                    _fetch(b, b.add(coming, _I64(64 * v)))
                    loaded = _load(b, b.add(value, _I64(64 * v)), _WORDS)
                    if paired:
                        channels.append(b.shl(loaded, ir.Constant(_WORDS, [_I32(16)] * 16)))
                        channels.append(b.and_(loaded, ir.Constant(_WORDS, [_I32(-65536)] * 16)))
                    else:
                        channels.append(loaded)
                channels = [b.bitcast(c, _FLOATS) for c in channels]
                new = []
                for r in range(rows):
                    weight = _load(b, b.add(weights, b.add(b.mul(i, _I64(4)), _I64(4 * KEYS * r))), _F32)
                    weight = _spread(b, weight)
                    new += [b.call(fma, [weight, channels[v], carried[4 * r + v]]) for v in range(4)]
                return new

            ends = _loop(b, count, [_load(b, place, _FLOATS) for place in places], body)
            for s, place in zip(ends, places, strict=True):
                _store(b, s, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, kind), generate

    return add


_score_6, _score_3, _score_1 = _score_rows(6), _score_rows(3), _score_rows(1)
_add_6, _add_3, _add_1 = _add_rows(6), _add_rows(3), _add_rows(1)


@intrinsic
def _scratch(typingctx, count, like):
    """Pointer to ``count`` numbers of ``like``'s type on this function's stack, at a multiple of 64 bytes."""

    def generate(context, builder, signature, args):
        memory = builder.alloca(context.get_value_type(signature.args[1]), size=args[0])
        memory.align = 64
        return memory

    return types.CPointer(like)(types.intp, like), generate


@intrinsic
def _address(typingctx, pointer):
    return types.int64(pointer), lambda c, b, s, args: b.ptrtoint(args[0], _I64)


@intrinsic
def _shift(typingctx, pointer, offset):
    return pointer(pointer, types.intp), lambda c, b, s, args: b.gep(args[0], [args[1]])


@intrinsic
def _first(typingctx, pointer):
    """A number of the type that ``pointer`` points to."""
    return pointer.dtype(pointer), lambda c, b, s, args: b.load(args[0])


@intrinsic
def _to_float(typingctx, bits):
    return types.float32(types.int32), lambda c, b, s, args: b.bitcast(args[0], _F32)


@intrinsic
def _to_bits(typingctx, x):
    return types.uint32(types.float32), lambda c, b, s, args: b.bitcast(args[0], _I32)


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


def _attend_tile(
    query, keys, values, out, blocks, num_kv_heads, group, size, value_size, block_size, head, token, count, position,
    scale64, window, soft_cap64
):  # fmt: skip
    """Attend for query tokens ``token .. token + count``, at ``position ..`` of one sequence, in one group of heads."""
    kind = _first(query)
    scale, soft_cap = np.float32(scale64), np.float32(soft_cap64)
    rows = count * group
    item = 2 if _paired(kind) else 4
    words = size * item // 4
    q = _scratch(rows * size, kind)
    turned = _scratch(words * KEYS, _ZERO)
    p, acc = _scratch(rows * KEYS, _ZERO), _scratch(rows * value_size, _ZERO)
    top, total = _scratch(rows, _ZERO), _scratch(rows, _ZERO)
    key_at, value_at, place = _scratch(KEYS, 0), _scratch(KEYS, 0), _scratch(KEYS, 0)
    key_next, value_next = _scratch(KEYS, 0), _scratch(KEYS, 0)
    for r in range(rows):
        top[r], total[r] = _MINUS_INFINITY, _ZERO
        source = _shift(query, (((token + r // group) * num_kv_heads + head) * group + r % group) * size)
        for d in range(size):
            q[r * size + d] = _scaled(source[d], scale)
    for d in range(rows * value_size):
        acc[d] = _ZERO

    end = position + count
    first = max(0, position - window + 1) if window > 0 else 0
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
        elif head + 1 < num_kv_heads:  # most likely the next task: the same tokens for the next head
            _places(blocks, first, end, block_size, num_kv_heads, head + 1, place)
        for t in range(KEYS):
            key_next[t] = _address(keys) + place[t] * size * item
            value_next[t] = _address(values) + place[t] * value_size * item
        for t in range(0, n, 16):
            for w in range(0, words, 16):
                _turn_16(
                    _address(key_at) + t * 8,
                    w * 4,
                    _address(turned) + (w * KEYS + t) * 4,
                    _address(key_next) + t * 8,
                )
        r = 0
        while r < rows:
            x, target = _address(q) + r * words * 4, _address(p) + r * KEYS * 4
            if rows - r >= 6:
                _score_6(x, words * 4, _address(turned), words, target, kind)
                r += 6
            elif rows - r >= 3:
                _score_3(x, words * 4, _address(turned), words, target, kind)
                r += 3
            else:
                _score_1(x, words * 4, _address(turned), words, target, kind)
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
                weights, target = _address(p) + r * KEYS * 4, _address(acc) + (r * value_size + channel) * 4
                at, pitch = channel * item, value_size * 4
                if rows - r >= 6:
                    _add_6(weights, _address(value_at), at, n, target, pitch, _address(value_next), kind)
                    r += 6
                elif rows - r >= 3:
                    _add_3(weights, _address(value_at), at, n, target, pitch, _address(value_next), kind)
                    r += 3
                else:
                    _add_1(weights, _address(value_at), at, n, target, pitch, _address(value_next), kind)
                    r += 1

    for r in range(rows):
        target = _shift(out, (((token + r // group) * num_kv_heads + head) * group + r % group) * value_size)
        share = _ONE / total[r]
        sums = _shift(acc, r * value_size)
        if _paired(kind):
            for d in range(0, value_size, 32):
                for i in range(16):
                    target[d + 2 * i] = _narrow(sums[d + i] * share, kind)
                    target[d + 2 * i + 1] = _narrow(sums[d + 16 + i] * share, kind)
        else:
            for d in range(value_size):
                target[d] = _narrow(sums[d] * share, kind)


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
    return (
        dtype == torch.bfloat16
        and has_wide(dtype)
        and size * dtype.itemsize % 64 == 0
        and value_size % KEYS == 0
    )


@functools.cache
def wide_tile(dtype: torch.dtype) -> Any:
    """Compile `_attend_tile` for queries, cache and output of ``dtype``; its machine code lies at ``.address``."""
    kind = types.uint16 if dtype == torch.bfloat16 else types.float32
    pointers = [types.CPointer(t) for t in (kind, kind, kind, kind, types.int32)]
    signature = types.void(*pointers, *[types.int64] * 9, types.float64, types.int64, types.float64)
    return cfunc(signature, cache=True, fastmath=_FAST, error_model="numpy")(_attend_tile)
