#!/usr/bin/env python3
"""Train `tiny`, the language model that ships inside pagedlab.

Why it exists: an experiment about the KV cache needs a model that really attends, so that dropping or
compressing keys and values really costs something, and it has to load in an instant and need no
download. `tiny` is a Llama of about two million parameters (grouped-query attention, tied embeddings)
with a byte-level BPE tokenizer, both trained from scratch on the source code of Python's own standard
library (licence: PSF-2.0).

What it does, in order:

1. collects the standard library's `*.py` files, leaves out tables that are data rather than code, and
   holds out about 3 % of the files by a hash of their relative path;
2. trains the tokenizer on the training files;
3. trains the model until `--minutes` or `--steps` is reached, whichever comes first. The learning rate
   follows that same clock, so a run that has less time still ends on a finished cosine. The last fifth
   of the run uses longer sequences, so that the whole context window is usable;
4. measures bits per byte on the held-out files, with gzip and xz for comparison, and writes the model,
   the tokenizer, `training.json` and the model card into `--out`.

The saved model is refreshed every few minutes, and an interrupt (Ctrl-C) ends the training early but
still performs step 4. `--measure-only` performs step 4 alone on a model saved earlier.

    python scripts/train_tiny.py --minutes 28

The seed fixes the initial weights, the order of the documents and the places where they are cut. A run
that ends by `--steps` is repeatable on the same machine and library versions; one that ends by
`--minutes` depends on how fast the machine was.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import math
import platform
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "pagedlab" / "models" / "tiny"
EOS = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 2048
TOKENS_PER_STEP = 4096
# (share of the run at which the stage starts, sequence length)
STAGES = ((0.0, 512), (0.70, 1024), (0.92, 2048))
PEAK_LR, FINAL_LR, WARMUP_STEPS = 3e-3, 3e-5, 100
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
CHECKPOINT_SECONDS = 300.0
FLOAT32_LIMIT = 9_500_000

# Text the project wrote itself, in no training set: its bits per byte are recorded in training.json, so
# that anyone can check that the weights they hold are the ones that were measured.
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

SAMPLE_PROMPTS: tuple[tuple[str, float], ...] = (
    ("def ", 0.0),
    ("import os\nclass ", 0.7),
)


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library, and its text."""

    name: str
    text: str


# --------------------------------------------------------------------------------------------- data


def is_table(name: str, text: str) -> bool:
    """Tell data that happens to be stored as Python (code pages, entities, build variables) from code."""
    if name.startswith(("encodings/", "pydoc_data/", "config-")) or "_sysconfigdata" in name:
        return True
    wordy = sum(c.isalpha() or c.isspace() for c in text)
    return len(text) > 4000 and wordy / len(text) < 0.70


def is_held_out(name: str) -> bool:
    """Hold out about 3 % of the files, by name alone, so that the split never depends on the run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 1000 < 30


def load_documents() -> tuple[list[Document], list[Document]]:
    """Return the training and the held-out files of the running Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[Document] = []
    held_out: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few tests of source encodings
        name = relative.as_posix()
        if not text.strip() or is_table(name, text):
            continue
        (held_out if is_held_out(name) else train).append(Document(name, text))
    return train, held_out


def size_in_bytes(documents: list[Document]) -> int:
    """Return the total size of the documents' texts in bytes of UTF-8."""
    return sum(len(d.text.encode()) for d in documents)


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: all 256 bytes are in the alphabet, so every text round-trips exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in documents), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.add_bos_token = True  # every document began with it
    return tokenizer


def random_pieces(text: str, rng: random.Random, mean: float = 400.0) -> Iterator[str]:
    """Cut a text at random characters.

    A prompt may end anywhere, also inside what the tokenizer would make one token ("def " ends on the
    space that normally belongs to the next word). Tokenizing the pieces one by one shows the model such
    seams, at the cost of well under one per cent more tokens.
    """
    start = 0
    while start < len(text):
        end = start + 1 + int(rng.expovariate(1.0 / mean))
        yield text[start:end]
        start = end


class TokenStream:
    """An endless stream of training tokens: shuffled documents, each followed by the eos token."""

    def __init__(self, documents: list[Document], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._documents = list(documents)
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)

    def _epoch(self) -> torch.Tensor:
        self._rng.shuffle(self._documents)
        ids: list[int] = []
        for first in range(0, len(self._documents), 256):
            pieces: list[str] = []
            for document in self._documents[first : first + 256]:
                pieces.extend(random_pieces(document.text, self._rng))
                pieces.append(EOS)
            encoded = self._tokenizer.backend_tokenizer.encode_batch(pieces, add_special_tokens=False)
            ids.extend(i for e in encoded for i in e.ids)
        return torch.tensor(ids, dtype=torch.long)

    def rows(self, length: int) -> Iterator[torch.Tensor]:
        """Yield rows of `length + 1` tokens (inputs and targets overlap by all but one).

        The rows of a whole epoch are shuffled together. Shuffling within a few hundred documents at a
        time is not enough: the model then drifts towards whichever documents it is reading.
        """
        while True:
            tokens = self._epoch()
            count = tokens.numel() // (length + 1)
            block = tokens[: count * (length + 1)].view(count, length + 1)
            order = list(range(count))
            self._rng.shuffle(order)
            for index in order:
                yield block[index]


