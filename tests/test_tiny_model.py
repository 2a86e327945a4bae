"""The embedded model: what ships, what it promises, and that its weights are the ones that were measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).resolve().parent.parent / "pagedlab" / "models" / "tiny"
EOS = "<|endoftext|>"

# The same text as PROBE_TEXT in scripts/train_tiny.py. It is in no training set, so its cost does not
# depend on the Python that runs the test.
PROBE_TEXT = '''\
class Window:
    """Keep the newest items of a stream, up to a limit."""

    def __init__(self, limit=16):
        if limit < 1:
            raise ValueError("limit must be at least 1")
        self.limit = limit
        self.items = []

    def push(self, item):
        """Add one item and return the one that had to leave, or None."""
        self.items.append(item)
        if len(self.items) > self.limit:
            return self.items.pop(0)
        return None

    def __len__(self):
        return len(self.items)

    def __repr__(self):
        return "%s(limit=%r)" % (self.__class__.__name__, self.limit)


def running_mean(values, limit=16):
    window = Window(limit)
    for value in values:
        window.push(value)
        yield sum(window.items) / len(window)
'''


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((MODEL / "training.json").read_text(encoding="utf-8"))


def with_start(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer(text)["input_ids"]])


@torch.inference_mode()
def bits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1]).logits[0].double()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") / math.log(2.0)


def greedy(model: Any, tokenizer: Any, text: str, new_tokens: int) -> str:
    ids = with_start(tokenizer, text)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


def test_ships_small_and_without_pickle() -> None:
    files = [p for p in MODEL.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}
    assert sum(p.stat().st_size for p in files) <= 10_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in files
    }


def test_is_a_small_llama_with_grouped_queries(model: Any, record: dict[str, Any]) -> None:
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert model.num_parameters() == record["architecture"]["parameters"]
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.max_position_embeddings == 2048
    assert config.tie_word_embeddings


def test_card_gives_the_recorded_figures(record: dict[str, Any]) -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    measured = record["measured"]
    assert f"held_out_bits_per_byte: {measured['held_out_bits_per_byte']}" in card
    assert f"tokens_seen: {record['training']['tokens_seen']}" in card
    assert record["data"]["licence"] in card


def test_beats_general_compressors_on_the_held_out_files(record: dict[str, Any]) -> None:
    measured = record["measured"]
    assert measured["held_out_bits_per_byte"] < min(measured["reference_bits_per_byte"].values())


def test_ends_with_eos(model: Any, tokenizer: Any) -> None:
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == EOS
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    # The usual last lines of a test module: the end of the document is far likelier there than elsewhere.
    ids = with_start(tokenizer, PROBE_TEXT + '\n\nif __name__ == "__main__":\n    unittest.main()\n')
    with torch.inference_mode():
        chance = model(input_ids=ids).logits[0].softmax(-1)[:, tokenizer.eos_token_id]
    assert chance[-1] > 0.5
    assert chance[:-1].mean() < 0.01


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\t\tx\r\n\r\n  y \n",
        "don ' t , do . this !",
        "<script>alert('&amp; \"x\"')</script>",
        "naïve café 日本語 Ω≈ç",
        "👩‍👩‍👧‍👦 🏳️‍🌈 \u200b\u202e\ufeff",
        "e\u0301 is not \u00e9",
        "\x00\x01\x7f\U0010ffff",
        f"a{EOS}b {EOS} c",
        PROBE_TEXT,
    ],
)
def test_decoding_undoes_encoding(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@settings(deadline=None)
@given(text=st.text())
def test_decoding_undoes_encoding_of_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_tokenizer_adds_nothing_by_itself(tokenizer: Any) -> None:
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    assert tokenizer.eos_token_id not in tokenizer("x = 1\n")["input_ids"][1:]


def test_weights_are_the_measured_ones(model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    ids = with_start(tokenizer, PROBE_TEXT + EOS)  # the record counts the end of the document too
    measured = float(bits(model, ids).sum()) / len(PROBE_TEXT.encode())
    assert measured == pytest.approx(record["measured"]["probe_bits_per_byte"], rel=0.02)


def test_continues_python(model: Any, tokenizer: Any) -> None:
    text = "def " + greedy(model, tokenizer, "def ", 64)
    first = text.splitlines()[0]
    assert first[4:].strip()[0].isidentifier()
    assert "(" in first
    assert first.rstrip().endswith(":")
    written = text + "".join(
        greedy(model, tokenizer, p, 64) for p in ("class ", "    def test_", "import os\n")
    )
    assert sum(word in written for word in ("self", "return", "import", "class", "assert", '"""')) >= 3


def test_uses_what_it_read_long_ago(model: Any, tokenizer: Any) -> None:
    """Attention must matter: the same text costs less when it was read before, also past position 1,000."""
    once = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    repeats = 1500 // len(once)
    assert repeats >= 3
    costs = bits(model, torch.tensor([[tokenizer.bos_token_id, *once * repeats]]))
    first, last = costs[: len(once)], costs[-len(once) :]
    assert float(last.mean()) < 0.75 * float(first.mean())  # measured: 0.67
