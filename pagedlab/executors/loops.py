"""Small loops over memory for the fast path: one pass each, called with plain addresses.

At 16 tokens a step a layer's norm or rotation touches a few thousand numbers, and the time of the general way is
that of its eight to sixteen tensor operations. Addresses instead of arrays keep the call itself short.
Arithmetic is float32; bfloat16 goes in and out as its bits, rounded to nearest even. NaN stays NaN.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# mypy: disable-error-code="call-arg, var-annotated, unreachable, import-untyped"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

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
def _rms_norm(x_address, scale_address, out_address, rows, size, eps, kind):
    scale = _at(scale_address, 0, np.float32(0))
    for r in range(rows):
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
    qkv, cos, sin, query, key, value, tokens, heads, kv_heads, size, q_scale, q_eps, q_normed, k_scale, k_eps, k_normed,
    kind,
):  # fmt: skip
    q_weights, k_weights = _at(q_scale, 0, np.float32(0)), _at(k_scale, 0, np.float32(0))
    for t in range(tokens):
        c, s = _at(cos, t * size, kind), _at(sin, t * size, kind)
        row = t * (heads + 2 * kv_heads) * size
        for h in range(heads):
            out = _at(query, (t * heads + h) * size, kind)
            _turn(_at(qkv, row + h * size, kind), out, c, s, size, q_weights, q_eps, q_normed, kind)
        row += heads * size
        for h in range(kv_heads):
            out = _at(key, (t * kv_heads + h) * size, kind)
            _turn(_at(qkv, row + h * size, kind), out, c, s, size, k_weights, k_eps, k_normed, kind)
        row += kv_heads * size
        x, out = _at(qkv, row, kind), _at(value, t * kv_heads * size, kind)
        for i in range(kv_heads * size):
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