# ----------------------------------------------------------------------------------------- training


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # it is the eos token, and an embedding named as padding gets no gradient
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up by steps, then a cosine over the share of the run that has passed."""
    cosine = FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return cosine * min(1.0, (step + 1) / WARMUP_STEPS)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights, configuration and tokenizer, in float32 if that is small enough."""
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    dtype = torch.float32 if 4 * model.num_parameters() <= FLOAT32_LIMIT else torch.bfloat16
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(state)
    copy.to(dtype)
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[Document],
    *,
    steps: int,
    minutes: float,
    seed: int,
    out: Path,
    compiled: bool,
) -> dict[str, Any]:
    """Train in place until the step or time budget is used up; return what was done."""
    # Muon for the matrices inside the layers (it learns more from each token), AdamW for embeddings and norms.
    hidden = [p for p in model.model.layers.parameters() if p.dim() == 2]
    inside = {id(p) for p in hidden}
    tables = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in inside]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizers = [
        torch.optim.Muon(hidden, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
            lr=PEAK_LR,
            betas=BETAS,
            fused=True,
        ),
    ]

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    stream = TokenStream(documents, tokenizer, seed)
    model.train()
    started = saved = reported = time.perf_counter()
    step = tokens = 0
    length = 0
    rows: Iterator[torch.Tensor] = iter(())
    smoothed: float | None = None
    try:
        while True:
            now = time.perf_counter()
            progress = max(step / steps, (now - started) / (60.0 * minutes))
            if progress >= 1.0:
                break
            wanted = max(size for share, size in STAGES if progress >= share)
            if wanted != length:
                length, rows = wanted, stream.rows(wanted)
            batch = torch.stack([next(rows) for _ in range(TOKENS_PER_STEP // length)])
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = learning_rate(step, progress)
            loss = step_loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            tokens += TOKENS_PER_STEP
            value = loss.item()
            smoothed = value if smoothed is None else 0.98 * smoothed + 0.02 * value
            if now - reported > 20.0:
                reported = now
                rate = tokens / (now - started)
                print(
                    f"step {step:6d}  {100 * progress:5.1f} %  length {length:4d}  "
                    f"loss {smoothed:.3f}  {rate:,.0f} tokens/s",
                    flush=True,
                )
            if now - saved > CHECKPOINT_SECONDS:
                saved = now
                save(model, tokenizer, out)
    except KeyboardInterrupt:
        print("interrupted: keeping what has been learnt so far", flush=True)
    seconds = time.perf_counter() - started
    model.eval()
    save(model, tokenizer, out)
    return {
        "steps": step,
        "tokens_seen": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "tokens_per_step": TOKENS_PER_STEP,
        "stages": [{"from_share": share, "sequence_length": size} for share, size in STAGES],
        "peak_learning_rate": PEAK_LR,
        "seed": seed,
        "hardware": f"{torch.get_num_threads()} threads of a shared {platform.machine()} CPU, no GPU",
        "precision": "float32 weights, bfloat16 autocast" + (", torch.compile" if compiled else ""),
    }


# ---------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def negative_log_likelihoods(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, window: int, stride: int
) -> torch.Tensor:
    """Return the nats of every token of `text` and of the eos token after it, the text preceded by eos.

    Windows overlap by `window - stride` tokens, so every token but the first ones has that much context.
    """
    eos = tokenizer.eos_token_id
    ids = [eos, *tokenizer(text, add_special_tokens=False)["input_ids"], eos]
    out: list[torch.Tensor] = []
    scored = 1  # ids[0] is given
    while scored < len(ids):
        end = min(window if scored == 1 else scored + stride, len(ids))
        begin = max(0, end - window)
        piece = torch.tensor(ids[begin:end])
        logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0].float()
        losses = cross_entropy(logits, piece[1:], reduction="none")
        out.append(losses[scored - begin - 1 :])
        scored = end
    return torch.cat(out)


def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Return the bits the model needs per byte of UTF-8, every text being a document of its own."""
    nats = sum(
        float(negative_log_likelihoods(model, tokenizer, t, window=1024, stride=512).double().sum())
        for t in texts
    )
    return nats / math.log(2.0) / sum(len(t.encode()) for t in texts)


@torch.inference_mode()
def nats_by_position(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> dict[str, float]:
    """Return the mean nats per token by position in the window: does more context keep helping?"""
    sums = {(0, 256): 0.0, (256, 512): 0.0, (512, 1024): 0.0, (1024, 1536): 0.0, (1536, 2047): 0.0}
    count = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for begin in range(0, len(ids) - CONTEXT, CONTEXT):
            piece = torch.tensor(ids[begin : begin + CONTEXT])
            logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0].float()
            losses = cross_entropy(logits, piece[1:], reduction="none")
            for low, high in sums:
                sums[low, high] += float(losses[low:high].mean())
            count += 1
    return {f"{low}-{high}": round(total / max(count, 1), 4) for (low, high), total in sums.items()}


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    temperature: float,
    seed: int = 0,
    new_tokens: int = 160,
) -> str:
    """Continue `prompt` as the start of a document; temperature 0 is greedy."""
    torch.manual_seed(seed)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    choice: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **choice)
    return str(tokenizer.decode(out[0, 1:], skip_special_tokens=True))


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_set: list[Document],
    held_out: list[Document],
) -> dict[str, Any]:
    """Measure the model and its references on the held-out files."""
    texts = [d.text for d in held_out]
    joined = "".join(texts).encode()
    known = "".join(d.text for d in train_set).encode()
    # A dictionary larger than everything, so that xz can also refer back to the training files.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26}]
    alone, together = (len(lzma.compress(data, filters=filters)) for data in (known, known + joined))
    tokens = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)
    return {
        "held_out_bits_per_byte": round(bits_per_byte(model, tokenizer, texts), 4),
        "reference_bits_per_byte": {
            "gzip -9": round(8 * len(gzip.compress(joined, 9)) / len(joined), 4),
            "xz -9e": round(8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / len(joined), 4),
            "xz, primed with the training files": round(8 * (together - alone) / len(joined), 4),
        },
        "held_out_bytes_per_token": round(len(joined) / tokens, 3),
        "held_out_nats_per_token_by_position": nats_by_position(model, tokenizer, texts),
        "probe_bits_per_byte": round(bits_per_byte(model, tokenizer, [PROBE_TEXT]), 4),
    }


def describe(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_set: list[Document],
    held_out: list[Document],
) -> dict[str, Any]:
    """Describe the data and the architecture."""
    config = model.config
    return {
        "data": {
            "source": f"standard library of CPython {platform.python_version()}",
            "licence": "PSF-2.0",
            "train_files": len(train_set),
            "train_bytes": size_in_bytes(train_set),
            "held_out_files": len(held_out),
            "held_out_bytes": size_in_bytes(held_out),
        },
        "architecture": {
            "class": "LlamaForCausalLM",
            "parameters": model.num_parameters(),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "query_heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "context": config.max_position_embeddings,
            "vocabulary": len(tokenizer),
        },
    }


# ------------------------------------------------------------------------------------------- output


def model_card(record: dict[str, Any]) -> str:
    """Write the model card from the recorded figures."""
    data, arch, run, held = (record[k] for k in ("data", "architecture", "training", "measured"))
    references = "\n".join(f"| {name} | {v:.3f} |" for name, v in held["reference_bits_per_byte"].items())
    positions = "\n".join(
        f"| {span} | {v:.3f} |" for span, v in held["held_out_nats_per_token_by_position"].items()
    )
    samples = "\n\n".join(
        f"Prompt `{s['prompt']!r}`, "
        + ("greedy" if s["temperature"] == 0 else f"temperature {s['temperature']}")
        + f":\n\n~~~python\n{s['text'].rstrip()}\n~~~"
        for s in record["samples"]
    )
    stages = ", ".join(
        f"{s['sequence_length']} tokens from {100 * s['from_share']:.0f} % of the run" for s in run["stages"]
    )
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
held_out_bits_per_byte: {held["held_out_bits_per_byte"]}
parameters: {arch["parameters"]}
tokens_seen: {run["tokens_seen"]}
---

# tiny

A very small language model of Python source code, for experiments on the KV cache that must run
anywhere at once: it attends over its context the way large models do, loads without a download and
decodes on a laptop CPU. It is not a coding assistant. All figures on this page are written by
`scripts/train_tiny.py`; `training.json` holds the same figures for programs.

## Data

The `.py` files of the {data["source"]}, tests included. Licence:
[{data["licence"]}](https://docs.python.org/3/license.html), copyright Python Software Foundation.

| | files | bytes |
|---|---:|---:|
| training | {data["train_files"]:,} | {data["train_bytes"]:,} |
| held out | {data["held_out_files"]:,} | {data["held_out_bytes"]:,} |

Left out: installed packages, files that are not UTF-8, and tables that are data rather than code
(`encodings/`, `pydoc_data/`, build variables, and files over 4,000 characters of which less than
70 % are letters or white space). The held-out files are chosen by a hash of their relative path
alone. Files resemble one another (tests of sibling modules, for example), so the held-out figure
describes text of this kind and no other.

## Tokenizer

Byte-level BPE with a vocabulary of {arch["vocabulary"]:,}, trained on the training files. All 256 bytes are
in the alphabet: there is no unknown token, and every text decodes to exactly itself. The one special
token, `{EOS}`, is at once beginning, end and padding. Every document ends with it, and
generation stops there. The tokenizer puts it in front of a text. On the held-out files a token is
{held["held_out_bytes_per_token"]} bytes.

## Architecture

| | |
|---|---|
| class | `{arch["class"]}` |
| parameters | {arch["parameters"]:,} |
| layers | {arch["layers"]} |
| hidden size | {arch["hidden_size"]} |
| query heads | {arch["query_heads"]} |
| key/value heads | {arch["kv_heads"]} |
| head dimension | {arch["head_dim"]} |
| intermediate size | {arch["intermediate_size"]} |
| embeddings | tied |
| positions | rotary, up to {arch["context"]:,} |

## Training

| | |
|---|---|
| steps | {run["steps"]:,} of {run["tokens_per_step"]:,} tokens |
| tokens seen | {run["tokens_seen"]:,} |
| time | {run["seconds"] / 60:.1f} minutes, {run["tokens_per_second"]:,} tokens/s |
| hardware | {run["hardware"]} |
| precision | {run["precision"]} |
| optimizer | Muon for the layers' matrices, AdamW for the rest, gradient clipping, seed {run["seed"]} |
| learning rate | warm-up to {run["peak_learning_rate"]}, then cosine |
| sequence length | {stages} |

Documents are cut at random characters before they are tokenized, so that a prompt may end anywhere.

## Held-out bits per byte

| | bits per byte |
|---|---:|
| **tiny** | **{held["held_out_bits_per_byte"]:.3f}** |
{references}

The compressors see the held-out files as one text; tiny sees every file on its own, and has 512 to
1,024 tokens of context once that many have passed. Mean loss by position in a window of
{arch["context"]:,} tokens:

| position | nats per token |
|---|---:|
{positions}

The text `PROBE_TEXT` in the script, in no training set, costs {held["probe_bits_per_byte"]} bits per byte.
Measure it to check that the weights are these ones.

## Samples

Each continues the prompt as the start of a document.

{samples}

## Retrain

    python scripts/train_tiny.py --minutes 28

The data are the standard library of the Python that runs the script, so another Python version
gives another model.

## Limits

It writes text with the shape of the standard library: indentation, docstrings, `self`, test methods.
It does not know what a program does; names appear from nowhere, greedy decoding falls into loops, and
nothing it writes should be run. It knows no natural language beyond English comments. Losses on it show
how a cache policy changes what a small model predicts, not how much a large model would lose.
"""


def finish(
    out: Path, train_set: list[Document], held_out: list[Document], training: dict[str, Any]
) -> dict[str, Any]:
    """Load what was saved, measure it, and write `training.json` and the model card."""
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    record = describe(model, tokenizer, train_set, held_out)
    record["training"] = training
    record["measured"] = measure(model, tokenizer, train_set, held_out)
    record["samples"] = [
        {"prompt": p, "temperature": t, "text": sample(model, tokenizer, p, temperature=t)}
        for p, t in SAMPLE_PROMPTS
    ]
    write_record(out, record)
    (out / "README.md").write_text(model_card(record), encoding="utf-8")
    return record


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write `training.json`."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (out / "training.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Run the whole script."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--steps", type=int, default=20_000, help="stop after so many steps")
    parser.add_argument("--minutes", type=float, default=28.0, help="stop after so many minutes of training")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the saved model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--measure-only", action="store_true", help="measure the model already in --out")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_set, held_out = load_documents()
    print(
        f"{len(train_set)} files, {size_in_bytes(train_set):,} bytes to train on; "
        f"{len(held_out)} files, {size_in_bytes(held_out):,} bytes held out",
        flush=True,
    )
    if args.measure_only:
        training = json.loads((args.out / "training.json").read_text(encoding="utf-8"))["training"]
    else:
        tokenizer = train_tokenizer(train_set)
        model = new_model(tokenizer)
        print(f"{model.num_parameters():,} parameters", flush=True)
        training = train(
            model,
            tokenizer,
            train_set,
            steps=args.steps,
            minutes=args.minutes,
            seed=args.seed,
            out=args.out,
            compiled=not args.no_compile,
        )
        write_record(args.out, {"training": training})
    record = finish(args.out, train_set, held_out, training)
    print(json.dumps(record["measured"], indent=2), flush=True)


if __name__ == "__main__":
    main()
