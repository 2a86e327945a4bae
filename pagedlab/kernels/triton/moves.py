"""Whole blocks of many tensors moved at once: copies on the device, and swaps through contiguous staging memory.

::

    device cache, layer by layer          staging              host tier
    block 7 of K0, V0, K1, V1, ... ──▶ | K0 V0 K1 V1 ... | ──▶ one transfer ──▶ block 2 of K0, V0, ...
            gather: one launch                                       index_copy_

Moved one by one, small blocks reach a fraction of what the link can carry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from pagedlab.kernels.triton.blocks import move_words
from pagedlab.kernels.triton.shapes import FUSED

CHUNK = 1024
"""Words that a program moves."""
WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


def on(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which Triton launches on ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def move_blocks(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    from_blocks: Sequence[int],
    to_blocks: Sequence[int],
) -> None:
    """Copy block ``from_blocks[i]`` of ``sources[t]`` to ``to_blocks[i]`` of ``targets[t]``, for all i and t.

    Tensors are contiguous with the block as axis 0; ``targets[t]`` has the blocks of ``sources[t]``. No pair may read
    what another one writes. On one device tensors of one size move in one launch; between host and device they go
    through staging, in one transfer.
    """
    if not from_blocks:
        return
    groups: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        group = groups.setdefault(_block_bytes(source), ([], []))
        group[0].append(source)
        group[1].append(target)
    for ones, others in groups.values():
        here, there = ones[0].device, others[0].device
        if here == there:
            _launch(ones, others, from_blocks, to_blocks)
            continue
        staged = gather_blocks(ones, from_blocks)
        scatter_blocks(_transfer(staged, there), others, to_blocks)


def gather_blocks(tensors: Sequence[torch.Tensor], blocks: Sequence[int]) -> torch.Tensor:
    """Return ``blocks`` of every tensor as contiguous bytes, uint8 [num_tensors, num_blocks, bytes of a block]."""
    device = tensors[0].device
    pinned = device.type == "cpu" and torch.cuda.is_available()
    shape = (len(tensors), len(blocks), _block_bytes(tensors[0]))
    staging = torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=pinned)
    if pinned:
        chosen = torch.tensor(blocks)
        for row, tensor in zip(staging, tensors):
            torch.index_select(_as_bytes(tensor), 0, chosen, out=row)
    else:
        _launch(tensors, list(staging), blocks, range(len(blocks)))
    return staging


def scatter_blocks(staging: torch.Tensor, tensors: Sequence[torch.Tensor], blocks: Sequence[int]) -> None:
    """Put what `gather_blocks` returned into ``blocks`` of every tensor."""
    if staging.device.type == "cpu" and torch.cuda.is_available():
        chosen = torch.tensor(blocks)
        for row, tensor in zip(staging, tensors):
            _as_bytes(tensor).index_copy_(0, chosen, row)
    else:
        _launch(list(staging), tensors, range(len(blocks)), blocks)


def _transfer(staging: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.empty(staging.shape, dtype=staging.dtype, pin_memory=True).copy_(staging)
    return staging.to(device)


def _launch(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    from_blocks: Sequence[int],
    to_blocks: Sequence[int],
) -> None:
    device, nbytes = sources[0].device, _block_bytes(sources[0])
    addresses = [[x.data_ptr() for x in side] for side in (sources, targets)]
    width = math.gcd(8, nbytes, *addresses[0], *addresses[1])
    words = nbytes // width
    table = torch.tensor(addresses, dtype=torch.int64, device=device)
    pairs = torch.tensor([list(from_blocks), list(to_blocks)], dtype=torch.int64, device=device)
    with on(device):
        move_words[len(from_blocks), len(sources), triton.cdiv(words, CHUNK)](
            table[0], table[1], pairs[0], pairs[1], WORDS=words, CHUNK=CHUNK, WORD=WORDS[width], **FUSED
        )


def _block_bytes(cache: torch.Tensor) -> int:
    return cache[0].numel() * cache.itemsize if len(cache) else 0


def _as_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8).view(len(cache), -1)
