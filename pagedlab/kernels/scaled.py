"""A cache of one byte a channel with a scale for each block and KV head, as CPU and GPU kernels share it.

::

    one block, one head   | token 0: c0 c1 .. | token 1: c0 c1 .. | ... | scale, float32 | 12 bytes unused |

The scale lies behind the bytes that it belongs to, so blocks are copied, swapped and forgotten with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pagedlab.errors import ConfigError

TAIL = 16
"""Bytes behind each block and head: the scale, and as many as keep addresses multiples of 16."""
HEADROOM = 2.0
"""Scales by the head cover this many times the largest channel of the first tokens."""
LARGEST_INT8, LARGEST_E4M3 = 127.0, 448.0


def allocate_bytes(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, device: torch.device, kernel: str
) -> torch.Tensor:
    """Return an empty uint8 [num_blocks, num_kv_heads, block_size * head_size + TAIL] for the kernel of that name."""
    if head_size % 16:
        raise ConfigError(
            f"kernel {kernel!r} keeps one byte a channel for heads of a multiple of 16 channels, not {head_size}"
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
