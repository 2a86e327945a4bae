"""Small matrix products in AVX-512 registers, written as LLVM instructions: what `wide` is made of.

A word is one float32, two bfloat16 or, in a cache of one byte a channel, four bytes. ``turn_16`` turns 16 x 16 words in
registers; the products take addresses, spread one word of a row over a vector, and add up 64 keys or 64 channels for 6,
3, 2 or 1 rows at a time.

Numbers of int8 and e4m3 are numbers of bfloat16 too, and but for the sign there are 128 of each: the two bytes of 64 of
them are looked up at once in tables that stay in registers.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="call-arg, import-untyped"
from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic

KEYS = 64
"""Keys of a tile, and channels of a value summed at a time: four vectors of 16."""
FINGERPRINT = int(hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:15], 16)
"""Of this file: numba's cache on disk watches the file of a function, and not what it is made of."""

intrinsic: Any = _numba_intrinsic
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16)
_BYTES = ir.VectorType(ir.IntType(8), 64)
_SAME = ir.Constant(_WORDS, [_I32(0)] * 16)
BYTES = {torch.int8: types.int8, torch.float8_e4m3fn: types.uint8}
"""Formats of one byte a channel, and how the loops tell them apart."""


@functools.cache
def has_wide(dtype: torch.dtype, stored: torch.dtype | None = None) -> bool:
    """Whether this CPU, and numba as it is set, have what the loops need for queries of ``dtype``."""
    if dtype not in (torch.float32, torch.bfloat16) or stored not in (None, dtype, *BYTES):
        return False
    if any(getattr(numba.config, name, None) for name in ("CPU_NAME", "CPU_FEATURES")):
        return False
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:
        return False
    # Before LLVM 17 the instruction for bfloat16 was called another way.
    pairs = features.get("avx512bf16", False) and llvm.llvm_version_info[0] >= 17
    tables = features.get("avx512bw", False) and features.get("avx512vbmi", False)
    return bool(
        features.get("avx512f", False)
        and (pairs or dtype == torch.float32)
        and (tables or stored not in BYTES)
    )


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS = ir.VectorType(_BFloat(), 32)
"""A register of 16 pairs of bfloat16, whose products AVX-512 adds in float32."""


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


@functools.cache
def _bytes_of_pairs(stored: Any) -> list[Any]:
    """Lower and upper bytes of the 128 numbers without a sign as bfloat16: two tables of two registers.

    For int8's -128, which is never written, there is none.
    """
    codes = torch.arange(128).to(torch.uint8)
    numbers = codes if stored is types.int8 else codes.view(torch.float8_e4m3fn)
    tables = numbers.to(torch.bfloat16).view(torch.uint8).view(2, 64, 2).permute(2, 0, 1)
    return [[ir.Constant(_BYTES, half.tolist()) for half in table] for table in tables]


def _pairs(b, words, stored):
    """Return words as pairs of bfloat16: of four bytes, the first two and the last two."""
    if stored is types.uint16:
        return [words]
    codes = places = b.bitcast(words, _BYTES)
    if stored is types.int8:
        magnitude = _function(b, _BYTES, [_BYTES, ir.IntType(1)], "llvm.abs.v64i8")
        places = b.call(magnitude, [codes, ir.IntType(1)(0)])
    look_up = _function(b, _BYTES, [_BYTES] * 3, "llvm.x86.avx512.vpermi2var.qi.512")
    lower, upper = (b.call(look_up, [first, places, then]) for first, then in _bytes_of_pairs(stored))
    upper = b.or_(upper, b.and_(codes, ir.Constant(_BYTES, [128] * 64)))

    def joined(start):
        lanes = [4 * i + start + k + 64 * half for i in range(16) for k in (0, 1) for half in (0, 1)]
        mask = ir.Constant(ir.VectorType(_I32, 64), lanes)
        return b.bitcast(b.shuffle_vector(lower, upper, mask), _WORDS)

    return [joined(0), joined(2)]


