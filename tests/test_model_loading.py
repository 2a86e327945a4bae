"""What is loaded, and what is refused: by name, in one line, without running or unpickling anything."""

import json
import pickle

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from pagedlab.errors import ConfigError, ModelNotServed
from pagedlab.executors.loading import load_model
from pagedlab.executors.probe import paged_attention

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def small(name="Llama", **override):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**{**TINY, **override}))


def refusal(source, error=ModelNotServed, **options):
    with pytest.raises(error) as caught:
        load_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def test_folder_round_trip(tmp_path):
    model = small(eos_token_id=[3, 5])
    model.generation_config.eos_token_id = [3, 5]
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.dtype == torch.float32
    assert loaded.max_model_len == 128
    assert loaded.eos_token_ids == {3, 5}
    assert loaded.tokenizer is None
    assert loaded.probe_error < 1e-5
    assert len(loaded.layers) == 2
    assert loaded.kv_bytes_per_token == 2 * 2 * 4 * 8 * 4
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)
    tokenizer().save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    assert again.tokenizer("one two")["input_ids"] == [1, 2]


def test_saved_dtype_is_kept(tmp_path):
    small().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_executor_speaks_text(tmp_path):
    from pagedlab.executors.model import ModelExecutor
    from pagedlab.registry import make

    small().save_pretrained(tmp_path)
    parts = {"layout": make("layout", "padded"), "kernel": make("kernel", "auto")}
    mute = ModelExecutor(tmp_path, **parts)
    assert mute.detokenize([1, 2]) is None
    with pytest.raises(ConfigError, match="no tokenizer"):
        mute.tokenize("one")
    executor = ModelExecutor(tmp_path, tokenizer=tokenizer(), **parts)
    assert executor.tokenize("two one") == [2, 1]
    assert executor.detokenize([2, 1]) == "two one"


def test_missing_folder(tmp_path):
    assert "no model folder" in refusal(tmp_path / "nothing", ConfigError)
    assert "no model folder" in refusal("./nothing/here", ConfigError)
    assert "config.json" in refusal(tmp_path, ConfigError)
    assert "no model folder" in refusal("", ConfigError)


def test_unknown_hub_name(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "no-such-org/no-such-model" in refusal("no-such-org/no-such-model", ConfigError)


def test_bad_config(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in refusal(tmp_path, ConfigError)
    (tmp_path / "config.json").write_text("[]")
    assert "object" in refusal(tmp_path, ConfigError)
    (tmp_path / "config.json").write_text("{}")
    assert "model_type" in refusal(tmp_path, ConfigError)
    (tmp_path / "config.json").write_text('{"model_type": "llamma"}')
    assert "llamma" in refusal(tmp_path)
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    assert "\n" not in refusal(tmp_path, (ConfigError, ModelNotServed))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_pickled_weights_are_not_read(tmp_path):
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    assert "no weights" in refusal(tmp_path, ConfigError)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "pickled" in refusal(tmp_path)


def test_remote_code_is_not_run(tmp_path):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "homemade"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    assert "code of its own" in refusal(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    small().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weight" in refusal(tmp_path)


def test_dtype_is_checked():
    assert "float32, bfloat16, float16, float64" in refusal(small(), ConfigError, dtype="float8")


REFUSED = {
    "T5": (
        "encoder-decoder",
        {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
    ),
    "Mamba": ("recurrent", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}),
    "Falcon": (
        "attention interface",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64},
    ),
    "Bloom": ("attention interface", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}),
    "Mpt": ("attention interface", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64}),
    "GPTJ": (
        "attention interface",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 64},
    ),
    "Lfm2": ("conv", {**TINY, "layer_types": ["conv", "full_attention"]}),
    "StableLm": ("pass arguments on", {**TINY, "num_key_value_heads": 4}),
    "Bert": ("", {**TINY, "is_decoder": False}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(name):
    reason, settings = REFUSED[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    maker = transformers.AutoModelForSeq2SeqLM if name == "T5" else AutoModelForCausalLM
    model = maker.from_config(config)
    before = model.config._attn_implementation
    message = refusal(model)
    assert reason in message
    assert config.model_type in message.lower() or name.lower() in message.lower()
    assert model.config._attn_implementation == before


def test_what_attention_is_asked_for_besides_is_refused_by_name():
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ModelNotServed, match="Linear asks its attention for 'position_bias'"):
        paged_attention(torch.nn.Linear(1, 1), x, x, x, None, paged=object(), position_bias=torch.ones(3, 3))


def test_a_base_model_has_no_head(tmp_path):
    model = transformers.AutoModel.from_config(LlamaConfig(**TINY))
    assert "head" in refusal(model)
    model.save_pretrained(tmp_path)
    assert "lacks" in refusal(tmp_path)


def test_longest_sequence():
    assert load_model(small("OPT", ffn_dim=32, word_embed_proj_dim=32)).max_model_len == 128
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=77, vocab_size=64)
    assert load_model(AutoModelForCausalLM.from_config(gpt2)).max_model_len == 77
    # Beyond the original length these angles depend on the longest sequence of the batch.
    rope = {
        "rope_type": "dynamic",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }
    assert load_model(small(rope_parameters=rope)).max_model_len == 32
