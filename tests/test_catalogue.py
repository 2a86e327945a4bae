"""The catalogue: figures against what their authors published, configurations of many families, names that forgive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedlab.costs import (
    Hardware,
    ModelShape,
    add_hardware,
    add_model,
    find_hardware,
    find_model,
    pool_blocks,
)
from pagedlab.costs.catalogue import HARDWARE, MODELS
from pagedlab.errors import ConfigError

# Parameters in the published checkpoints, as their indices or model cards say; (count, how close ours must be).
# Counted here are matrices, so biases and norms are what is missing.
PUBLISHED = {
    "opt-125m": (125_239_296, 0.002),
    "opt-1.3b": (1.316e9, 0.005),
    "opt-6.7b": (6.658e9, 0.005),
    "opt-13b": (12_853_473_280, 0.002),
    "opt-30b": (30e9, 0.01),
    "opt-66b": (66e9, 0.01),
    "opt-175b": (175e9, 0.01),
    "llama-7b": (6_738_415_616, 0.001),
    "llama-13b": (13_015_864_320, 0.001),
    "llama-2-7b": (6_738_415_616, 0.001),
    "llama-2-13b": (13_015_864_320, 0.001),
    "llama-2-70b": (68_976_648_192, 0.001),
    "llama-3-8b": (8_030_261_248, 0.001),
    "llama-3.1-8b": (8_030_261_248, 0.001),
    "llama-3.1-70b": (70_553_706_496, 0.001),
    "llama-3.1-405b": (405_853_388_800, 0.001),
    "llama-3.2-1b": (1_235_814_400, 0.001),
    "llama-3.2-3b": (3_212_749_824, 0.001),
    "llama-3.3-70b": (70_553_706_496, 0.001),
    "qwen2.5-0.5b": (494_032_768, 0.001),
    "qwen2.5-7b": (7_615_616_512, 0.001),
    "qwen2.5-32b": (32_763_876_352, 0.001),
    "qwen2.5-72b": (72_706_203_648, 0.001),
    "qwen3-0.6b": (0.6e9, 0.01),
    "qwen3-4b": (4_022_468_096, 0.001),
    "qwen3-8b": (8_190_735_360, 0.001),
    "qwen3-14b": (14_768_307_200, 0.001),
    "qwen3-32b": (32_762_123_264, 0.001),
    "qwen3-30b-a3b": (30_532_122_624, 0.001),
    "qwen3-235b-a22b": (235_093_634_560, 0.001),
    "mistral-7b": (7_241_732_096, 0.001),
    "mixtral-8x7b": (46_702_792_704, 0.001),
    "smollm2-135m": (134_515_008, 0.001),
    "smollm2-360m": (361_821_120, 0.001),
    "smollm2-1.7b": (1_711_376_384, 0.001),
    "tiny": (1_967_808, 0.002),
}


def test_every_model_is_compared_with_what_was_published() -> None:
    assert set(PUBLISHED) == set(MODELS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name: str) -> None:
    count, tolerance = PUBLISHED[name]
    shape = MODELS[name]
    assert shape.num_params == pytest.approx(count, rel=tolerance)
    assert shape.source
    assert shape.weight_bytes == shape.num_params * (4 if name == "tiny" else 2)


@pytest.mark.parametrize(
    ("name", "active"), [("mixtral-8x7b", 12.9e9), ("qwen3-30b-a3b", 3.3e9), ("qwen3-235b-a22b", 22e9)]
)
def test_active_parameters_of_mixtures_are_as_published(name: str, active: float) -> None:
    shape = MODELS[name]
    assert shape.active_params == pytest.approx(active, rel=0.02)
    assert shape.active_params < shape.num_params
    assert shape.flops_per_token == pytest.approx(2 * active, rel=0.25), "all but embeddings and head"


def test_a_dense_model_uses_all_its_parameters() -> None:
    shape = find_model("llama-3.1-8b")
    assert shape.active_params == shape.num_params
    assert shape.coverage(1) == shape.coverage(1000) == 1.0
    assert shape.flops_per_token == 2 * (shape.num_params - 2 * shape.vocab * shape.hidden)
    assert shape.head_flops == 2 * 4096 * 128256


def test_the_cache_is_as_large_as_the_papers_say() -> None:
    # PagedAttention (Kwon et al. 2023), section 3: 800 KB per token of OPT-13B.
    assert find_model("opt-13b").kv_bytes_per_token == 800 * 1024
    assert find_model("llama-3.1-8b").kv_bytes_per_token == 131_072
    assert find_model("tiny").kv_bytes_per_token == 2 * 4 * 2 * 32 * 4


@pytest.mark.parametrize(
    ("model", "card", "tp", "slots"),
    [
        ("opt-13b", "a100-40gb", 1, 15_700),
        ("opt-66b", "a100-40gb", 4, 9_700),
        ("opt-175b", "a100-80gb", 8, 60_100),
    ],
)
def test_the_pool_is_as_large_as_in_the_pagedattention_paper(
    model: str, card: str, tp: int, slots: int
) -> None:
    """Table 1 of Kwon et al. 2023: most tokens that the cache can hold. The paper does not give its share of memory."""
    blocks = pool_blocks(
        find_model(model), find_hardware(card), tp=tp, block_size=16, gpu_memory_utilization=0.95
    )
    assert 16 * blocks == pytest.approx(slots, rel=0.02)


@given(
    tp=st.sampled_from([1, 2, 4, 8, 16]),
    block_size=st.integers(1, 512),
    share=st.floats(0.05, 1.0),
    card=st.sampled_from(sorted(HARDWARE)),
)
def test_a_pool_fits_and_would_not_fit_with_a_block_more(
    tp: int, block_size: int, share: float, card: str
) -> None:
    shape, hardware, reserved = find_model("qwen3-32b"), find_hardware(card), 10**9
    blocks = pool_blocks(shape, hardware, tp, block_size, share, reserved)
    per_card = shape.kv_bytes_per_token * block_size / min(tp, 8)  # 8 KV heads: beyond that, copies
    room = share * hardware.memory_bytes - reserved - shape.weight_bytes / tp
    assert blocks * per_card <= max(0.0, room) < (blocks + 1) * per_card


def test_a_model_that_does_not_fit_has_no_blocks() -> None:
    assert pool_blocks(find_model("opt-175b"), find_hardware("a100-80gb")) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tp": 3}, "3 accelerators"),
        ({"tp": 0}, "0 accelerators"),
        ({"block_size": 0}, "block_size"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
    ],
)
def test_pools_that_cannot_be(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pool_blocks(find_model("llama-3.1-8b"), find_hardware("h100"), **more)


# ---- hardware ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gib", "bandwidth", "teraflops"),
    [
        ("a100-40gb", 40, 1555e9, 312),
        ("a100-80gb", 80, 2039e9, 312),
        ("h100-sxm", 80, 3350e9, 989.4),
        ("h200", 141, 4800e9, 989.4),
        ("b200", 180, 8000e9, 2250),
        ("mi300x", 192, 5300e9, 1307.4),
        ("l4", 24, 300e9, 121),
        ("l40s", 48, 864e9, 362.05),
        ("rtx-4090", 24, 1008e9, 165.2),
        ("rtx-pro-6000", 96, 1792e9, 503.8),
    ],
)
def test_datasheets(name: str, gib: int, bandwidth: float, teraflops: float) -> None:
    """Dense, not with sparsity."""
    card = HARDWARE[name]
    assert (card.memory_bytes, card.bandwidth, card.flops) == (gib * 2**30, bandwidth, teraflops * 1e12)
    assert card.source
    assert card.interconnect >= card.host_link > 0


def test_all_hardware_is_checked_above() -> None:
    assert len(HARDWARE) == 10


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("LLaMA 3.1 8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("OPT_13B", "opt-13b"),
        ("facebook/opt-125m", "opt-125m"),
        ("llama13b", "llama-13b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("tiny", "tiny"),
    ],
)
def test_models_are_found_under_many_names(said: str, meant: str) -> None:
    assert find_model(said) is MODELS[meant]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("H100", "h100-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("a100", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("RTXPRO6000", "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Tesla L4", "l4"),
        ("l40s", "l40s"),
    ],
)
def test_hardware_is_found_under_many_names(said: str, meant: str) -> None:
    assert find_hardware(said) is HARDWARE[meant]


@pytest.mark.parametrize("name", [*MODELS, *(n.upper().replace("-", "_") for n in MODELS)])
def test_every_model_is_found_by_its_own_name(name: str) -> None:
    assert find_model(name).name == name.lower().replace("_", "-")


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3\.1-8b'") as caught:
        find_model("lama-3.1-8b")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'h200'"):
        find_hardware("h20")
    for bad in ("", "/", "instruct", "llama"):
        with pytest.raises(ConfigError, match="catalogue"):
            find_model(bad)


def test_what_is_added_is_found_and_replaced() -> None:
    try:
        mine = add_model(find_model("qwen3-8b").replace(name="Mine-8B", kv_heads=4))
        assert find_model("me/mine-8b-Instruct") is mine
        card = Hardware(
            name="my-card",
            memory_bytes=2**34,
            bandwidth=1e12,
            flops=1e14,
            interconnect=1e10,
            interconnect_share=0.5,
            host_link=1e10,
        )
        add_hardware(card)
        assert find_hardware("My Card") is card
    finally:
        MODELS.pop("Mine-8B", None)
        HARDWARE.pop("my-card", None)


# ---- configurations of the Hugging Face Hub ------------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], float, float]] = {
    # name: (config.json, parameters in billions as published, bytes of cache per token)
    "gpt2": (
        {
            "model_type": "gpt2",
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "n_inner": None,
        }
        | {"vocab_size": 50257},
        0.1244,
        36864,
    ),
    "opt-13b": (
        {"model_type": "opt", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}
        | {"ffn_dim": 20480, "max_position_embeddings": 2048, "vocab_size": 50272, "torch_dtype": "float16"}
        | {"word_embed_proj_dim": 5120},
        12.853,
        819200,
    ),
    "llama-3.1-8b": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16"}
        | {"tie_word_embeddings": False},
        8.03,
        131072,
    ),
    "gemma-2-2b": (
        {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8}
        | {"num_hidden_layers": 26, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000},
        2.614,
        106496,
    ),
    "falcon-7b": (
        {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71}
        | {"multi_query": True, "new_decoder_architecture": False, "vocab_size": 65024},
        6.92,
        8192,
    ),
    "gpt-neox-20b": (
        {"model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44}
        | {"num_attention_heads": 64, "vocab_size": 50432, "tie_word_embeddings": False},
        20.55,
        1081344,
    ),
    "qwen1.5-moe-a2.7b": (
        {"model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "vocab_size": 151936}
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "intermediate_size": 5632},
        14.3,
        196608,
    ),
    "deepseek-moe-16b": (
        {"model_type": "deepseek", "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16}
        | {
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "vocab_size": 102400,
        }
        | {"n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
        16.4,
        229376,
    ),
    "gpt-oss-20b": (
        {"model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4}
        | {"intermediate_size": 2880, "vocab_size": 201088, "quantization_config": {"quant_method": "mxfp4"}},
        20.9,
        49152,
    ),
    "llama-4-scout": (
        {
            "model_type": "llama4",
            "text_config": {"model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48}
            | {"num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 202048}
            | {"intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_local_experts": 16}
            | {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
        },
        107.77,
        196608,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_many_families_are_read(name: str) -> None:
    config, billions, kv_bytes = CONFIGS[name]
    shape = ModelShape.from_hf_config(config, name=name)
    assert shape.name == name
    assert shape.num_params == pytest.approx(billions * 1e9, rel=0.01)
    assert shape.kv_bytes_per_token == kv_bytes


def test_an_object_with_to_dict_and_a_nested_text_model_are_read_alike() -> None:
    inner = CONFIGS["llama-3.1-8b"][0]

    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {"model_type": "seeing", "text_config": dict(inner), "vision_config": {"hidden_size": 9}}

    assert ModelShape.from_hf_config(Config(), name="x") == ModelShape.from_hf_config(inner, name="x")
    with pytest.raises(ConfigError, match="to_dict"):
        ModelShape.from_hf_config(3)


def test_the_shipped_model_is_what_the_catalogue_says(tiny: Path) -> None:
    read = find_model(str(tiny))
    listed = find_model("tiny")
    assert read == listed.replace(source=read.source)
    assert find_model(str(tiny / "config.json")) == read


@pytest.mark.parametrize(
    ("quantised", "weight", "cache"),
    [
        ({"quant_method": "awq", "bits": 4}, 0.5, 2.0),
        ({"quant_method": "gptq", "bits": 8}, 1.0, 2.0),
        ({"quant_method": "fp8"}, 1.0, 2.0),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5, 2.0),
        ({"quant_method": "unheard-of"}, 2.0, 2.0),
    ],
)
def test_quantised_weights_leave_the_cache_as_it_is(
    quantised: dict[str, Any], weight: float, cache: float
) -> None:
    config = {**CONFIGS["llama-3.1-8b"][0], "quantization_config": quantised}
    shape = ModelShape.from_hf_config(config)
    assert (shape.bytes_per_param, shape.kv_bytes) == (weight, cache)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"mamba_d_state": 16}, "state-space"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": [8, 4]}, "num_key_value_heads"),
        ({"num_key_value_heads": 5}, "32 heads cannot share 5"),
        ({"torch_dtype": "float3"}, "float3"),
        ({"word_embed_proj_dim": 512}, "narrower"),
        ({"num_experts": 8}, "num_experts_per_tok"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "from 1 to 8"),
        ({"vocab_size": 0}, "vocab"),
    ],
)
def test_what_a_shape_does_not_describe_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    config = {**CONFIGS["llama-3.1-8b"][0], **change}
    with pytest.raises(ConfigError, match=words) as caught:
        ModelShape.from_hf_config(config, name="this-model")
    assert "this-model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_are_models_and_broken_ones_say_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt2"][0]))
    assert find_model(str(tmp_path)).heads == 12
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json: not a model's configuration"):
            find_model(str(tmp_path))


@given(tokens=st.integers(0, 5000))
def test_coverage_grows_to_all_experts(tokens: int) -> None:
    shape = find_model("qwen3-30b-a3b")
    here, after = shape.coverage(tokens), shape.coverage(tokens + 1)
    assert 0.0 <= here <= after <= 1.0
    assert shape.coverage(1) == pytest.approx(8 / 128)
    assert here * 128 <= 8 * tokens + 1e-9, "no more experts than were chosen"