def _floats(b, words, stored):
    """Return the numbers of words, a vector for the first of each, one for the second, .."""
    if stored is types.float32:
        return [b.bitcast(words, _FLOATS)]
    sixteen, upper = (ir.Constant(_WORDS, [_I32(x)] * 16) for x in (16, -65536))
    parts = [
        part for pair in _pairs(b, words, stored) for part in (b.shl(pair, sixteen), b.and_(pair, upper))
    ]
    return [b.bitcast(part, _FLOATS) for part in parts]


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
def fetch(typingctx, address):
    """Ask for the cache line at ``address``."""

    def generate(context, b, signature, args):
        _fetch(b, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def turn_16(typingctx, addresses, offset, out, ahead, kind, stored):
    """Read 16 words at ``offset`` from each of 16 addresses; write word j of all, 16 numbers, to line j of ``out``.

    A line is KEYS words long; four bytes become two lines of pairs, or four of floats if that is the ``kind``. The
    cache lines at ``offset`` from the addresses ``ahead`` are fetched meanwhile.
    """

    def generate(context, b, signature, args):
        addresses, offset, out, ahead, _, _ = args
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
        widen = _pairs if kind is types.uint16 else _floats
        for j, line in enumerate(line for words in x for line in widen(b, words, stored)):
            _store(b, line, b.add(out, _I64(4 * KEYS * j)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, kind, stored), generate


@intrinsic
def largest_64(typingctx, row, start):
    """Largest of ``start`` and 64 floats at ``row``. NaN may be passed over: it comes back with the exponentials."""

    def generate(context, b, signature, args):
        def larger(one, other):
            return b.select(b.fcmp_ordered(">", one, other), one, other)

        at, start = args
        x = [_load(b, b.add(at, _I64(64 * v)), _FLOATS) for v in range(4)]
        both = larger(larger(x[0], x[1]), larger(x[2], x[3]))
        for distance in (8, 4, 2, 1):
            lanes = ir.Constant(_WORDS, [_I32((lane + distance) % 16) for lane in range(16)])
            both = larger(both, b.shuffle_vector(both, both, lanes))
        return larger(b.extract_element(both, _I32(0)), start)

    return types.float32(types.int64, types.float32), generate


def _score_rows(rows):
    @intrinsic
    def score(typingctx, query, stride, keys, words, out, kind):
        """``out[r, 64 keys] = sum over words of query[r] * keys``."""
        paired = kind is types.uint16

        def generate(context, b, signature, args):
            query, stride, keys, words, out, _ = args
            starts = [b.add(query, b.mul(stride, _I64(r))) for r in range(rows)]
            if paired:
                add = _function(b, _FLOATS, [_FLOATS, PAIRS, PAIRS], "llvm.x86.avx512bf16.dpbf16ps.512")
            else:
                add = _function(b, _FLOATS, [_FLOATS, _FLOATS, _FLOATS], "llvm.fma.v16f32")

            def body(i, sums):
                line = b.add(keys, b.mul(i, _I64(4 * KEYS)))
                columns = [_load(b, b.add(line, _I64(64 * v)), _WORDS) for v in range(4)]
                columns = [b.bitcast(c, PAIRS if paired else _FLOATS) for c in columns]
                new = []
                for r in range(rows):
                    word = _load(b, b.add(starts[r], b.mul(i, _I64(4))), _I32 if paired else _F32)
                    word = _spread(b, word)
                    word = b.bitcast(word, PAIRS) if paired else word
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
    def add(typingctx, weights, values, offset, count, sums, stride, ahead, stored):
        """``sums[r, 64 channels] += sum over keys of weights[r, key] * value`` at ``offset`` from ``values[key]``."""
        lines = stored.bitwidth // 8

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
                for v in range(lines):
                    _fetch(b, b.add(coming, _I64(64 * v)))
                    channels += _floats(b, _load(b, b.add(value, _I64(64 * v)), _WORDS), stored)
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

        return types.void(*[types.int64] * 7, stored), generate

    return add


score_6, score_3, score_2, score_1 = map(_score_rows, (6, 3, 2, 1))
add_6, add_3, add_2, add_1 = map(_add_rows, (6, 3, 2, 1))
