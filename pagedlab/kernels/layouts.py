"""The device functions of the built-in layouts: ``block_of(entries, index, row, i) -> physical block``.

A layout policy only names its functions (``"module:attribute"``); they live here because they need numba or torch.
Each has forms with one meaning. The numba form takes integers and is compiled into a kernel's loop; the torch
form takes a tensor of rows and a tensor of logical indices (broadcast against each other) and returns the tensor of
physical blocks. The Triton form is named, not imported, so that nothing here needs triton. Adding a layout means adding
one pair, and a function to `pagedlab.kernels.triton.tables` if it is to run there.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from numba import njit

from pagedlab.errors import ConfigError
from pagedlab.policies.layout import Layout


class BlockOf(NamedTuple):
    """The forms of one layout's device function.

    ``numba`` is a function compiled with ``njit`` (or one that can be): ``(int32[:], int32[:], int, int) -> int``.
    ``torch`` maps ``(entries, index, rows, i)``, int32 [*] tensors and two int64 tensors, to an int64 tensor.
    ``triton`` is ``"module:attribute"`` of a function compiled with ``triton.jit``, see
    `pagedlab.kernels.triton.tables`; empty if the layout has none.
    """

    numba: Callable[..., Any]
    torch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    triton: str = ""


def device_functions(layout: Layout) -> BlockOf:
    """Load what ``layout.device_functions`` names, or raise `ConfigError` saying what is missing."""
    module, _, attribute = layout.device_functions.partition(":")
    try:
        return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"layout {layout.name or type(layout).__name__!r} names device functions "
            f"{layout.device_functions!r}, which cannot be loaded: {error}"
        ) from error


def triton_block_of(layout: Layout) -> Any:
    """Load the Triton form of ``layout``'s device function, or raise `ConfigError` if it has none."""
    module, _, attribute = device_functions(layout).triton.partition(":")
    title = layout.name or type(layout).__name__
    if not module:
        raise ConfigError(
            f"layout {title!r} has no Triton form of its device functions {layout.device_functions!r}; "
            "kernel 'triton-paged' needs one"
        )
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"layout {title!r} names the Triton function {module}:{attribute}, which cannot be loaded: {error}"
        ) from error


@njit(inline="always")
def _padded_numba(entries, index, row, i):  # type: ignore[no-untyped-def]
    return entries[row * index[0] + i]


def _padded_torch(
    entries: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, i: torch.Tensor
) -> torch.Tensor:
    return entries[rows * index[0].long() + i].long()


@njit(inline="always")
def _csr_numba(entries, index, row, i):  # type: ignore[no-untyped-def]
    return entries[index[row] + i]


def _csr_torch(
    entries: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, i: torch.Tensor
) -> torch.Tensor:
    return entries[index[rows].long() + i].long()


@njit(inline="always")
def _two_level_numba(entries, index, row, i):  # type: ignore[no-untyped-def]
    page = index[0]
    return entries[index[2 + row * index[1] + i // page] * page + i % page]


def _two_level_torch(
    entries: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, i: torch.Tensor
) -> torch.Tensor:
    page, width = index[0].long(), index[1].long()
    return entries[index[2 + rows * width + i // page].long() * page + i % page].long()


@njit
def _extents_numba(entries, index, row, i):  # type: ignore[no-untyped-def]
    begin, low, high = index[2 * row], 0, index[2 * row + 1] - 1
    while low < high:
        middle = (low + high + 1) // 2
        if entries[begin + 2 * middle] <= i:
            low = middle
        else:
            high = middle - 1
    return entries[begin + 2 * low + 1] + i - entries[begin + 2 * low]


def _extents_torch(
    entries: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, i: torch.Tensor
) -> torch.Tensor:
    begin, high = index[2 * rows].long(), index[2 * rows + 1].long() - 1 + torch.zeros_like(i)
    if not high.numel():
        return high
    low = torch.zeros_like(high)
    for _ in range(int(high.max()).bit_length()):
        middle = (low + high + 1) // 2
        right = entries[begin + 2 * middle] <= i
        low, high = torch.where(right, middle, low), torch.where(right, high, middle - 1)
    return entries[begin + 2 * low + 1].long() + i - entries[begin + 2 * low]


padded = BlockOf(_padded_numba, _padded_torch, "pagedlab.kernels.triton.tables:padded")
csr = BlockOf(_csr_numba, _csr_torch, "pagedlab.kernels.triton.tables:csr")
two_level = BlockOf(_two_level_numba, _two_level_torch, "pagedlab.kernels.triton.tables:two_level")
extents = BlockOf(_extents_numba, _extents_torch, "pagedlab.kernels.triton.tables:extents")
