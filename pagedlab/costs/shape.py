"""The shape of a language model: its sizes, and the bytes and FLOPs that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

from pagedlab.errors import ConfigError

BYTES: dict[str, float] = {
    "float64": 8.0,
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "float8_e4m3fn": 1.0,
    "float8_e5m2": 1.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
}
"""Bytes per number by the name of its type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer as far as memory and time are concerned.

    Counted are the matrices; biases and norms (below 0.3% of any model here) are not. Every layer is taken to attend
    to the whole context, so sliding windows are not modelled.

    >>> from pagedlab.costs.catalogue import find_model
    >>> find_model("llama-3.1-8b").kv_bytes_per_token
    131072
    """

    name: str
    layers: int
    hidden: int
    """Width of the residual stream."""
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    """Width of a dense layer's MLP."""
    vocab: int
    tied_embeddings: bool = False
    """Input embedding and output head are one matrix."""
    gated: bool = True
    """The MLP has three matrices (gate, up, down) rather than two."""
    experts: int = 0
    """Routed experts of a layer; 0: every layer is dense."""
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Width of the experts that every token passes through, together."""
    dense_layers: int = 0
    """Layers of a mixture of experts that have an ordinary MLP."""
    learned_positions: int = 0
    """Rows of a learned position embedding (OPT, GPT-2)."""
    bytes_per_param: float = 2.0
    kv_bytes: float = 2.0
    """Bytes per number in the KV cache."""
    source: str = ""
    """Where the figures are from."""

    def __post_init__(self) -> None:
        for size in ("layers", "hidden", "heads", "kv_heads", "head_size", "vocab"):
            self._whole(size, 1)
        for size in (
            "intermediate",
            "experts",
            "experts_per_token",
            "expert_intermediate",
            "shared_intermediate",
            "dense_layers",
            "learned_positions",
        ):
            self._whole(size, 0)
        for size in ("bytes_per_param", "kv_bytes"):
            if not 0 < getattr(self, size) <= 16:
                raise ConfigError(f"model {self.name!r}: {size} must be above 0 and at most 16")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model {self.name!r}: {self.heads} heads cannot share {self.kv_heads} KV heads"
            )
        if self.experts and not (1 <= self.experts_per_token <= self.experts and self.expert_intermediate):
            raise ConfigError(
                f"model {self.name!r}: {self.experts} experts need experts_per_token from 1 to {self.experts} "
                "and expert_intermediate"
            )
        if self.dense_layers > self.layers:
            raise ConfigError(f"model {self.name!r}: {self.dense_layers} of {self.layers} layers are dense")

    def _whole(self, size: str, low: int) -> None:
        value = getattr(self, size)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(
                f"model {self.name!r}: {size} must be a whole number from {low} up, not {value!r}"
            )

    # ---- parameters ------------------------------------------------------------------------------------------------

    @property
    def _moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    def _mlp(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width

    @property
    def common_params(self) -> int:
        """Parameters of the layers that every token uses: attention, dense MLPs, routers, shared experts."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        moe = self._moe_layers
        return (
            self.layers * attention
            + (self.layers - moe) * self._mlp(self.intermediate)
            + moe * (self.hidden * self.experts + self._mlp(self.shared_intermediate))
        )

    @property
    def expert_params(self) -> int:
        """Parameters of all routed experts."""
        return self._moe_layers * self.experts * self._mlp(self.expert_intermediate)

    @property
    def _embedding_params(self) -> int:
        tables = self.vocab * (1 if self.tied_embeddings else 2) + self.learned_positions
        return tables * self.hidden

    @property
    def num_params(self) -> int:
        """All parameters."""
        return self._embedding_params + self.common_params + self.expert_params

    @property
    def active_params(self) -> int:
        """Parameters that one token uses, counted as model cards do: embeddings included."""
        return self._embedding_params + self._active_layer_params

    @property
    def _active_layer_params(self) -> int:
        routed = self._moe_layers * self.experts_per_token * self._mlp(self.expert_intermediate)
        return self.common_params + routed

    # ---- bytes -----------------------------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the weights take."""
        return round(self.num_params * self.bytes_per_param)

    @property
    def common_bytes(self) -> float:
        """Bytes of the layers' weights that any step reads: all but routed experts, embeddings and head."""
        return self.common_params * self.bytes_per_param

    @property
    def expert_bytes(self) -> float:
        """Bytes of all routed experts."""
        return self.expert_params * self.bytes_per_param

    @property
    def head_bytes(self) -> float:
        """Bytes of the output head, which a step reads that samples."""
        return self.vocab * self.hidden * self.bytes_per_param

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the KV cache that one token takes, all layers together."""
        return round(2 * self.layers * self.kv_heads * self.head_size * self.kv_bytes)

    # ---- FLOPs -----------------------------------------------------------------------------------------------------

    @property
    def flops_per_token(self) -> int:
        """FLOPs of the layers' matrix products for one token: two per active parameter, no head, no attention."""
        return 2 * self._active_layer_params

    @property
    def head_flops(self) -> int:
        """FLOPs of one row of logits."""
        return 2 * self.vocab * self.hidden

    @property
    def pair_flops(self) -> int:
        """FLOPs of attention for one query and one key, all layers: two products, two FLOPs per channel each."""
        return 4 * self.layers * self.heads * self.head_size

    def coverage(self, tokens: int) -> float:
        """Share of the routed experts that ``tokens`` tokens are expected to reach, if routing is even.

        ``1 - (1 - k/E) ** tokens``; 1.0 for a dense model.
        """
        return 1.0 - (1.0 - self.experts_per_token / self.experts) ** tokens if self.experts else 1.0

    # ---- from elsewhere --------------------------------------------------------------------------------------------

    def replace(self, **override: Any) -> Self:
        """Return a copy with some fields changed; `ConfigError` for a field that does not exist."""
        known = {f.name for f in fields(self)}
        for key in override:
            if key not in known:
                raise ConfigError(f"a model shape has no field {key!r}; it has: {', '.join(sorted(known))}")
        return replace(self, **override)

    @classmethod
    def from_hf_config(cls, config: Any, *, name: str | None = None, **override: Any) -> Self:
        """Read a Hugging Face configuration: the object, or ``config.json`` as a dict.

        Nested text models (``text_config``), grouped-query attention and mixtures of experts are understood under the
        names that the families use. Numbers take two bytes unless the configuration says otherwise (``dtype``,
        ``torch_dtype``, ``quantization_config``); ``override`` sets fields of the shape. Of a model that also sees or
        hears, the text model is read. Raises `ConfigError` naming what is missing, or what one shape of layer with
        keys and values per head does not describe (latent attention, state-space and linear-attention layers, ...).
        """
        outer = dict(config) if isinstance(config, Mapping) else _as_dict(config)
        inner = next(
            (dict(outer[k]) for k in ("text_config", "llm_config") if isinstance(outer.get(k), Mapping)), {}
        )
        found = {**{k: v for k, v in outer.items() if v is not None}, **inner}
        title = name or str(outer.get("_name_or_path") or found.get("model_type") or "model")
        return cls(**{"name": title, "source": "config.json", **_Reader(title, found).shape(), **override})


