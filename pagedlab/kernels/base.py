"""The contract that every paged attention implementation fulfils.

Shapes are those of one flat, ragged batch: `num_tokens` query tokens of `num_seqs` sequences lie one after
the other. Sequence s owns query rows ``query_start[s] : query_start[s + 1]``; they are the *last* tokens of
its context of ``context_lens[s]`` tokens, whose keys and values (its own new ones included, already written)
lie in the blocks that
the layout gives for ``rows[s]``::

    context of sequence s   |<------------- context_lens[s] -------------->|
    blocks                  | block_of(0) | block_of(1) | block_of(2) |... |
    queries                                       |<- query_start diff --->|

Query token j of a sequence with q query tokens stands at position ``context_len - q + j`` and sees keys at
positions ``<= `` its own, and with a sliding window w only ``> position - w``. Slots past the context, and
unused blocks, may hold anything, NaN included: they must never influence an output.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pagedlab.errors import ConfigError
from pagedlab.policies.kernel import OPTIONS
from pagedlab.policies.layout import Int32Array, Layout


@dataclass(slots=True)
class AttentionBatch:
    """What one step's attention needs besides the tensors; the same for every layer.

    ``query_start`` int32 [num_seqs + 1], ``context_lens`` int32 [num_seqs], ``rows`` int32 [num_seqs],
    ``slots`` int64 [num_tokens] (``block * block_size + offset`` where each token's key and value are
    written), ``entries`` and ``index`` the layout's arrays.
    """

    query_start: Int32Array
    context_lens: Int32Array
    rows: Int32Array
    slots: NDArray[np.int64]
    entries: Int32Array
    index: Int32Array
    block_size: int
    max_query_len: int
    max_context_len: int


class PagedAttention(Protocol):
    """One kernel for one layout. The block is axis 0 of every cache tensor, the rest is the kernel's
    choice.

    ``sliding_window``, ``soft_cap``, ``alibi_slopes`` and ``sinks`` are options. A kernel that lacks one leaves it out
    of the arguments of ``attend`` and takes no ``**kwargs`` that would swallow it. A model that needs the option is
    then refused by `ConfigError` when its executor is made, not in the middle of a step.

    A kernel for GPUs may also have ``move_blocks(sources, targets, from_blocks, to_blocks)``, which copies block
    ``from_blocks[i]`` of ``sources[t]`` to ``to_blocks[i]`` of ``targets[t]`` for all i and t, within the device or
    between it and the host; executors on a GPU then carry out moves with it.
    """

    axis_order: tuple[str, ...]
    """Names of the cache tensors' axes, e.g. ``("block", "head", "token", "channel")``."""

    def __init__(self, layout: Layout, **params: Any) -> None: ...

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
        """Return an empty cache tensor for keys or for values of one layer, in this kernel's axis order."""

    def write(self, cache: torch.Tensor, new: torch.Tensor, batch: AttentionBatch) -> None:
        """Store ``new`` [num_tokens, num_kv_heads, head_size] at ``batch.slots``."""

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
        """Return [num_tokens, num_heads, value_head_size] for ``query`` [num_tokens, num_heads, head_size].

        Grouped-query heads: query head h reads KV head ``h // (num_heads // num_kv_heads)``. Soft cap c
        replaces a scaled score x by ``c * tanh(x / c)``. ``alibi_slopes`` [num_heads] then takes ``slope * distance``
        from each score (Press et al. 2021). ``sinks`` [num_heads] are scores that take part in the softmax and have no
        value (Xiao et al. 2023, learned as in gpt-oss). None is as if the option were not there; an executor gives
        ``sliding_window`` and ``soft_cap`` to every kernel that takes them, the others where a layer needs them.
        """


def options_of(attention: PagedAttention) -> frozenset[str]:
    """Return which options a kernel's ``attend`` takes, by its signature; with ``**kwargs`` that is all of them.

    Raises `ConfigError` if a method of `PagedAttention` is missing.
    """
    name = type(attention).__name__
    for method in ("allocate", "write", "attend"):
        if not callable(getattr(attention, method, None)):
            raise ConfigError(
                f"{name} is no attention kernel: it lacks {method}; needed: allocate, write, attend"
            )
    parameters = inspect.signature(attention.attend).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return frozenset(OPTIONS)
    return frozenset(OPTIONS) & {n for n, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY}
