"""Attention without a paged kernel: copy each context together, then call torch's own attention."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from pagedlab.kernels.dense import DenseReference, visible


class GatherSDPA(DenseReference):
    """Gathers like `DenseReference`, then calls ``scaled_dot_product_attention``, which has neither soft cap nor sinks.

    With one of those, or with ALiBi, the textbook form is used instead.
    """

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
        if soft_cap is not None or alibi_slopes is not None or sinks is not None:
            return super().attend_sequence(
                query,
                keys,
                values,
                scale=scale,
                sliding_window=sliding_window,
                soft_cap=soft_cap,
                alibi_slopes=alibi_slopes,
                sinks=sinks,
            )
        q, num_heads, head_size = query.shape
        t, num_kv_heads = keys.shape[:2]
        k, v = keys.to(query.dtype).transpose(0, 1)[None], values.to(query.dtype).transpose(0, 1)[None]
        if q == 1:
            # One token sees every gathered key. Its heads, regrouped by KV head, read each key once.
            grouped = query.view(1, num_kv_heads, num_heads // num_kv_heads, head_size)
            out = scaled_dot_product_attention(grouped, k, v, scale=scale)
            return out.reshape(1, num_heads, -1)
        whole = q == t and sliding_window is None
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            k,
            v,
            attn_mask=None if whole else visible(q, t, sliding_window, query.device),
            is_causal=whole,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)
