"""The yardstick: attention as textbooks write it, over contexts gathered from their blocks."""

from __future__ import annotations

from typing import Any

import torch

from pagedlab.kernels.base import AttentionBatch
from pagedlab.kernels.layouts import device_functions
from pagedlab.policies.layout import Layout


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(QKᵀ · scale)V for one sequence, with every score written out.

    ``query`` [q, num_heads, head_size] holds the last q tokens of a context with ``keys`` [t, num_kv_heads, head_size]
    and ``values`` [t, num_kv_heads, value_head_size]. Query j sees keys up to position ``t - q + j``, and with a window
    w only the last w of them. ``alibi_slopes`` and ``sinks`` [num_heads] are those of
    `pagedlab.kernels.base.PagedAttention.attend`. Computed in float64 for float64 inputs and in
    float32 otherwise; the result [q, num_heads, value_head_size] has the query's dtype.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, t, group = query.shape[0], keys.shape[0], query.shape[1] // keys.shape[1]
    k = keys.to(dtype).repeat_interleave(group, dim=1)
    v = values.to(dtype).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,thd->hqt", query.to(dtype), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if alibi_slopes is not None:
        distance = torch.arange(t - q, t, device=query.device)[:, None] - torch.arange(t, device=query.device)
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance
    scores = scores.masked_fill(~visible(q, t, sliding_window, query.device), float("-inf"))
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sink = sinks.to(dtype)[:, None, None].expand(-1, q, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[:, :, :t]
    return torch.einsum("hqt,thd->qhd", weights, v).to(query.dtype)


def visible(q: int, t: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """Return bool [q, t]: which of ``t`` keys each of the last ``q`` tokens sees."""
    distance = torch.arange(t - q, t, device=device)[:, None] - torch.arange(t, device=device)
    return (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)


class DenseReference:
    """Gathers each sequence's context and calls `dense_attention`: slow, plain, and right."""

    axis_order: tuple[str, ...] = ("block", "token", "head", "channel")

    def __init__(self, layout: Layout, **params: Any) -> None:
        self._block_of = device_functions(layout).torch

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Return an empty [num_blocks, block_size, num_kv_heads, head_size]."""
        return torch.empty(num_blocks, block_size, num_kv_heads, head_size, dtype=dtype, device=device)

    def write(self, cache: torch.Tensor, new: torch.Tensor, batch: AttentionBatch) -> None:
        """Store ``new`` [num_tokens, num_kv_heads, head_size] at ``batch.slots``."""
        slots = torch.from_numpy(batch.slots).to(cache.device)
        cache.flatten(0, 1).index_copy_(0, slots, new.to(cache.dtype))

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [num_tokens, num_heads, value_head_size]; see `pagedlab.kernels.base`."""
        device, block_size = query.device, batch.block_size
        entries = torch.from_numpy(batch.entries).to(device)
        index = torch.from_numpy(batch.index).to(device)
        out = query.new_empty(*query.shape[:2], value_cache.shape[-1])
        starts = batch.query_start.tolist()
        for s, (row, length) in enumerate(zip(batch.rows.tolist(), batch.context_lens.tolist())):
            chunk = query[starts[s] : starts[s + 1]]
            # Keys that no query of the chunk sees are not touched: their blocks may be gone.
            first = 0 if sliding_window is None else max(0, length - len(chunk) + 1 - sliding_window)
            positions = torch.arange(first, length, device=device)
            blocks = self._block_of(entries, index, torch.tensor(row, device=device), positions // block_size)
            offsets = positions % block_size
            keys, values = key_cache[blocks, offsets], value_cache[blocks, offsets]
            out[starts[s] : starts[s + 1]] = self.attend_sequence(
                chunk,
                keys,
                values,
                scale=scale,
                sliding_window=sliding_window,
                soft_cap=soft_cap,
                alibi_slopes=alibi_slopes,
                sinks=sinks,
            )
        return out

    def attend_sequence(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        alibi_slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend for one sequence over its gathered context; shapes of `dense_attention`."""
        return dense_attention(
            query,
            keys,
            values,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        )
