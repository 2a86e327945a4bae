"""A batch on the device: what the kernels read besides the tensors, sent once for all layers of a step."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pagedlab.kernels.base import AttentionBatch
from pagedlab.kernels.scaled import runs_of
from pagedlab.kernels.triton.shapes import Launch


@dataclass(slots=True)
class Plan:
    """Arrays of one batch on ``device``, and which of its sequences go through which kernel."""

    batch: AttentionBatch
    device: torch.device
    entries: torch.Tensor
    index: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    decodes: torch.Tensor
    """Sequences for `decode`."""
    chunks: list[int]
    """Sequences for `prefill`, which is cut into tiles when the group is known."""
    order: torch.Tensor
    runs: torch.Tensor
    """Of a quantised cache: tokens by ascending slot, and where each block's begin among them."""
    launches: dict[Hashable, Launch] = field(default_factory=dict)
    """How its layers are cut, by what is alike in them."""
    _tiles: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: AttentionBatch, device: torch.device, *, invariant: bool, quantised: bool) -> Plan:
        """Send ``batch``; if ``invariant``, a decoding sequence goes through `decode` whoever is beside it."""
        counts = np.diff(batch.query_start)
        alone = invariant or batch.max_query_len <= 1
        decodes = np.flatnonzero(counts == 1) if alone else np.empty(0, np.int64)
        chunks = np.flatnonzero(counts > (1 if alone else 0))
        nothing = np.empty(0, np.int64)
        order, runs = runs_of(batch.slots, batch.block_size) if quantised else (nothing, nothing)
        index, query_start, context_lens, rows, sequences, by_slot, begins = _arrays_on(
            device, batch.index, batch.query_start, batch.context_lens, batch.rows, decodes, order, runs
        )
        return cls(
            batch=batch,
            device=device,
            entries=torch.from_numpy(batch.entries).to(device),
            index=index,
            query_start=query_start,
            context_lens=context_lens,
            rows=rows,
            slots=torch.from_numpy(batch.slots).to(device),
            decodes=sequences,
            chunks=chunks.tolist(),
            order=by_slot,
            runs=begins,
        )

    def tiles(self, step: int) -> torch.Tensor:
        """Return the tiles of ``step`` query tokens: int32 [num_tiles, 2], sequence and first token."""
        tiles = self._tiles.get(step)
        if tiles is None:
            counts = np.diff(self.batch.query_start)
            pairs = [(s, at) for s in self.chunks for at in range(0, int(counts[s]), step)]
            tiles = self._tiles[step] = torch.tensor(pairs, dtype=torch.int32, device=self.device)
        return tiles


def _arrays_on(device: torch.device, *arrays: NDArray[Any]) -> list[torch.Tensor]:
    """Send int32 arrays in one transfer; each begins at 16 bytes, so that kernels are compiled for one alignment."""
    padded = [np.pad(a.astype(np.int32, copy=False), (0, -len(a) % 4)) for a in arrays]
    joined = torch.from_numpy(np.concatenate(padded)).to(device)
    starts = np.cumsum([0] + [len(a) for a in padded]).tolist()
    return [joined[start : start + len(array)] for start, array in zip(starts, arrays)]
