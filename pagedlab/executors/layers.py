"""A whole decoder layer in two programs of `loops` and one attention.

The layer of Llama and its many kin, normed before attention and before a gated MLP::

    hidden ─▶ norm ─▶ q k v ─▶ rotate ─▶ attend ─▶ product, + hidden ─▶ norm ─▶ silu(gate) * up ─▶ product, + ─▶
                                 └▶ keys and values, straight to their slots in the cache

What lies between these steps is written to buffers that all layers share, and stays in the CPU's caches.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pagedlab.executors import loops
from pagedlab.executors.probe import NOT_PAGED, AttentionLayer, NotPaged
from pagedlab.executors.products import Panels, row, to_panels

_X, _OUT, _RESIDUAL = 1, 3, 7  # fields of an operation


class Buffers:
    """Memory for what lives only within a layer, by name; grows to the largest step.

    ``grown`` counts how often; as long as it stands, every tensor lies where it lay.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}
        self.grown = 0

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Return [rows, width] of any content, the same memory as the last time if it was enough."""
        held = self._held.get(name)
        if held is None or held.numel() < rows * width or held.dtype != dtype:
            held = self._held[name] = torch.empty(rows * width, dtype=dtype)
            self.grown += 1
        return held[: rows * width].view(rows, width)


class FusedLayer:
    """The forward of a decoder layer: ``x += attention(norm(x)); x += down(silu(gate(norm(x))) * up(norm(x)))``.

    A norm is (scale float32, eps). ``both`` holds the weights of gate and up, in this order.
    """

    def __init__(
        self,
        attention: nn.Module,
        layer: AttentionLayer,
        norms: tuple[tuple[torch.Tensor, float], tuple[torch.Tensor, float]],
        head_norms: tuple[tuple[torch.Tensor, float] | None, tuple[torch.Tensor, float] | None],
        qkv: Panels,
        out: Panels,
        both: Panels,
        down: Panels,
        buffers: Buffers,
    ) -> None:
        self.attention, self.layer, self.buffers = attention, layer, buffers
        self.qkv, self.out, self.down = qkv, out, down
        self.hidden, self.inner = out.width, both.sizes[0]
        self.dtype = qkv.dtype
        item = self.dtype.itemsize
        ins = [4 * p.words // item for p in (qkv, both, out, down)]
        seen = layer.num_heads * layer.value_size
        # Programs go by addresses: whatever does not match would read someone else's memory.
        if ins != [self.hidden, self.hidden, seen, self.inner] or down.width != self.hidden:
            raise ValueError("the products of this layer do not follow on one another")
        if any(scale.numel() != self.hidden for scale, _ in norms) or both.sizes != [self.inner] * 2:
            raise ValueError("norms or gates of another size")
        if layer.key_size != layer.value_size or any(p.dtype != self.dtype for p in (out, both, down)):
            raise ValueError("keys and values, or dtypes, differ")
        # Gate and up each in panels of their own, those of up after those of gate.
        self.gates = (
            both.weight if self.inner % loops.PANEL == 0 else torch.cat([to_panels(w) for w in both.parts()])
        )
        self._rows, self._grown = 0, -1
        self._query = torch.empty(0)
        self._kept = norms, head_norms  # whose addresses are in the programs
        (before, eps), (between, eps_between) = norms
        heads: list[int] = []
        for norm in head_norms:
            heads += [0, 0] if norm is None else [norm[0].data_ptr(), loops.float_bits(norm[1])]
        size, kv_heads = layer.key_size, layer.num_kv_heads
        self._into = np.stack(
            [
                row(loops.NORM, 0, before.data_ptr(), 0, self.hidden, loops.float_bits(eps)),
                qkv.operation(0, 0),
                row(loops.ROTATE, *[0] * 7, 1, layer.num_heads, kv_heads, size, *heads),
            ]
        )
        self._onward = np.stack(
            [
                out.operation(0, 0),
                row(loops.NORM, 0, between.data_ptr(), 0, self.hidden, loops.float_bits(eps_between)),
                row(loops.GATED, 0, self.gates.data_ptr(), 0, both.words, self.inner),
                down.operation(0, 0),
            ]
        )

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: Any = None,
        **others: Any,
    ) -> torch.Tensor:
        """Return the layer's output; `ValueError` if its input is not what the layer was made for."""
        if paged is None:
            raise NotPaged(NOT_PAGED)
        layer, dtype = self.layer, self.dtype
        cos, sin = (x.contiguous() for x in position_embeddings)
        x = hidden_states.contiguous()
        rows = x.numel() // self.hidden
        if x.shape[-1] != self.hidden or not x.dtype == cos.dtype == sin.dtype == dtype:
            raise ValueError(f"not the rows that this layer was made for: {tuple(x.shape)} of {x.dtype}")
        if cos.numel() != rows * layer.key_size or sin.numel() != cos.numel():
            raise ValueError("each row needs one angle per channel")
        if rows > self._rows or self.buffers.grown != self._grown:
            self._bind(max(rows, self._rows))
        query = self._query[:rows]

        place = paged.place(self.attention, dtype)
        key = value = None
        if place is None:
            key, value = (query.new_empty(rows, layer.num_kv_heads, layer.key_size) for _ in range(2))
            place = key.data_ptr(), value.data_ptr(), 0, 1
        norm, product, rotate = self._into
        norm[_X] = x.data_ptr()
        rotate[2:9] = cos.data_ptr(), sin.data_ptr(), query.data_ptr(), *place
        loops.run(self._into, rows, dtype)

        seen = paged.attend(
            self.attention, query, key, value, layer.scale, layer.sliding_window, layer.soft_cap
        ).contiguous()

        after = torch.empty_like(x)
        product, _, _, down = self._onward
        product[_X], product[_RESIDUAL], down[_OUT] = seen.data_ptr(), x.data_ptr(), after.data_ptr()
        loops.run(self._onward, rows, dtype)
        return after

    def _bind(self, rows: int) -> None:
        """Write the addresses of the buffers into the programs; up to ``rows`` rows need no more."""
        layer, dtype, take = self.layer, self.dtype, self.buffers.take
        self._query = take("query", rows, layer.num_heads * layer.key_size, dtype)
        self._query = self._query.view(rows, layer.num_heads, layer.key_size)
        normed = take("normed", rows, self.hidden, dtype).data_ptr()
        qkv = take("qkv", rows, self.qkv.width, dtype).data_ptr()
        between = take("between", rows, self.hidden, dtype).data_ptr()
        inner = take("inner", rows, self.inner, dtype).data_ptr()
        norm, product, rotate = self._into
        norm[_OUT], product[_X], product[_OUT], rotate[_X] = normed, normed, qkv, qkv
        product, norm, gated, down = self._onward
        product[_OUT] = norm[_X] = down[_RESIDUAL] = between
        norm[_OUT] = gated[_X] = normed
        gated[_OUT] = down[_X] = inner
        self._rows, self._grown = rows, self.buffers.grown