def _as_dict(config: Any) -> dict[str, Any]:
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        raise ConfigError(
            f"a model's configuration must be a dict or have to_dict(), not {type(config).__name__}"
        )
    return dict(to_dict())


class _Family(NamedTuple):
    """What a family's configurations leave unsaid; one not listed below is built like Llama."""

    gated: bool = True
    tied: bool = False
    """Embedding and head are one matrix unless the configuration says otherwise."""
    positions: int | None = None
    """Rows of a learned position embedding beyond the longest sequence; None: positions are not learned."""


_FAMILIES: dict[str, _Family] = {
    "apertus": _Family(gated=False),
    "arcee": _Family(gated=False),
    "biogpt": _Family(gated=False, tied=True, positions=2),
    "bloom": _Family(gated=False, tied=True),
    "codegen": _Family(gated=False),
    "cohere": _Family(tied=True),
    "cohere2": _Family(tied=True),
    "falcon": _Family(gated=False, tied=True),
    "gemma": _Family(tied=True),
    "gemma2": _Family(tied=True),
    "gemma3": _Family(tied=True),
    "gemma3_text": _Family(tied=True),
    "gpt2": _Family(gated=False, tied=True, positions=0),
    "gpt_bigcode": _Family(gated=False, tied=True, positions=0),
    "gpt_neo": _Family(gated=False, tied=True, positions=0),
    "gpt_neox": _Family(gated=False),
    "gpt_neox_japanese": _Family(gated=False),
    "gptj": _Family(gated=False),
    "mpt": _Family(gated=False, tied=True),
    "nemotron": _Family(gated=False),
    "openai-gpt": _Family(gated=False, tied=True, positions=0),
    "opt": _Family(gated=False, tied=True, positions=2),
    "persimmon": _Family(gated=False),
    "phi": _Family(gated=False),
    "starcoder2": _Family(gated=False, tied=True),
    "xglm": _Family(gated=False, tied=True),
}
"""By ``model_type``."""
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_NOT_DESCRIBED = {
    "kv_lora_rank": "multi-head latent attention",
    "compress_ratios": "compressed attention",
    "mamba_d_state": "state-space layers",
    "ssm_state_size": "state-space layers",
    "state_size": "state-space layers",
    "conv_L_cache": "convolutions",
    "lru_width": "recurrent layers",
    "linear_num_key_heads": "linear attention",
    "attn_layer_period": "layers without attention",
    "global_head_dim": "heads that differ from layer to layer",
    "hidden_size_per_layer_input": "embeddings of every layer",
}
"""Keys of configurations whose cache or weights do not follow from one shape of layer."""


