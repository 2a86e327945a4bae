"""The fast path's loops over memory, called with plain addresses: norm, rotation, activation, and the product.

At 16 tokens a step a layer's norm or rotation touches a few thousand numbers, and the time of the general way is
that of its eight to sixteen tensor operations. Addresses instead of arrays keep the call itself short.
Arithmetic is float32; bfloat16 goes in and out as its bits, rounded to nearest even. NaN stays NaN.

A *program* is an array of int64, one operation a row, that `run` carries out in order: each operation is cut into as
many parts as there are threads, and the next one starts when all parts are done::

    NORM      rows      x, scale, out, size, eps              a part is a share of the rows
    PRODUCT   columns   x, weights, out, words, n, bias, residual         ... a share of the panels of columns
    GATED     columns   x, weights, out, words, n             silu(first half) * second half
    ROTATE    rows      qkv, cos, sin, query, key, value, ...

So a layer of a model is two calls and one attention, whatever it is made of. How an operation is cut never changes a
number: every output element is summed by one thread, over the same inputs in the same order, in any company.

(All of numba's functions of the fast path are in this one file: its cache on disk watches one file per function.)
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="call-arg, var-annotated, unreachable, import-untyped"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from pagedlab.kernels.avx512 import PAIRS
from pagedlab.kernels.cpu import launch

_KINDS: dict[torch.dtype, Any] = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}
_LOOP: dict[str, Any] = {
    "nogil": True,
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
    "error_model": "numpy",
    "cache": True,
}


@intrinsic
def _at(typingctx, address, offset, kind):
    """Pointer to the number ``offset`` of those like ``kind`` at ``address``."""
    pointer = types.CPointer(kind)

    def generate(context, builder, signature, args):
        return builder.gep(builder.inttoptr(args[0], context.get_value_type(pointer)), [args[1]])

    return pointer(address, offset, kind), generate


@intrinsic
def _from_bits(typingctx, x):
    return types.float32(types.uint32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _to_bits(typingctx, x):
    return types.uint32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(32))


def _wide(x: Any) -> Any:
    """A stored number as float32."""
    raise NotImplementedError


@overload(_wide)
def _wide_by_type(x):
    if x is types.uint16:
        return lambda x: _from_bits(np.uint32(np.uint32(x) << np.uint32(16)))
    return lambda x: x


def _narrow(x: Any, kind: Any) -> Any:
    """A float32 as it is stored."""
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


@njit(**_LOOP)
def _rms_norm(x_address, scale_address, out_address, first, last, size, eps, kind):
    scale = _at(scale_address, 0, np.float32(0))
    for r in range(first, last):
        x, out = _at(x_address, r * size, kind), _at(out_address, r * size, kind)
        total = np.float32(0)
        for i in range(size):
            v = _wide(x[i])
            total += v * v
        factor = np.float32(1) / np.sqrt(total / np.float32(size) + eps)
        for i in range(size):
            out[i] = _narrow(_wide(x[i]) * factor * scale[i], kind)


def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * scale`` for contiguous ``x`` [..., size], ``scale`` float32 [size]."""
    out = torch.empty_like(x)
    size = scale.shape[0]
    _rms_norm(
        x.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        0,
        x.numel() // size,
        size,
        np.float32(eps),
        _KINDS[x.dtype],
    )
    return out


_LOG2E, _LN2_HI, _LN2_LO = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _HALF = np.float32(1), np.float32(0.5)


