"""The model executor says what `generate` says, whatever blocks, chunks and company a sequence has.

The reference is transformers' own `generate`, eager attention in float64, the softmax included. Where the two largest
logits lie within `NEAR_TIE` of each other either token counts as right, and more than 0.1% of such positions fail.
"""

import copy
import random
import re
import warnings
from collections import deque

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import pagedlab as pl
from pagedlab.engine.orders import DEVICE, DISK, HOST, Move, SequenceStep, StepOrders
from pagedlab.engine.request import SamplingParams
from pagedlab.errors import ConfigError, InvariantBroken, ModelNotServed
from pagedlab.executors.model import ModelExecutor
from pagedlab.executors.products import Panels, panels_work
from pagedlab.kernels.base import options_of
from pagedlab.kernels.dense import dense_attention
from pagedlab.kernels.layouts import device_functions
from pagedlab.policies.kernel import OPTIONS, Kernel
from pagedlab.registry import make, policy_names

VOCAB = 128
NEAR_TIE = 1e-9
BLOCK = 4


def eager64(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
    """Eager attention by the book, all in the dtype of its inputs (transformers' own rounds the softmax to float32)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("eager64", eager64)
AttentionMaskInterface.register("eager64", eager_mask)

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SAME_HEADS = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.3,
}
MOE = {"num_experts_per_tok": 2}
SMALL_HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9}
CONFIGS = {
    "Llama": COMMON,
    "Qwen2": COMMON,
    "Qwen3": {**COMMON, "head_dim": 16},
    "Mistral": {**COMMON, "sliding_window": 9},
    "Gemma2": {**COMMON, **SMALL_HEADS, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "Gemma3Text": {**COMMON, **SMALL_HEADS},
    "Phi3": COMMON,
    "GPT2": {**GPT2, "bos_token_id": None, "eos_token_id": None},
    "OPT": {
        **{k: v for k, v in SAME_HEADS.items() if k not in ("intermediate_size", "initializer_range")},
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
        "init_std": 0.3,
    },
    "GPTNeoX": SAME_HEADS,
    "Olmo2": COMMON,
    "Granite": COMMON,
    "Cohere": COMMON,
    "Starcoder2": COMMON,
    "Mixtral": {**COMMON, **MOE, "num_local_experts": 4, "sliding_window": None},
    "Qwen3Moe": {**COMMON, **MOE, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "GptOss": {**COMMON, **MOE, "num_local_experts": 4, "head_dim": 16, "sliding_window": 9},
}


def build(name, dtype=torch.float64, seed=0, **override):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**CONFIGS[name], **override})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def executor_for(model, *, layout="padded", kernel="auto", **options):
    return ModelExecutor(
        model, layout=make("layout", layout), kernel=make("kernel", kernel), poison=True, **options
    )


def prompts(seed=1, lengths=(3, 21, 40, 9, 1)):
    rng = random.Random(seed)
    return [[rng.randrange(1, VOCAB) for _ in range(n)] for n in lengths]


def serve(executor, prompts, num_tokens, *, seed=0, chunk=7, num_blocks=160, sampling=None, fault=None):
    """Prompts in chunks, decoding sequences in between, blocks handed out at random; returns the outputs."""
    rng = random.Random(seed)
    executor.prepare(num_blocks=num_blocks, block_size=BLOCK, host_blocks=0, max_num_seqs=len(prompts))
    free = rng.sample(range(num_blocks), num_blocks)
    seqs = [
        {"id": i, "tokens": list(p), "done": 0, "table": [], "left": num_tokens}
        for i, p in enumerate(prompts)
    ]
    ended, step = [], 0
    while live := [s for s in seqs if s["left"]]:
        chosen = [s for s in live if rng.random() < 0.8] or live[:1]
        rng.shuffle(chosen)
        batch = []
        for s in chosen:
            todo = len(s["tokens"]) - s["done"]
            take = min(todo, rng.randint(1, chunk))
            while len(s["table"]) * BLOCK < s["done"] + take:
                s["table"].append(free.pop())
            batch.append(
                SequenceStep(
                    seq_id=s["id"],
                    tokens=s["tokens"][s["done"] : s["done"] + take],
                    start=s["done"],
                    table=s["table"],
                    table_version=0,
                    num_samples=int(take == todo),
                    sample_index=0,
                    sampling=sampling or SamplingParams(),
                    history=s["tokens"][: s["done"] + take],
                )
            )
        orders = StepOrders(step, deque(), batch, ended)
        if fault is not None:
            fault(executor, orders)
        result = executor.execute(orders)
        assert result.failures == {}
        step, ended = step + 1, []
        for s, order, sampled in zip(chosen, batch, result.samples, strict=True):
            s["done"] += len(order.tokens)
            assert len(sampled) == order.num_samples
            s["tokens"] += sampled
            s["left"] -= len(sampled)
            if not s["left"]:
                ended.append(s["id"])
                free += s["table"]
                rng.shuffle(free)
    return [s["tokens"][len(p) :] for s, p in zip(seqs, prompts, strict=True)]


@torch.no_grad()
def generated(model, prompts, num_tokens):
    """Tokens of `generate`, and for each the gap between the two largest logits."""
    model.set_attn_implementation("eager64")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    outputs = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        gaps = [float(-row[0].topk(2).values.diff()) for row in out.logits]
        outputs.append((out.sequences[0, len(prompt) :].tolist(), gaps))
    return outputs


def assert_says_the_same(outputs, reference):
    near = 0
    for ours, (theirs, gaps) in zip(outputs, reference, strict=True):
        for mine, other, gap in zip(ours, theirs, gaps, strict=True):
            if mine != other:
                assert gap < NEAR_TIE, f"{mine} where generate says {other} by {gap:.3g}"
                near += 1
                break  # From here on the two go on from different texts.
    if near:
        warnings.warn(f"{near} near ties", stacklevel=2)
    assert near <= 0.001 * sum(map(len, outputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_what_generate_says(name):
    model = build(name)
    reference = generated(copy.deepcopy(model), prompts(), 20)
    said = {token for tokens, _ in reference for token in tokens}
    assert len(said) > 3, "a reference that repeats one token shows nothing"
    assert_says_the_same(serve(executor_for(model), prompts(), 20), reference)


@pytest.mark.parametrize("layout", policy_names("layout"))
@pytest.mark.parametrize("kernel", ["dense", "gather-sdpa", "cpu-paged"])
def test_every_kernel_and_layout_says_the_same(layout, kernel):
    model = build("Gemma2" if kernel == "cpu-paged" else "Mistral")
    reference = generated(copy.deepcopy(model), prompts(2), 12)
    outputs = serve(executor_for(model, layout=layout, kernel=kernel), prompts(2), 12, seed=3)
    assert_says_the_same(outputs, reference)


def logits_of(executor, prompts):
    """Logits of every prompt's last token, all prompts in one step."""
    executor.prepare(num_blocks=400, block_size=BLOCK, host_blocks=0, max_num_seqs=len(prompts))
    free = list(range(400))
    batch = [
        SequenceStep(i, p, 0, [free.pop() for _ in range(-(-len(p) // BLOCK))], 0, 1, 0, SamplingParams(), p)
        for i, p in enumerate(prompts)
    ]
    rows = executor._rows.sync(StepOrders(0, deque(), batch))
    return executor._forward(batch, rows)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_fast_path_agrees_with_plain_path(name, dtype):
    model = build(name, dtype)
    many = prompts(lengths=(3, 21, 40, 9, 1, 17, 5, 30, 12, 2, 26, 8) * 2)
    plain = logits_of(executor_for(copy.deepcopy(model), fast=False), many)
    executor = executor_for(model)
    assert not any(note.startswith("plain") for note in executor.fast_path.notes), executor.fast_path.notes
    fast = logits_of(executor, many)
    exact = logits_of(executor_for(copy.deepcopy(executor.release()).double()), many)
    errors = [(x.double() - exact).norm(dim=-1) / exact.norm(dim=-1) for x in (plain, fast)]
    # Not further from the truth than the plain path is, but for the luck of rounding. The median of many prompts, as
    # one may have an expert that rounding chooses otherwise.
    assert errors[1].median() <= 1.5 * errors[0].median() + (1e-6 if dtype == torch.float32 else 1e-2)


def test_fast_path_takes_what_a_llama_has():
    model = build("Llama", torch.float32)
    executor = executor_for(model)
    assert executor.fast_path.notes == [
        "7 of 7 RMSNorms in one loop",
        "22 linear layers prepacked (3 in groups of 2, 3 in groups of 3)",
        "3 attention layers without transposes",
        "3 gated MLPs with their activation in one loop",
        *(["3 whole layers fused"] if panels_work(torch.float32) else []),
    ]
    executor.release()
    assert not any("forward" in vars(m) for m in model.modules())


def test_float64_always_goes_plain():
    assert executor_for(build("Llama")).fast_path.notes == []


def test_model_comes_back_as_it_was():
    model = build("Qwen3", torch.float32)
    ids = torch.tensor([prompts()[1]])
    before = model(ids).logits
    executor = executor_for(model)
    with pytest.raises(ModelNotServed, match="release"):
        model(ids)
    assert executor.release() is model
    assert torch.equal(model(ids).logits, before)


def test_a_model_left_by_another_executor_can_be_taken_over():
    model = build("Llama", torch.float32)
    first = serve(executor_for(model), prompts(), 6)
    assert serve(executor_for(model), prompts(), 6) == first


def test_prepare_again_starts_a_new_run():
    executor = executor_for(build("Llama"))
    first = serve(executor, prompts(), 8, seed=1)
    assert serve(executor, prompts(), 8, seed=2, num_blocks=300) == first


def test_seeded_sampling_is_the_same_in_any_company():
    sampling = SamplingParams(temperature=1.0, seed=11, top_p=0.95, repetition_penalty=1.1)
    executor = executor_for(build("Llama"))
    together = serve(executor, prompts(), 12, seed=1, sampling=sampling)
    assert serve(executor, prompts(), 12, seed=7, chunk=3, sampling=sampling) == together
    assert [serve(executor, [p], 12, sampling=sampling)[0] for p in prompts()] == together
    other = SamplingParams(temperature=1.0, seed=12, top_p=0.95, repetition_penalty=1.1)
    assert serve(executor, prompts(), 12, seed=1, sampling=other) != together


def one(seq_id, tokens, table, *, start=0, samples=1, version=0):
    return SequenceStep(seq_id, tokens, start, table, version, samples, 0, SamplingParams(), tokens)


def ready(model=None, **sizes):
    executor = executor_for(model if model is not None else build("Llama"))
    executor.prepare(**{"num_blocks": 12, "block_size": BLOCK, "host_blocks": 6, "max_num_seqs": 4, **sizes})
    return executor


def run(executor, *batch, moves=(), ended=()):
    return executor.execute(StepOrders(0, deque(moves), list(batch), list(ended)))


def test_parallel_samples_part_from_one_row():
    executor = ready()
    params = SamplingParams(temperature=1.0, seed=4, n=4)
    step = SequenceStep(0, [5, 6, 7], 0, [3], 0, 4, 0, params, [5, 6, 7])
    (drawn,) = run(executor, step).samples
    assert len(drawn) == 4
    assert len(set(drawn)) > 1
    for i in range(4):
        again = SequenceStep(9, [5, 6, 7], 0, [5], i, 1, i, params, [5, 6, 7])
        assert run(executor, again).samples == [[drawn[i]]]


def test_a_sequence_whose_blocks_were_swapped_out_and_in_goes_on_as_before():
    prompt = prompts()[1][:10]
    executor = ready()
    run(executor, one(0, prompt[:9], [1, 2, 3], samples=0))
    undisturbed = run(executor, one(0, prompt[9:], [1, 2, 3], start=9)).samples

    executor = ready()
    run(executor, one(0, prompt[:9], [1, 2, 3], samples=0))
    before = [[t[b].clone() for b in (1, 2, 3)] for t in executor._tiers[DEVICE]]
    out = deque([Move(DEVICE, 1, HOST, 4), Move(DEVICE, 2, HOST, 0), Move(DEVICE, 3, HOST, 2)])
    executor.move(out)
    assert not out
    for cache in executor._tiers[DEVICE]:
        cache.fill_(torch.nan)
    executor.move(deque([Move(HOST, 4, DEVICE, 7), Move(HOST, 0, DEVICE, 5), Move(HOST, 2, DEVICE, 1)]))
    for cache, blocks in zip(executor._tiers[DEVICE], before, strict=True):
        for block, kept in zip((7, 5, 1), blocks, strict=True):
            assert torch.equal(cache[block].nan_to_num(), kept.nan_to_num())
    assert run(executor, one(0, prompt[9:], [7, 5, 1], start=9, version=1), ended=[0]).samples == undisturbed


def test_moves_are_done_in_order_whatever_they_touch():
    executor = ready(disk_blocks=5)
    rng = random.Random(0)
    sizes = {DEVICE: 12, HOST: 6, DISK: 5}
    for tier in (DEVICE, HOST):
        for cache in executor._tiers[tier]:
            for block in range(sizes[tier]):
                cache[block] = 100 * tier + block
    shadow = {(tier, block): 100 * tier + block for tier, n in sizes.items() for block in range(n)}
    executor.move(deque(Move(HOST, i, DISK, i) for i in range(5)))
    shadow |= {(DISK, i): shadow[HOST, i] for i in range(5)}
    for _ in range(30):
        moves = deque()
        for _ in range(rng.randint(1, 12)):
            tiers = rng.choice(
                [(DEVICE, DEVICE), (DEVICE, HOST), (HOST, DEVICE), (HOST, DISK), (DISK, DEVICE)]
            )
            moves.append(
                Move(tiers[0], rng.randrange(sizes[tiers[0]]), tiers[1], rng.randrange(sizes[tiers[1]]))
            )
        for m in moves:
            shadow[m.dst_tier, m.dst] = shadow[m.src_tier, m.src]
        executor.move(moves)
        assert not moves
        for (tier, block), value in shadow.items():
            if tier == DISK:
                executor.disk.load(block)
                held = torch.frombuffer(executor.disk.staging, dtype=executor.loaded.dtype)
                assert (held == value).all()
                continue
            assert all((cache[block] == value).all() for cache in executor._tiers[tier])
    assert executor.take_damage() is None
    executor.release()


def test_a_move_to_nowhere_is_named_and_stays_in_the_queue():
    executor = ready()
    moves = deque([Move(DEVICE, 0, HOST, 6)])
    with pytest.raises(InvariantBroken, match="no block 6 in tier host, which has 6"):
        executor.move(moves)
    assert len(moves) == 1


def test_copy_on_write_parts_two_sequences():
    model = build("Llama")
    prompt = prompts()[1][:6]
    executor = ready(model)
    run(executor, one(0, prompt, [1, 2]))
    # The second sequence shares block 1 and gets a copy of the half-filled block 2.
    run(
        executor,
        one(1, [9], [1, 3], start=6),
        one(0, [77], [1, 2], start=6),
        moves=[Move(DEVICE, 2, DEVICE, 3)],
    )
    tokens = run(executor, one(0, [5], [1, 2], start=7), one(1, [5], [1, 3], start=7)).samples
    alone = [serve(executor_for(model), [[*prompt, x, 5]], 1)[0] for x in (77, 9)]
    assert tokens == alone


@pytest.mark.parametrize("where", ["layout", "layer", "sampling"])
@pytest.mark.parametrize("fault_type", [RuntimeError, KeyboardInterrupt])
def test_after_a_fault_the_same_orders_can_be_given_again(monkeypatch, where, fault_type):
    executor = executor_for(build("Llama"))
    expected = serve(executor, prompts(), 8)
    rng = random.Random(5)
    faults = 0

    def fault(executor, orders):
        nonlocal faults
        if rng.random() < 0.5:
            return
        faults += 1
        left = [rng.randint(1, 4)]

        def breaking(*args, real, **kwargs):
            left[0] -= 1
            if not left[0]:
                raise fault_type("as if")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            if where == "layout":
                left[0] = 1
                target, name = executor.layout, rng.choice(["append", "open"])
            elif where == "layer":
                target, name = executor.attention, rng.choice(["attend", "write"])
            else:
                left[0] = 1
                target, name = __import__("pagedlab.executors.model", fromlist=["sample"]), "sample"
            real = getattr(target, name)
            patch.setattr(target, name, lambda *a, **k: breaking(*a, real=real, **k))
            try:
                executor.execute(orders)
            except fault_type:
                pass

    assert serve(executor, prompts(), 8, fault=fault) == expected
    assert faults


def test_nan_in_one_sequence_fails_it_alone():
    executor = ready()
    prompt = prompts()[1][:6]
    good = run(executor, one(0, prompt, [1, 2]), one(1, prompt, [3, 4])).samples
    for cache in executor._tiers[DEVICE]:
        cache[3] = torch.nan
    result = run(executor, one(0, [8], [1, 2], start=6), one(1, [8], [3, 4], start=6))
    assert list(result.failures) == [1]
    assert "NaN" in result.failures[1]
    assert result.samples[1] == []
    assert good[0] == good[1]
    assert len(result.samples[0]) == 1


def test_a_step_without_samples_or_without_a_batch():
    executor = ready()
    assert run(executor, one(0, [1, 2, 3], [0], samples=0)).samples == [[]]
    assert run(executor).samples == []


def test_rows_of_waiting_sequences_are_taken_when_none_is_free():
    executor = ready(max_num_seqs=2)
    expected = [run(executor, one(i, [3, 4, 5 + i], [i])).samples[0] for i in range(4)]
    again = [run(executor, one(i, [3, 4, 5 + i], [i])).samples[0] for i in range(4)]
    assert again == expected
    with pytest.raises(InvariantBroken, match="at most 2"):
        run(executor, *(one(i, [3], [i]) for i in range(3)))


def test_sizes_are_checked():
    executor = executor_for(build("Llama"))
    good = {"num_blocks": 4, "block_size": 4, "host_blocks": 0, "max_num_seqs": 1, "disk_blocks": 0}
    for name in good:
        with pytest.raises(ConfigError, match=name):
            executor.prepare(**{**good, name: -1})
    with pytest.raises(ConfigError, match="GiB"):
        executor.prepare(num_blocks=1 << 40, block_size=16, host_blocks=0, max_num_seqs=1)
    executor.prepare(**good)
    with pytest.raises(ConfigError, match="disk_path"):
        executor.prepare(**{**good, "disk_blocks": 2, "disk_path": "/nowhere/at/all"})
    with pytest.raises(ConfigError, match="num_threads"):
        executor_for(build("Llama"), num_threads=0)


def test_kernel_is_asked_for_device_and_dtype():
    class Half(type(make("kernel", "dense"))):
        """Only one dtype."""

        dtypes = ("bfloat16",)

    with pytest.raises(ConfigError, match="float64"):
        ModelExecutor(build("Llama"), layout=make("layout", "padded"), kernel=Half())


def test_bytes_of_a_block():
    executor = ready()
    assert executor.kv_bytes_per_block == BLOCK * 3 * 2 * 2 * 16 * 8
    assert sum(t.nbytes for t in executor._tiers[DEVICE]) == 12 * executor.kv_bytes_per_block
    assert sum(t.nbytes for t in executor._tiers[HOST]) == 6 * executor.kv_bytes_per_block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outs", "ins"), [(50, 12), (96, 64), (1, 2), (47, 576), (961, 100)])
def test_products_of_panels(dtype, outs, ins):
    if not panels_work(dtype):
        pytest.skip("no AVX-512 here")
    torch.manual_seed(0)
    for bias in (True, False):
        layer = torch.nn.Linear(ins, outs, bias=bias).to(dtype)
        panels = Panels([layer])
        for rows in (0, 1, 2, 3, 7, 8, 9, 16, 17, 131):
            x = torch.randn(2, rows, ins).to(dtype)
            with torch.inference_mode():
                ours, exact = panels(x), layer.double()(x.double())
                layer.to(dtype)
            assert ours.shape == exact.shape
            assert ours.dtype == dtype
            torch.testing.assert_close(
                ours.double(), exact, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2
            )
        # A row's numbers do not depend on its company.
        assert torch.equal(panels(x[:, 5:6]), panels(x)[:, 5:6])
        x[0, 3, 1], x[1, 2, 0] = torch.nan, torch.inf
        ours = panels(x)
        assert ours[0, 3].isnan().all()
        assert not ours[1, 2].isfinite().any()
        assert ours[1, 3:].isfinite().all()
        with pytest.raises(ValueError):
            panels(x[..., :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("without", ["panels", "place"])
def test_fast_path_without_its_fastest_parts(monkeypatch, dtype, without):
    model = build("Qwen3", dtype, intermediate_size=100)  # not a multiple of a panel
    fast = logits_of(executor_for(copy.deepcopy(model)), prompts())
    if without == "panels":
        monkeypatch.setattr("pagedlab.executors.products.panels_work", lambda dtype: False)
    executor = executor_for(model, kernel="cpu-paged" if without == "panels" else "dense")
    assert ("3 whole layers fused" in executor.fast_path.notes) == (without == "place" and panels_work(dtype))
    other = logits_of(executor, prompts())
    assert (fast - other).norm() / other.norm() < (1e-4 if dtype == torch.float32 else 0.2)


class PlainAttention:
    """A kernel as somebody writes one for models without further wishes: read the blocks, then a softmax."""

    axis_order = ("block", "token", "head", "channel")

    def __init__(self, layout):
        self.block_of = device_functions(layout).torch

    def allocate(self, num_blocks, block_size, num_kv_heads, head_size, *, dtype, device):
        return torch.empty(num_blocks, block_size, num_kv_heads, head_size, dtype=dtype, device=device)

    def write(self, cache, new, batch):
        cache.flatten(0, 1)[torch.from_numpy(batch.slots)] = new

    def attend(self, query, key_cache, value_cache, batch, *, scale):
        return self.read(query, key_cache, value_cache, batch, scale, None)

    def read(self, query, key_cache, value_cache, batch, scale, window):
        arrays = torch.from_numpy(batch.entries), torch.from_numpy(batch.index)
        outputs = []
        for row, length, q in zip(
            batch.rows.tolist(), batch.context_lens.tolist(), query.split(np.diff(batch.query_start).tolist())
        ):
            at = torch.arange(0 if window is None else max(0, length - len(q) + 1 - window), length)
            blocks = self.block_of(*arrays, torch.tensor(row), at // batch.block_size)
            keys, values = (cache[blocks, at % batch.block_size] for cache in (key_cache, value_cache))
            outputs.append(dense_attention(q, keys, values, scale=scale, sliding_window=window))
        return torch.cat(outputs)


class WindowedAttention(PlainAttention):
    """Has windows too, and says so by an argument."""

    def attend(self, query, key_cache, value_cache, batch, *, scale, sliding_window=None):
        return self.read(query, key_cache, value_cache, batch, scale, sliding_window)


class SunkAttention(PlainAttention):
    """Has sinks; it is refused before anybody calls it."""

    def attend(self, query, key_cache, value_cache, batch, *, scale, sinks=None):
        raise AssertionError("never called")


class Plain(Kernel):
    implementation = f"{__name__}:PlainAttention"


class Windowed(Kernel):
    implementation = f"{__name__}:WindowedAttention"


class Sunk(Kernel):
    implementation = f"{__name__}:SunkAttention"


def refused(model, kernel):
    """The line with which a model is refused before anything was allocated or served."""
    with pytest.raises(ConfigError) as caught:
        ModelExecutor(model, layout=make("layout", "padded"), kernel=kernel)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_kernel_of_ones_own_serves_the_models_that_ask_for_no_more():
    for name, kernel in (("Llama", Plain()), ("Llama", Windowed()), ("Mistral", Windowed())):
        model = build(name)
        reference = generated(copy.deepcopy(model), prompts(2), 8)
        executor = ModelExecutor(model, layout=make("layout", "csr"), kernel=kernel, poison=True)
        assert_says_the_same(serve(executor, prompts(2), 8), reference)


@pytest.mark.parametrize(
    ("name", "kernel", "lacks", "layers", "takes"),
    [
        ("GptOss", Plain(), "sinks and sliding_window", 3, "no option"),
        ("GptOss", Windowed(), "sinks", 3, "sliding_window"),
        ("Gemma2", Windowed(), "soft_cap", 3, "sliding_window"),
        ("Mistral", Plain(), "sliding_window", 3, "no option"),
        ("GptOss", Sunk(), "sliding_window", 2, "sinks"),
    ],
)
def test_what_a_kernel_lacks_is_said_before_the_first_step(name, kernel, lacks, layers, takes):
    model = build(name)
    said = refused(model, kernel)
    title, attend = type(kernel).__name__, f"{type(kernel).__name__}Attention.attend"
    assert said.startswith(f"kernel '{title}' cannot serve {name}ForCausalLM: {layers} of 3 attention layers")
    assert f"need {lacks}, and {attend} takes {takes};" in said
    assert "'auto'" in said
    # The model is as it was: it runs by itself, and under a kernel that has what it needs.
    assert torch.isfinite(model(torch.tensor([prompts()[1]])).logits).all()
    reference = generated(copy.deepcopy(model), prompts(2), 4)
    assert_says_the_same(serve(executor_for(model), prompts(2), 4), reference)


def test_a_run_with_a_kernel_that_lacks_something_says_so_in_its_first_line(tmp_path):
    build("GptOss", torch.float32).save_pretrained(tmp_path)
    config = pl.Config(model=str(tmp_path), kernel=Windowed(), num_blocks=32, block_size=BLOCK)
    with pytest.raises(
        ConfigError, match=r"kernel 'Windowed' cannot serve .*: 3 of 3 attention layers need sinks"
    ):
        pl.run(config, [pl.Request(request_id="a", prompt=prompts()[1])])


def test_a_kernel_that_swallows_everything_is_taken_at_its_word():
    class Swallows(WindowedAttention):
        def attend(self, query, key_cache, value_cache, batch, **options):
            return super().attend(query, key_cache, value_cache, batch, scale=options["scale"])

    assert options_of(Swallows(make("layout", "padded"))) == set(OPTIONS)
    assert options_of(WindowedAttention(make("layout", "padded"))) == {"sliding_window"}
    assert options_of(PlainAttention(make("layout", "padded"))) == set()


class Unscaled(PlainAttention):
    def attend(self, query, key_cache, value_cache, batch):
        raise AssertionError("never called")


class Wishes(PlainAttention):
    def attend(self, query, key_cache, value_cache, batch, *, scale, alibi_slopes):
        raise AssertionError("never called")


class Mute(PlainAttention):
    attend = None


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        (Unscaled, "unexpected keyword argument 'scale'"),
        (Wishes, "missing a required .*'alibi_slopes'"),
        (Mute, "Mute is no attention kernel: it lacks attend; needed: allocate, write, attend"),
    ],
)
def test_a_kernel_that_cannot_be_called_is_refused_by_what_is_wrong(attention, says):
    class Own(Kernel):
        implementation = f"{__name__}:{attention.__name__}"

    assert re.search(says, refused(build("Llama"), Own()))


def test_the_laws_speak_of_the_options_that_a_kernel_has():
    """One that lacks an option breaks no law; the table says which are not tried, and why."""
    for kernel, has in ((Plain(), set()), (Windowed(), {"sliding_window"})):
        table = pl.check_policy(kernel)
        rows = {row.check: row for row in table}
        for option in OPTIONS:
            (law,) = [check for check in rows if check.startswith(option)]
            assert rows[law].status == ("passed" if option in has else "skipped")
            assert option in has or f"attend has no {option}" in rows[law].detail
        assert rows["agrees_with_dense"].status == rows["unused_slots_cannot_leak"].status == "passed"