class _Reader:
    """Reads sizes under the names that different families give them."""

    def __init__(self, title: str, found: Mapping[str, Any]) -> None:
        self.title, self.found = title, found
        self.name = str(found.get("model_type", ""))
        self.family = _FAMILIES.get(self.name, _Family())

    def size(self, *keys: str, default: int | None = None) -> int:
        value = next((self.found[k] for k in keys if self.found.get(k) is not None), default)
        if value is None:
            raise ConfigError(f"model {self.title!r}: the configuration has none of {', '.join(keys)}")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(
                f"model {self.title!r}: {keys[0]} must be one whole number for all layers, not {value!r}"
            )
        return value

    def shape(self) -> dict[str, Any]:
        for key, what in _NOT_DESCRIBED.items():
            if self.found.get(key):
                raise ConfigError(
                    f"model {self.title!r} has {what} ({key}), which a model shape does not describe"
                )
        for kind in self.found.get("layer_types") or ():
            if kind not in _ATTENTION:
                raise ConfigError(
                    f"model {self.title!r} has {kind} layers, which a model shape does not describe"
                )
        layers = self.size("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        hidden = self.size("hidden_size", "n_embd", "d_model")
        heads = self.size("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
        if self.size("word_embed_proj_dim", default=hidden) != hidden:
            raise ConfigError(f"model {self.title!r}: embeddings narrower than the layers are not described")
        ratio = self.size("expansion_ratio", default=4)
        positions = 0
        if self.family.positions is not None:
            positions = self.size("max_position_embeddings", "n_positions") + self.family.positions
        intermediate = self.size(
            "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", default=ratio * hidden
        )
        return {
            "layers": layers,
            "hidden": hidden,
            "heads": heads,
            "kv_heads": self.kv_heads(heads),
            "head_size": self.size("head_dim", default=hidden // heads),
            "intermediate": intermediate,
            "vocab": self.size("vocab_size"),
            "tied_embeddings": bool(self.found.get("tie_word_embeddings", self.family.tied)),
            "gated": self.family.gated,
            "learned_positions": positions,
            "bytes_per_param": self.weight_width(),
            "kv_bytes": self.width(),
            **self.experts(layers, intermediate),
        }

    def kv_heads(self, heads: int) -> int:
        if self.name == "falcon" and not self.found.get("new_decoder_architecture"):
            return 1 if self.found.get("multi_query", True) else heads
        if self.name == "gpt_bigcode":
            return 1 if self.found.get("multi_query", True) else heads
        attention = self.found.get("attn_config")
        if isinstance(attention, Mapping) and "kv_n_heads" in attention:
            return int(attention["kv_n_heads"])
        return self.size("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads)

    def experts(self, layers: int, intermediate: int) -> dict[str, int]:
        count = self.size(
            "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", default=0
        )
        if count <= 1:
            return {}
        width = self.size("moe_intermediate_size", default=intermediate)
        shared = self.size(
            "shared_expert_intermediate_size", default=width * self.size("n_shared_experts", default=0)
        )
        more = {}
        if "interleave_moe_layer_step" in self.found:  # Llama 4: one shared expert beside the routed ones
            shared, more["intermediate"] = width, self.size("intermediate_size_mlp")
        return {
            "experts": count,
            "experts_per_token": self.size(
                "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k"
            ),
            "expert_intermediate": width,
            "shared_intermediate": shared,
            "dense_layers": sum(1 for i in range(layers) if self.is_dense(i)),
            **more,
        }

    def is_dense(self, layer: int) -> bool:
        """Return whether this layer of a mixture of experts has an ordinary MLP."""
        named = self.found.get("mlp_only_layers")
        step = self.size("decoder_sparse_step", "interleave_moe_layer_step", default=1)
        return (
            layer < self.size("first_k_dense_replace", default=0)
            or (isinstance(named, Iterable) and layer in named)
            or (step > 0 and (layer + 1) % step != 0)
        )

    def width(self) -> float:
        """Bytes of a number that is not quantised."""
        dtype = str(self.found.get("dtype") or self.found.get("torch_dtype") or "bfloat16").removeprefix(
            "torch."
        )
        if dtype not in BYTES:
            raise ConfigError(f"model {self.title!r}: dtype {dtype!r} is unknown; known: {', '.join(BYTES)}")
        return BYTES[dtype]

    def weight_width(self) -> float:
        quantised = self.found.get("quantization_config")
        if not isinstance(quantised, Mapping):
            return self.width()
        if quantised.get("load_in_4bit") or quantised.get("quant_method") == "mxfp4":
            return 0.5
        if quantised.get("load_in_8bit") or "fp8" in str(quantised.get("quant_method", "")):
            return 1.0
        bits = quantised.get("bits") or quantised.get("w_bit")
        return int(bits) / 8 if bits else self.width()