@njit(**_LOOP)
def _silu(x):
    """``x / (1 + exp(-x))``; the exponential is Cephes' expf, which LLVM can vectorise, as it cannot libm's."""
    y = -x
    y = np.float32(87) if y > np.float32(87) else y  # keeps NaN
    y = np.float32(-87) if y < np.float32(-87) else y
    n = np.floor(y * _LOG2E + _HALF)
    r = (y - n * _LN2_HI) - n * _LN2_LO
    p = ((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5
    e = (p * r * r + r + _ONE) * _from_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return x / (_ONE + e)


@njit(**_LOOP)
def _silu_mul(both_address, out_address, rows, size, kind):
    for r in range(rows):
        gate, up = _at(both_address, 2 * r * size, kind), _at(both_address, (2 * r + 1) * size, kind)
        out = _at(out_address, r * size, kind)
        for i in range(size):
            out[i] = _narrow(_silu(_wide(gate[i])) * _wide(up[i]), kind)


def silu_mul(both: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` [..., size] for contiguous ``both`` [..., gate and up of ``size`` each]."""
    size = both.shape[-1] // 2
    out = both.new_empty(*both.shape[:-1], size)
    _silu_mul(both.data_ptr(), out.data_ptr(), out.numel() // size, size, _KINDS[both.dtype])
    return out


@njit(**_LOOP)
def _turn(x, out, cos, sin, size, scale, eps, normed, kind):
    """Rotate one head of one token from ``x`` to ``out``, normed before if ``normed``."""
    half = size // 2
    if normed:
        total = np.float32(0)
        for i in range(size):
            v = _wide(x[i])
            total += v * v
        factor = np.float32(1) / np.sqrt(total / np.float32(size) + eps)
        for i in range(half):
            a, b = _wide(x[i]) * factor * scale[i], _wide(x[i + half]) * factor * scale[i + half]
            out[i] = _narrow(a * _wide(cos[i]) - b * _wide(sin[i]), kind)
            out[i + half] = _narrow(b * _wide(cos[i + half]) + a * _wide(sin[i + half]), kind)
    else:
        for i in range(half):
            a, b = _wide(x[i]), _wide(x[i + half])
            out[i] = _narrow(a * _wide(cos[i]) - b * _wide(sin[i]), kind)
            out[i + half] = _narrow(b * _wide(cos[i + half]) + a * _wide(sin[i + half]), kind)


@njit(**_LOOP)
def _rotate(
    qkv, cos, sin, query, key, value, slots, block_size, first, last, heads, kv_heads, size,
    q_scale, q_eps, q_normed, k_scale, k_eps, k_normed, kind,
):  # fmt: skip
    """Tokens ``first .. last``; keys and values go to their slots in the paged cache [block, head, token, channel].

    Without ``slots`` (0) they go one token after the other: a cache whose blocks are one token long.
    """
    q_weights, k_weights = _at(q_scale, 0, np.float32(0)), _at(k_scale, 0, np.float32(0))
    where = _at(slots, 0, np.int64(0))
    for t in range(first, last):
        c, s = _at(cos, t * size, kind), _at(sin, t * size, kind)
        row = t * (heads + 2 * kv_heads) * size
        for h in range(heads):
            out = _at(query, (t * heads + h) * size, kind)
            _turn(_at(qkv, row + h * size, kind), out, c, s, size, q_weights, q_eps, q_normed, kind)
        slot = where[t] if slots != 0 else t
        block, offset = slot // block_size, slot % block_size
        for h in range(kv_heads):
            at = ((block * kv_heads + h) * block_size + offset) * size
            x = _at(qkv, row + (heads + h) * size, kind)
            _turn(x, _at(key, at, kind), c, s, size, k_weights, k_eps, k_normed, kind)
            x, out = _at(qkv, row + (heads + kv_heads + h) * size, kind), _at(value, at, kind)
            for i in range(size):
                out[i] = x[i]


def rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
    q_norm: tuple[torch.Tensor, float] | None = None,
    k_norm: tuple[torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split ``qkv`` [num_tokens, (heads + 2 kv_heads) size] and turn queries and keys.

    ``cos`` and ``sin`` are [1, num_tokens, size], of the same dtype, contiguous as ``qkv`` is. A norm is
    (scale float32 [size], eps) per head, applied before the rotation. Returns contiguous query [num_tokens, heads,
    size], key and value [num_tokens, kv_heads, size].
    """
    tokens, size = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    query = qkv.new_empty(tokens, heads, size)
    key, value = qkv.new_empty(tokens, kv_heads, size), qkv.new_empty(tokens, kv_heads, size)
    _rotate(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        0,
        1,
        0,
        tokens,
        heads,
        kv_heads,
        size,
        0 if q_norm is None else q_norm[0].data_ptr(),
        np.float32(0 if q_norm is None else q_norm[1]),
        q_norm is not None,
        0 if k_norm is None else k_norm[0].data_ptr(),
        np.float32(0 if k_norm is None else k_norm[1]),
        k_norm is not None,
        _KINDS[qkv.dtype],
    )
    return query, key, value


# --- products with few rows -----------------------------------------------------------------------------------------
#
# Weights lie in panels of 48 columns; a panel is read once from start to end, and 24 vectors of sums stay in registers:
#
#     panel   step 0: 48 columns x 4 bytes | step 1: ... | ...      4 bytes ("a word") are one float32,
#                                                                   or two bfloat16 of the same column
#     x       row 0 .. row 7, word i spread over a vector
#     sums    8 rows x 3 vectors of 16 float32                      += word of the row * vector of the panel

PANEL = 48
"""Columns of a panel of weights: three vectors of 16 sums."""
_VECTOR = ir.VectorType(ir.FloatType(), 16)
_WORDS = ir.VectorType(ir.IntType(32), 16)
_AHEAD = 16384
"""Bytes of weights that are fetched ahead; 4096 give 97 GF/s on 16 rows, 16384 give 101."""
_CHUNK = 128
_ALONE = 32
"""Up to so many rows, a few microseconds of one thread are less than waiting for the other ones."""
NORM, PRODUCT, GATED, ROTATE = range(4)
FIELDS = 20


def _tile_of(rows: int) -> Any:
    """Return the inner loop for ``rows`` rows: ``out[r, c] = sum over words of x[r] * panel[c]``, out [rows, PANEL]."""

    @intrinsic
    def tile(typingctx, x, stride, panel, words, out, kind):
        paired = kind is types.uint16

        def generate(context, b, signature, args):
            x, stride, panel, words, out, _ = args
            i64, i32, f32 = ir.IntType(64), ir.IntType(32), ir.FloatType()
            whole = _WORDS if paired else _VECTOR
            if paired:
                kind = ir.FunctionType(_VECTOR, [_VECTOR, PAIRS, PAIRS])
                add = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
            else:
                kind = ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR, _VECTOR])
                add = cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v16f32")
            kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
            prefetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
            starts = [b.add(x, b.mul(stride, i64(r))) for r in range(rows)]
            before, loop = b.block, b.function.append_basic_block("word")
            after = b.function.append_basic_block("sums")
            b.branch(loop)
            b.position_at_end(loop)
            i = b.phi(i64)
            i.add_incoming(i64(0), before)
            sums = [[b.phi(_VECTOR) for _ in range(3)] for _ in range(rows)]
            for one in (s for row in sums for s in row):
                one.add_incoming(ir.Constant(_VECTOR, [ir.Constant(f32, 0.0)] * 16), before)
            at = b.add(panel, b.mul(i, i64(4 * PANEL)))
            columns = []
            for v in range(3):
                column = b.load(b.inttoptr(b.add(at, i64(64 * v)), whole.as_pointer()))
                column.align = 64
                columns.append(b.bitcast(column, PAIRS) if paired else column)
                ahead = b.inttoptr(b.add(at, i64(64 * v + _AHEAD)), cgutils.voidptr_t)
                b.call(prefetch, [ahead, i32(0), i32(2), i32(1)])
            added = []
            for start in starts:
                word = b.load(b.inttoptr(b.add(start, b.mul(i, i64(4))), whole.element.as_pointer()))
                word.align = 4
                spread = b.insert_element(ir.Constant(whole, ir.Undefined), word, i32(0))
                lanes = ir.Constant(_WORDS, [i32(0)] * 16)
                spread = b.shuffle_vector(spread, ir.Constant(whole, ir.Undefined), lanes)
                spread = b.bitcast(spread, PAIRS) if paired else spread
                row = sums[len(added)]
                if paired:
                    added.append([b.call(add, [s, spread, c]) for s, c in zip(row, columns, strict=True)])
                else:
                    added.append([b.call(add, [spread, c, s]) for s, c in zip(row, columns, strict=True)])
            following = b.add(i, i64(1))
            i.add_incoming(following, loop)
            for row, new in zip(sums, added, strict=True):
                for s, n in zip(row, new, strict=True):
                    s.add_incoming(n, loop)
            b.cbranch(b.icmp_signed("<", following, words), loop, after)
            b.position_at_end(after)
            for k, n in enumerate(n for row in added for n in row):
                b.store(n, b.inttoptr(b.add(out, i64(64 * k)), _VECTOR.as_pointer())).align = 64
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64, types.int64, kind), generate

    return tile


_tile_8, _tile_4, _tile_2, _tile_1 = _tile_of(8), _tile_of(4), _tile_of(2), _tile_of(1)


@intrinsic
def _sums(typingctx):
    """Address of a place for the sums of one tile, on this function's stack."""

    def generate(context, builder, signature, args):
        memory = cgutils.alloca_once(builder, ir.ArrayType(_VECTOR, 8 * 3))
        memory.align = 64
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.int64(), generate


@njit(**_LOOP)
def _tile(x, stride, panel, words, sums, rows, kind):
    """Sum one tile of at most ``rows`` rows and return how many it took."""
    if rows >= 8:
        _tile_8(x, stride, panel, words, sums, kind)
        return 8
    if rows >= 4:
        _tile_4(x, stride, panel, words, sums, kind)
        return 4
    if rows >= 2:
        _tile_2(x, stride, panel, words, sums, kind)
        return 2
    _tile_1(x, stride, panel, words, sums, kind)
    return 1


@njit(**_LOOP)
def _store_row(sums, bias, residual, out, width, has_bias, has_residual, kind):
    """Write ``width`` sums as numbers of ``kind``. The whole panel is written out for LLVM."""
    if width == PANEL and not has_bias:
        if has_residual:
            for c in range(PANEL):
                out[c] = _narrow(sums[c] + _wide(residual[c]), kind)
        else:
            for c in range(PANEL):
                out[c] = _narrow(sums[c], kind)
        return
    for c in range(width):
        v = sums[c]
        if has_bias:
            v += bias[c]
        if has_residual:
            v += _wide(residual[c])
        out[c] = _narrow(v, kind)


@njit(**_LOOP)
def _product(x, weights, out, words, n, bias, residual, rows, part, parts, kind):
    """``out = x @ weights + bias + residual`` for one part of the panels; ``bias`` and ``residual`` may be 0."""
    panels = (n + PANEL - 1) // PANEL
    sums = _sums()
    zero = np.float32(0)
    for top in range(0, rows, _CHUNK):  # so many rows of x stay in the L2 cache
        for p in range(panels * part // parts, panels * (part + 1) // parts):
            column = p * PANEL
            width = min(PANEL, n - column)
            r, beyond = top, min(rows, top + _CHUNK)
            while r < beyond:
                panel = weights + p * words * 4 * PANEL
                done = _tile(x + r * words * 4, words * 4, panel, words, sums, beyond - r, kind)
                for q in range(done):
                    at = (r + q) * n + column
                    _store_row(
                        _at(sums, q * PANEL, zero), _at(bias, column, zero), _at(residual, at, kind),
                        _at(out, at, kind), width, bias != 0, residual != 0, kind,
                    )  # fmt: skip
                r += done


@njit(**_LOOP)
def _gated(x, weights, out, words, n, rows, part, parts, kind):
    """``out = silu(x @ gate) * (x @ up)`` for one part; the panels of ``up`` follow all those of ``gate``."""
    panels = (n + PANEL - 1) // PANEL
    gates, ups = _sums(), _sums()
    zero = np.float32(0)
    for top in range(0, rows, _CHUNK):
        for p in range(panels * part // parts, panels * (part + 1) // parts):
            width = min(PANEL, n - p * PANEL)
            r, beyond = top, min(rows, top + _CHUNK)
            while r < beyond:
                here, panel = x + r * words * 4, weights + p * words * 4 * PANEL
                done = _tile(here, words * 4, panel, words, gates, beyond - r, kind)
                _tile(here, words * 4, panel + panels * words * 4 * PANEL, words, ups, beyond - r, kind)
                for q in range(done):
                    gate, up = _at(gates, q * PANEL, zero), _at(ups, q * PANEL, zero)
                    target = _at(out, (r + q) * n + p * PANEL, kind)
                    if width == PANEL:
                        for c in range(PANEL):
                            target[c] = _narrow(_silu(gate[c]) * up[c], kind)
                    else:
                        for c in range(width):
                            target[c] = _narrow(_silu(gate[c]) * up[c], kind)
                r += done


@njit(**_LOOP)
def _operation(program, i, rows, part, parts, kind):
    """Carry out one part of row ``i`` of a program."""
    o = program[i]
    first, last = rows * part // parts, rows * (part + 1) // parts
    if o[0] == NORM:
        _rms_norm(o[1], o[2], o[3], first, last, o[4], _from_bits(np.uint32(o[5])), kind)
    elif o[0] == PRODUCT:
        _product(o[1], o[2], o[3], o[4], o[5], o[6], o[7], rows, part, parts, kind)
    elif o[0] == GATED:
        _gated(o[1], o[2], o[3], o[4], o[5], rows, part, parts, kind)
    else:
        _rotate(
            o[1], o[2], o[3], o[4], o[5], o[6], o[7], o[8], first, last, o[9], o[10], o[11],
            o[12], _from_bits(np.uint32(o[13])), o[12] != 0, o[14], _from_bits(np.uint32(o[15])), o[14] != 0, kind,
        )  # fmt: skip


@njit(**_LOOP)
def _run_alone(program, rows, kind):
    for i in range(program.shape[0]):
        _operation(program, i, rows, 0, 1, kind)


@njit(parallel=True, nogil=True, error_model="numpy", cache=True)
def _run_together(program, rows, kind, parts):
    for i in range(program.shape[0]):
        if rows <= _ALONE and (program[i, 0] == NORM or program[i, 0] == ROTATE):
            _operation(program, i, rows, 0, 1, kind)
        else:
            for part in prange(parts):
                _operation(program, i, rows, part, parts, kind)


def float_bits(x: float) -> int:
    """Return a float32 as it goes into a program."""
    return int(np.float32(x).view(np.uint32))


def run(program: NDArray[np.int64], rows: int, dtype: torch.dtype) -> None:
    """Carry out ``program`` [operations, FIELDS] on ``rows`` rows with as many threads as torch uses."""
    if torch.get_num_threads() == 1:
        _run_alone(program, rows, _KINDS[dtype])
    else:
        launch(_run_together, program, rows, _KINDS[dtype])
