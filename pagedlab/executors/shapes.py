"""Models with random weights in the shape of known ones: speed and memory do not depend on what a model says.

``Config(model="random:smollm2-135m")`` runs one without a download. It has no tokenizer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pagedlab.errors import ConfigError, nearest

PREFIX = "random:"

SHAPES: dict[str, dict[str, Any]] = {
    # HuggingFaceTB/SmolLM2-135M, config.json
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}


def random_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """Return the model of that shape with seeded random weights; `ConfigError` names the shapes that are known."""
    shape = name.removeprefix(PREFIX)
    if shape not in SHAPES:
        known = ", ".join(PREFIX + s for s in SHAPES)
        raise ConfigError(f"no shape {shape!r}; known: {known}{nearest(shape, SHAPES)}")
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    ready: LlamaForCausalLM = model.to(dtype).eval()
    return ready
