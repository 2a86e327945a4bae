"""Products with weights laid out beforehand: our own loop where the CPU has the instructions, oneDNN's elsewhere.

Decoding multiplies a handful of rows by every weight of the model. oneDNN reaches three quarters of what two Zen 4
cores can do on 16 rows, the loop in `loops.py` nine tenths; with hundreds of rows both are alike. It needs AVX-512,
and for bfloat16 its dot product of pairs. Whether it is right is tried once on a small product.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from pagedlab.executors import loops
from pagedlab.kernels.avx512 import has_wide

_LINE = 64


def weight_of(member: nn.Module) -> torch.Tensor:
    """Weight of a linear layer, [out, in]."""
    weight = member.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().t() if isinstance(member, Conv1D) else weight.detach()


def _bias_of(members: Sequence[nn.Module]) -> torch.Tensor | None:
    if all(m.bias is None for m in members):
        return None
    return torch.cat(
        [
            torch.zeros_like(weight_of(m)[:, 0]) if m.bias is None else m.bias.detach()  # type: ignore[operator]
            for m in members
        ]
    )


class OneDNN:
    """One product for linear layers that share their input: ``x`` [..., in] -> [..., sum of outs], by oneDNN."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        weights = [weight_of(member) for member in members]
        self.sizes = [w.shape[0] for w in weights]
        self.bias = _bias_of(members)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights).contiguous(), None)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product."""
        return self._product(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


class Panels:
    """The same product by `loops`: the weights in panels of columns, for rows of whole 4-byte words."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        weights = [weight_of(member) for member in members]
        self.sizes = [w.shape[0] for w in weights]
        self.width, self.dtype = sum(self.sizes), weights[0].dtype
        self.words = weights[0].shape[1] * self.dtype.itemsize // 4
        self.members = list(members)
        bias = _bias_of(members)
        self.bias = None if bias is None else bias.float()
        self.weight = to_panels(torch.cat(weights))
        self._program = np.zeros((1, loops.FIELDS), np.int64)
        self._program[0] = self.operation(0, 0)

    def parts(self) -> list[torch.Tensor]:
        """Return the members' weights, [out, in] each."""
        return [weight_of(member) for member in self.members]

    def operation(self, x: int, out: int, residual: int = 0) -> NDArray[np.int64]:
        """Return the row of a program for ``out = x @ weights + bias + residual``, by addresses."""
        return row(
            loops.PRODUCT,
            x,
            self.weight.data_ptr(),
            out,
            self.words,
            self.width,
            0 if self.bias is None else self.bias.data_ptr(),
            residual,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product; `ValueError` if ``x`` does not fit."""
        rows = x.numel() * x.element_size() // (4 * self.words)
        if x.dtype != self.dtype or x.shape[-1] * x.element_size() != 4 * self.words:
            raise ValueError(f"these weights are for another row than {x.shape[-1]} of {x.dtype}")
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.width)
        if rows:
            self._program[0, 1], self._program[0, 3] = x.data_ptr(), out.data_ptr()
            loops.run(self._program, rows, self.dtype)
        return out


def row(*fields: int) -> NDArray[np.int64]:
    """Return one operation of a program."""
    operation = np.zeros(loops.FIELDS, np.int64)
    operation[: len(fields)] = fields
    return operation


def to_panels(weight: torch.Tensor) -> torch.Tensor:
    """Lay ``weight`` [out, in] out as `loops` reads it: [panel, word, column, numbers of a word], zeros at the end."""
    outs, ins = weight.shape
    per_word = 4 // weight.element_size()
    panels = -(-outs // loops.PANEL)
    # Tensors begin at multiples of 64 bytes already; this does not depend on it.
    memory = torch.zeros(panels * loops.PANEL * ins + _LINE, dtype=weight.dtype)
    start = -memory.data_ptr() % _LINE // weight.element_size()
    laid = memory[start : start + panels * loops.PANEL * ins].view(
        panels, ins // per_word, loops.PANEL, per_word
    )
    whole = outs // loops.PANEL
    full = weight[: whole * loops.PANEL].view(whole, loops.PANEL, ins // per_word, per_word)
    laid[:whole] = full.transpose(1, 2)
    if outs % loops.PANEL:
        rest = weight[whole * loops.PANEL :].reshape(-1, ins // per_word, per_word)
        laid[whole, :, : rest.shape[0]] = rest.transpose(0, 1)
    return laid


@functools.cache
def panels_work(dtype: torch.dtype) -> bool:
    """Whether this CPU and this numba can run `loops`'s product of ``dtype``, and do it right."""
    if not has_wide(dtype):
        return False
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(15, 12, generator=generator).to(dtype)
        layer = nn.Linear(12, 50, dtype=dtype)
        with torch.inference_mode():
            ours, plain = Panels([layer])(x), layer(x)
        return torch.allclose(ours.float(), plain.float(), atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    except Exception:
        return False


def product(members: Sequence[nn.Module]) -> OneDNN | Panels:
    """Return one product for ``members``, which share their input."""
    weight: Any = weight_of(members[0])
    if panels_work(weight.dtype) and weight.shape[1] * weight.element_size() % 4 == 0:
        return Panels(members)
    return OneDNN(members)
