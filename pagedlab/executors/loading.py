"""From a name, a folder or a model object to a causal language model that is proven to run through a paged
cache.

Loading refuses by name what cannot be served (`ModelNotServed`) and what is not there (`ConfigError`),
executes no code and unpickles nothing from the outside: ``trust_remote_code=False``, safetensors only. What a
configuration promises is then proven by `probe`: one small forward pass in which two sequences lie in one
flat row.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pagedlab.errors import ConfigError, ModelNotServed, nearest
from pagedlab.executors import shapes
from pagedlab.executors.linears import strip
from pagedlab.executors.probe import ATTENTION, AttentionLayer, probe, quiet

PACKAGED_MODELS = Path(__file__).parent.parent / "models"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

_RECURRENT = frozenset(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma"))
_UNBOUNDED = 1 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM whose attention goes through `paged_attention`, and what is known of it.

    ``layers`` maps each attention module to its shape, in the order in which a forward pass calls them.
    ``own_attention`` is the implementation it had before; ``probe_error`` is the relative difference between
    logits of the flat row and of separate sequences; ``max_model_len`` is in tokens.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any | None
    dtype: torch.dtype
    layers: dict[torch.nn.Module, AttentionLayer]
    own_attention: str
    eos_token_ids: frozenset[int]
    max_model_len: int
    keeps_logits: bool
    probe_error: float

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, all layers."""
        numbers = sum(s.num_kv_heads * (s.key_size + s.value_size) for s in self.layers.values())
        return numbers * int(self.dtype.itemsize)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``, or raise `ConfigError` naming the four that are served."""
    if name not in DTYPES:
        raise ConfigError(f"no dtype {name!r}; allowed: {', '.join(DTYPES)}{nearest(name, DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which `torch_dtype` knows ``dtype``."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def load_model(
    source: str | Path | PreTrainedModel,
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any | None = None,
) -> LoadedModel:
    """Load, check and prove a model.

    ``source`` is ``"tiny"`` (ships with the package), a local folder, a hub name, ``"random:..."`` (a known
    shape with random weights), or a model object (which is then changed in place: attention, and dtype and
    device if they differ). ``dtype`` None keeps the weights' own, ``device`` None
    leaves a model object where it is and puts others on the CPU.

    Raises `ConfigError` if there is no such model or no such dtype, `ModelNotServed` if it cannot run through
    a paged cache; both in one line.
    """
    wanted = None if dtype is None else torch_dtype(dtype)
    if isinstance(source, PreTrainedModel):
        name, model = type(source).__name__, source
        check_config(model.config, name)
        if model.get_output_embeddings() is None:
            raise ModelNotServed(f"{name} has no language-model head; a causal LM is needed")
    elif isinstance(source, str) and source.startswith(shapes.PREFIX):
        name, model = source, shapes.random_model(source, wanted or torch.float32)
    else:
        name = str(source)
        location = locate(source)
        with quiet():
            model = _read(location, name, wanted)
            tokenizer = tokenizer if tokenizer is not None else _read_tokenizer(location)
    model.eval()
    if model.device.type == "meta" or any(p.device.type == "meta" for p in model.parameters()):
        raise ModelNotServed(f"{name} has weights that are not loaded (meta device)")
    if device is not None:
        _to(model, _present(torch.device(device)))
    if wanted is not None and model.dtype != wanted:
        _to(model, wanted)
    if model.dtype not in DTYPES.values():
        raise ModelNotServed(f"{name} has weights of {model.dtype}; allowed: {', '.join(DTYPES)}")
    return prove(model, name, tokenizer)


def _present(device: torch.device) -> torch.device:
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"no device '{device}' here: torch sees {torch.cuda.device_count()} GPUs")
    return device


def _to(model: torch.nn.Module, where: torch.device | torch.dtype) -> None:
    model.to(where)


def locate(source: str | Path) -> str | Path:
    """Return a folder if ``source`` names one (``"tiny"`` included), else the hub name; `ConfigError` if
    neither.
    """
    if source == "tiny":
        if not (PACKAGED_MODELS / "tiny" / "config.json").is_file():
            raise ConfigError(f"the packaged model 'tiny' is missing from {PACKAGED_MODELS}")
        return PACKAGED_MODELS / "tiny"
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is no model folder: it has no config.json")
        if not list(folder.glob("*.safetensors")):
            if [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]:
                raise ModelNotServed(f"{folder} has only pickled weights; save them as safetensors")
            raise ConfigError(f"{folder} has no weights: no *.safetensors file")
        return folder
    text = str(source)
    if (
        isinstance(source, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or not text.strip()
    ):
        raise ConfigError(
            f"no model folder {text!r}; give a folder, a hub name such as 'org/name', or 'tiny'"
        )
    return text


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Raise `ModelNotServed` for what a configuration already shows to be out of reach."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelNotServed(
            f"{name} ({kind}) is an encoder-decoder; only decoder-only causal LMs are served"
        )
    if kind in _RECURRENT or getattr(config, "layers_block_type", None) is not None:
        raise ModelNotServed(
            f"{name} ({kind}) keeps a recurrent state; only models with attention in every layer are served"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelNotServed(f"{name} ({kind}) has no causal LM head in transformers")
    text = config.get_text_config()
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if odd:
        raise ModelNotServed(
            f"{name} ({kind}) has layers of type {', '.join(odd)}; allowed: full and sliding attention"
        )


def _read(location: str | Path, name: str, dtype: torch.dtype | None) -> PreTrainedModel:
    local = isinstance(location, Path)
    if local and "model_type" not in (stated := _config_json(Path(location))):
        raise ConfigError(
            f"{location}/config.json names no model_type"
            + (" and needs remote code" if "auto_map" in stated else "")
        )
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False, local_files_only=local)
    except Exception as error:
        raise _explain(error, name, local) from None
    check_config(config, name)
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            location,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            output_loading_info=True,
        )
    except Exception as error:
        raise _explain(error, name, local) from None
    model, report = read
    if missing := sorted(report["missing_keys"]):
        raise ModelNotServed(
            f"{name} lacks {len(missing)} weights that {type(model).__name__} needs, {missing[0]} first"
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _config_json(folder: Path) -> dict[str, Any]:
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}/config.json cannot be read: {error}") from None
    if not isinstance(stated, dict):
        raise ConfigError(f"{folder}/config.json must hold an object")
    return stated


def _explain(error: Exception, name: str, local: bool) -> ConfigError | ModelNotServed:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text or "custom code" in text:
        return ModelNotServed(
            f"{name} needs code of its own (trust_remote_code); only models of transformers are served"
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return ModelNotServed(f"{name} is of a type that this transformers does not know: {text[:160]}")
    if "safetensors" in text:
        return ModelNotServed(f"{name} has no safetensors weights; pickled weights are not loaded")
    if not local:
        return ConfigError(
            f"no model {name!r}: no such folder, and the hub did not give it ({type(error).__name__}: {text[:160]})"
        )
    return ConfigError(f"{name} cannot be loaded ({type(error).__name__}: {text[:200]})")


def read_tokenizer(source: str | Path) -> Any:
    """Return the tokenizer of a model by name or folder, without its weights; `ConfigError` if it has none."""
    tokenizer = _read_tokenizer(locate(source))
    if tokenizer is None:
        raise ConfigError(f"{source} has no tokenizer")
    return tokenizer


def _read_tokenizer(location: str | Path) -> Any | None:
    try:
        return AutoTokenizer.from_pretrained(
            location, trust_remote_code=False, local_files_only=isinstance(location, Path)
        )
    except Exception:
        # A model without a tokenizer is served in token ids alone: `detokenize` then says None.
        return None


def prove(model: PreTrainedModel, name: str, tokenizer: Any | None) -> LoadedModel:
    """Send ``model``'s attention through `paged_attention` and prove that it goes there.

    Raises `ModelNotServed` if it does not; the model is then as it was.
    """
    strip(model)
    own = str(model.config._attn_implementation)
    if own == ATTENTION:  # Left so by an executor that was dropped without `release`.
        own = "eager"
    if model.dtype == torch.float64 and model._can_set_experts_implementation():
        # The grouped products of the faster expert implementations have no float64 form.
        model.set_experts_implementation("eager")
    try:
        layers, error = probe(model, name)
    except BaseException:
        with quiet():
            model.set_attn_implementation(own)
        raise
    parameters = _forward_parameters(model)
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        dtype=model.dtype,
        layers=layers,
        own_attention=own,
        eos_token_ids=eos_token_ids(model),
        max_model_len=max_model_len(model.config),
        keeps_logits="logits_to_keep" in parameters,
        probe_error=error,
    )


def _forward_parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids that end a sequence: the generation config's, else the config's."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]) if int(i) >= 0)
    return frozenset()


def max_model_len(config: PreTrainedConfig) -> int:
    """Return the longest sequence in tokens that the configuration allows (2**20 if it names no bound)."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [r for r in (rope, *rope.values()) if isinstance(r, dict)]
    for one in kinds:
        if one.get("rope_type") in ("dynamic", "longrope"):
            # Beyond the original length these change the angles of *every* token in a batch by the longest one, so
            # that a request's output would depend on its neighbours.
            original = one.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            if original:
                return int(original)
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        if (bound := getattr(text, field, None)) is not None:
            return int(bound)
    return _UNBOUNDED
