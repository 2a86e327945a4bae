"""The host's side of `quantised`: the form of fp8 on a device, which tokens go to which block, scales by the head."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pagedlab.errors import ConfigError
from pagedlab.kernels.triton import quantised

TAIL = 16
"""Bytes behind each block and head: the scale, and as many as keep addresses multiples of 16."""
FORMATS: dict[str, int] = {
    name: getattr(quantised, name).value for name in ("E4M3", "E4M3_BITS", "E4M3_FNUZ", "INT8")
}
LARGEST = {"E4M3": 448.0, "E4M3_BITS": 448.0, "E4M3_FNUZ": 240.0, "INT8": 127.0}
QUANTISED_CHUNK = 16
"""Tokens that a program of `store_quantised` takes at a time."""
HEADROOM = 2.0
"""Scales by the head cover this many times the largest channel of the first tokens."""


@functools.cache
def format_on(kv_dtype: str, device: torch.device) -> str:
    """Return the key of `FORMATS` that ``kv_dtype`` ("fp8" or "int8") has on ``device``."""
    if kv_dtype == "int8":
        return "INT8"
    if device.type == "cpu":
        return "E4M3_BITS"
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return "E4M3_FNUZ" if architecture.startswith("gfx94") else "E4M3_BITS"
    return "E4M3" if torch.cuda.get_device_capability(device) >= (8, 9) else "E4M3_BITS"


def allocate_bytes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, device: torch.device
) -> torch.Tensor:
    """Return an empty uint8 [num_blocks, num_kv_heads, block_size * head_size + TAIL]."""
    if head_size % 16:
        raise ConfigError(
            f"kernel 'triton-paged' keeps fp8 and int8 for heads of a multiple of 16 channels, not {head_size}"
        )
    return torch.empty(
        num_blocks, num_kv_heads, block_size * head_size + TAIL, dtype=torch.uint8, device=device
    )


def runs_of(slots: NDArray[np.int64], block_size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return tokens by ascending slot, and where in that order each block's begin: ``runs[i] : runs[i + 1]``."""
    order = np.argsort(slots, kind="stable")
    blocks = slots[order] // block_size
    starts = np.flatnonzero(np.diff(blocks, prepend=-1))
    return order, np.append(starts, len(slots))


def scales_of(cache: torch.Tensor) -> torch.Tensor:
    """Return the scales of every block and head, float32 [num_blocks, num_kv_heads], in the cache's own memory."""
    return cache.view(torch.float32)[:, :, -TAIL // 4]


def set_head_scales(cache: torch.Tensor, first: torch.Tensor, largest: float) -> None:
    """Give all blocks of a head one scale, after the ``first`` tokens [num_tokens, num_kv_heads, head_size]."""
    seen = first.abs().nan_to_num(posinf=0.0).amax((0, 2)).float()
    scales_of(cache).copy_((seen * HEADROOM / largest).clamp_min(1e-30))
