"""The door through which a model's attention comes to us, and the proof that all of it does.

`paged_attention` stands in transformers' attention interface; it holds nothing itself. What it hands queries, keys and
values to (`AttentionSink`: the probe here, one step of the paged cache in the executor) comes down with each forward
pass, through the model's own keyword arguments.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from pagedlab.errors import ModelNotServed

ATTENTION = "pagedlab"
"""Name under which `paged_attention` stands in transformers' attention interface."""

# Keyword arguments that reach an attention function and change nothing here: positions are in the rotary embedding
# already, and the batch itself says which token sees which.
_HARMLESS = frozenset(
    (
        *(
            "position_ids",
            "position_embeddings",
            "cache_position",
            "use_cache",
            "logits_to_keep",
            "return_dict",
        ),
        *(
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "is_causal",
            "num_items_in_batch",
        ),
    )
)


NOT_PAGED = "this model belongs to a ModelExecutor; call its `release` to use the model itself"


class NotPaged(ModelNotServed):
    """A model of a `ModelExecutor` was called without a paged cache behind it."""


Place = tuple[int, int, int, int]
"""Addresses of a key and a value cache [block, head, token, channel] and of the tokens' slots (int64), block size."""


class AttentionSink(Protocol):
    """What stands behind `paged_attention` for the length of one forward pass."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [num_tokens, num_heads, value_size] for contiguous query, key, value [num_tokens, heads, size].

        ``key`` and ``value`` are None if they are where `place` said already. ``sinks`` [num_heads] as in
        `pagedlab.kernels.base.PagedAttention.attend`.
        """

    def place(self, module: torch.nn.Module, dtype: torch.dtype) -> Place | None:
        """Say where keys and values of ``dtype`` may be written to straight away, or None if only `attend` knows."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    paged: AttentionSink | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Hand one layer's attention to ``paged``, which came down through the model's own keyword arguments."""
    if paged is None:
        raise NotPaged(NOT_PAGED)
    for name, given in kwargs.items():
        if given is not None and name not in _HARMLESS:
            raise ModelNotServed(
                f"{type(module).__name__} asks its attention for {name!r}, which a paged kernel has not"
            )
    if attention_mask is not None:
        raise ModelNotServed(
            f"{type(module).__name__} builds its own attention mask, which a paged kernel has not"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # [1, heads, tokens, size] -> [tokens, heads, size]; models build the former from the latter, so that this is mostly
    # a view.
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    sinks = None if s_aux is None else s_aux.detach().flatten()
    return paged.attend(module, q, k, v, scale, sliding_window, softcap, sinks)[None], None


AttentionInterface.register(ATTENTION, paged_attention)


@dataclass(frozen=True)
class AttentionLayer:
    """What one attention layer asked for in the probe. ``key_size`` and ``value_size`` are channels per head."""

    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    sinks: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Options of `PagedAttention.attend` without which the layer would say something else."""
        asked = {
            "sliding_window": self.sliding_window is not None,
            "soft_cap": self.soft_cap is not None,
            "sinks": self.sinks,
        }
        return frozenset(name for name, needed in asked.items() if needed)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bar and notices out of a loading that ends in one line or in silence."""
    level, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()


class _Probe:
    """Dense attention of two sequences in one flat row, which notes what each layer asks for."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.layers: dict[torch.nn.Module, AttentionLayer] = {}
        self.calls = 0

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert key is not None
        assert value is not None
        self.calls += 1
        if getattr(module, "is_causal", True) is False:
            raise ModelNotServed(f"{type(module).__name__} attends in both directions; a causal LM is needed")
        self.layers[module] = AttentionLayer(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_size=key.shape[2],
            value_size=value.shape[2],
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks is not None,
        )
        group = query.shape[1] // key.shape[1]
        out = []
        heads_first = (x.transpose(0, 1).split(self.lengths, dim=1) for x in (query, key, value))
        for q, k, v in zip(*heads_first, strict=True):
            scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            at = torch.arange(q.shape[1], device=q.device)
            seen = at[None, :] <= at[:, None]
            if sliding_window is not None:
                seen &= at[None, :] > at[:, None] - sliding_window
            scores = scores.masked_fill(~seen, -math.inf)
            if sinks is not None:
                level = sinks.to(scores.dtype)[:, None, None].expand(-1, q.shape[1], 1)
                scores = torch.cat([scores, level], dim=-1)
            weights = scores.softmax(-1)[..., : q.shape[1]]
            out.append((weights @ v.repeat_interleave(group, 0)).transpose(0, 1))
        return torch.cat(out)

    def place(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        return None


_PROBE_LENGTHS = (17, 11)


def _probe_prompts(model: PreTrainedModel) -> list[list[int]]:
    vocab = int(model.config.get_text_config().vocab_size)
    return [
        [(3 + 7 * i + 13 * i * i + 5 * s) % vocab for i in range(n)] for s, n in enumerate(_PROBE_LENGTHS)
    ]


@torch.no_grad()
def probe_logits(model: PreTrainedModel, sink: AttentionSink | None = None) -> torch.Tensor:
    """Run the probe's two sequences in one flat row through `paged_attention`; logits [num_tokens, vocab]."""
    ids = [token for prompt in _probe_prompts(model) for token in prompt]
    positions = [i for n in _PROBE_LENGTHS for i in range(n)]
    output = model(
        torch.tensor([ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        use_cache=False,
        paged=sink if sink is not None else _Probe(_PROBE_LENGTHS),
    )
    return output.logits[0]  # type: ignore[no-any-return]


@torch.no_grad()
def probe(model: PreTrainedModel, name: str) -> tuple[dict[torch.nn.Module, AttentionLayer], float]:
    """Set ``model``'s attention to `paged_attention` and prove it by the logits of two sequences in one flat row.

    Returns each attention module's shape in the order of calls, and the relative difference to logits of the separate
    sequences. Raises `ModelNotServed` with the reason if a layer does not come through, or the logits differ.
    """
    text = model.config.get_text_config()
    title = f"{name} ({text.model_type})"
    with quiet():
        model.set_attn_implementation("eager")
        alone = [
            model(torch.tensor([p], device=model.device), use_cache=False).logits[0]
            for p in _probe_prompts(model)
        ]
        model.set_attn_implementation(ATTENTION)
    probe = _Probe(_PROBE_LENGTHS)
    try:
        flat = probe_logits(model, probe)
    except (TypeError, NotPaged):
        raise ModelNotServed(f"{title} does not pass arguments on to its attention") from None
    expected = int(text.num_hidden_layers)
    if len(probe.layers) != expected or probe.calls != expected:
        raise ModelNotServed(
            f"{title} has {expected} layers, and {len(probe.layers)} of them send their attention through "
            "transformers' attention interface; all must"
        )
    _check_windows(probe.layers, text, title)
    worst = 0.0
    for one, other in zip(alone, flat.split(_PROBE_LENGTHS), strict=True):
        error = (one.double() - other.double()).norm(dim=-1) / one.double().norm(dim=-1).clamp_min(1e-30)
        # The median: one expert chosen otherwise by rounding is no fault, a sequence that sees another one is.
        worst = max(worst, float(error.median()))
    bound = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}[model.dtype]
    if not worst <= bound:
        raise ModelNotServed(
            f"{title} gives other logits for two sequences in one flat row than for each alone "
            f"(relative difference {worst:.2g}, allowed {bound:g})"
        )
    return probe.layers, worst


def _check_windows(
    layers: dict[torch.nn.Module, AttentionLayer], config: PreTrainedConfig, title: str
) -> None:
    """A window that only ever shows in a mask would go unnoticed by a short probe; so it must have been asked for."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None and window is not None and getattr(config, "use_sliding_window", True):
        kinds = ["sliding_attention"] * len(layers)
    for i, (kind, layer) in enumerate(zip(kinds or (), layers.values(), strict=False)):
        if (kind == "sliding_attention") != (layer.sliding_window is not None):
            raise ModelNotServed(f"{title}: layer {i} is {kind} but asked for window {layer.sliding_window}")
