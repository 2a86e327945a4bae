"""Law 4 for the Triton kernels: on a GPU where there is one, else in Triton's interpreter (conftest decides)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import deque
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import Case, error
from test_model_executor import build, executor_for, prompts, serve
from torch.nn.functional import scaled_dot_product_attention as sdpa

import pagedlab as pl
import pagedlab.kernels.layouts as layouts
from pagedlab.engine.orders import DEVICE as DEVICE_TIER
from pagedlab.engine.orders import HOST as HOST_TIER
from pagedlab.engine.orders import Move
from pagedlab.errors import ConfigError
from pagedlab.executors.model import ModelExecutor
from pagedlab.kernels.cpu import CPUPagedAttention
from pagedlab.kernels.layouts import BlockOf
from pagedlab.policies.kernel import TritonPaged, interpreted
from pagedlab.policies.layout import CSR, Extents, Padded, TwoLevel

pytest.importorskip("triton")
GPU = torch.cuda.is_available() and not interpreted()
if not (GPU or interpreted()):
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

from pagedlab.kernels.scaled import scales_of  # noqa: E402
from pagedlab.kernels.triton.formats import LARGEST, format_on  # noqa: E402
from pagedlab.kernels.triton.moves import gather_blocks, move_blocks, scatter_blocks  # noqa: E402
from pagedlab.kernels.triton.paged import TritonPagedAttention, _processors  # noqa: E402
from pagedlab.kernels.triton.shapes import Shape  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
LAYOUTS = [Padded, CSR, TwoLevel, Extents]
DTYPES = {
    "E4M3": torch.float8_e4m3fn,
    "E4M3_BITS": torch.float8_e4m3fn,
    "E4M3_FNUZ": torch.float8_e4m3fnuz,
    "INT8": torch.int8,
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
if not GPU:
    TOLERANCE[torch.float64] = 1e-12

# The interpreter computes rows that are masked, and thrown away, with numpy.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def poisoned(*shape, _empty=torch.empty, **options):
    """Return what `torch.empty` would, full of NaN where there is one."""
    made = _empty(*shape, **options)
    return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-1)


def attend(case: Case, layout=None, *, again: int = 1, **params):
    """Write the context into poisoned caches, nothing that no query sees, and attend into a poisoned output."""
    layout = layout or Padded()
    layout.reset(max_rows=len(case.contexts) + 2, max_blocks=max(1, *map(len, case.tables)))
    rows = torch.randperm(len(case.contexts) + 2, generator=case.rng).tolist()[: len(case.contexts)]
    for row, table in zip(rows, case.tables):
        layout.open(row, table[:1])
        layout.append(row, table[1:])
    attention = TritonPagedAttention(layout, **params)
    window = case.options["sliding_window"]
    first = [0 if window is None else max(0, t - q + 1 - window) for q, t in zip(case.queries, case.contexts)]
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    with patch.object(torch, "empty", poisoned):
        caches = []
        for contents, size in ((case.keys, case.size), (case.values, case.value_size)):
            cache = attention.allocate(
                case.num_blocks, case.block_size, case.heads, size, dtype=case.dtype, device=DEVICE
            )
            assert (cache.isnan() if cache.is_floating_point() else cache == 255).all()
            seen = torch.cat([c[at:] for c, at in zip(contents, first)]).to(DEVICE)
            attention.write(cache, seen, case.batch(layout, case.slots(first), rows))
            caches.append(cache)
        batch = case.batch(layout, case.slots(), rows)
        outs = [
            attention.attend(case.query.to(DEVICE), *caches, batch, **options).cpu() for _ in range(again)
        ]
    assert all(torch.equal(out.view(torch.uint8), outs[0].view(torch.uint8)) for out in outs)
    return outs[0]


@st.composite
def cases(draw):
    lengths = []
    for _ in range(draw(st.integers(1, 4))):
        context = draw(st.integers(1, 150) | st.integers(1, 12))
        lengths.append((draw(st.just(1) | st.just(context) | st.integers(0, min(context, 40))), context))
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 7]))
    case = Case(
        [pair for pair in lengths if pair[0]] or [(1, 1)],
        seed=draw(st.integers(0, 1000)),
        num_kv_heads=kv_heads,
        group=group,
        head_size=draw(st.sampled_from([8, 20, 64, 80])),
        value_size=draw(st.sampled_from([None, None, 12])),
        block_size=draw(st.sampled_from([1, 3, 16, 64, 128]) | st.integers(1, 256)),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        sliding_window=draw(st.none() | st.integers(1, 100)),
        soft_cap=draw(st.sampled_from([None, None, 1.5, 30.0])),
    )
    for name in ("alibi_slopes", "sinks"):
        if draw(st.booleans()):
            case.options[name] = torch.rand(kv_heads * group, generator=case.rng)
    return case


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda cls: cls.name)
@settings(max_examples=15, deadline=None)
@given(case=cases(), invariant=st.booleans())
def test_equals_dense_attention_and_nothing_leaks(layout, case, invariant):
    out = attend(case, layout(), batch_invariant=invariant, split_tokens=32)
    assert out.shape == (*case.query.shape[:2], case.value_size)
    assert out.dtype == case.dtype
    assert error(out, case.expected()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "lengths", [[(1, 70), (1, 1), (1, 129)], [(33, 70), (1, 40), (2, 2)]], ids=["decode", "mixed"]
)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_head_sizes(head_size, lengths):
    for dtype, block_size in ((torch.float32, 16), (torch.bfloat16, 5), (torch.float16, 256)):
        case = Case(lengths, head_size=head_size, block_size=block_size, dtype=dtype, num_kv_heads=1)
        assert error(attend(case), case.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [1, 5, 71])
def test_groups(group):
    """One query head a KV head, a group that is no power of two, and more heads than a tile has rows."""
    case = Case([(1, 90), (3, 20)], num_kv_heads=1, group=group, head_size=16)
    assert error(attend(case), case.expected()) < 1e-5
    case = Case([(1, 90), (1, 3)], num_kv_heads=2, group=group, head_size=16)
    assert error(attend(case), case.expected()) < 1e-5


def test_many_splits_and_few():
    case = Case([(1, 700), (1, 1), (1, 64), (1, 65)], block_size=16, num_kv_heads=1)
    for params in ({}, {"batch_invariant": True}, {"batch_invariant": True, "split_tokens": 64}):
        assert error(attend(case, **params), case.expected()) < 1e-5
    case.options |= {"sliding_window": 200, "sinks": torch.tensor([3.0, -2.0])}
    assert error(attend(case, batch_invariant=True, split_tokens=64), case.expected()) < 1e-5


@pytest.mark.parametrize("sliding_window", [1, 9, 64, 65])
def test_windows(sliding_window):
    """Within a tile of queries each row has its own first key."""
    for lengths in ([(30, 60), (5, 40), (1, 64)], [(1, 100), (1, 65), (1, 64), (1, 5)]):
        case = Case(lengths, block_size=7, sliding_window=sliding_window)
        assert error(attend(case), case.expected()) < 1e-5


def test_sequences_without_a_token():
    case = Case([(1, 5), (0, 0), (1, 9), (0, 7)])
    assert error(attend(case), case.expected()) < 1e-5
    case = Case([(0, 0), (4, 9), (0, 7), (1, 3)])
    assert error(attend(case), case.expected()) < 1e-5
    nobody = Case([(0, 0), (0, 3)])
    assert attend(nobody).shape == (0, *nobody.query.shape[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_does_not_depend_on_the_company(dtype):
    lengths = [(1, 300), (20, 130), (1, 7), (1, 64)]
    together = Case(lengths, dtype=dtype, block_size=16)
    params = {"batch_invariant": True, "split_tokens": 64}
    out = attend(together, again=2, **params)
    at = 0
    for s, (q, t) in enumerate(lengths):
        alone = Case([(q, t)], dtype=dtype, block_size=16)
        alone.query = together.query[at : at + q]
        alone.keys, alone.values = [together.keys[s]], [together.values[s]]
        assert torch.equal(attend(alone, **params), out[at : at + q])
        at += q


def test_pieces_follow_the_batch_unless_it_is_invariant():
    layout, shape = Padded(), Shape.of(2, 16, 16, 4)
    free, fixed = (
        TritonPagedAttention(layout),
        TritonPagedAttention(layout, batch_invariant=True, split_tokens=100),
    )

    def lengths(attention, launch=shape.decode[0]):
        return [
            attention.split_len(n, p, shape, launch, DEVICE) for n, p in ((4096, 1), (4096, 10_000), (1, 1))
        ]

    short, whole, least = lengths(free)
    assert least <= short < whole == 4096
    assert all(lengths(fixed, launch) == [128] * 3 for launch in shape.decode)
    # One piece would give each multiprocessor a program; as many pieces are cut as programs are wanted.
    rule, each = shape.decode[0], _processors(DEVICE)
    for wanted in (1, 2, 8):
        launch = rule._replace(programs=wanted)
        assert free.split_len(4096, each, shape, launch, DEVICE) == 4096 // wanted


def test_equal_inputs_give_equal_bits():
    attend(Case([(1, 300), (1, 40)], block_size=16), again=3)
    attend(Case([(30, 60), (1, 40)], dtype=torch.bfloat16), again=3)


def test_a_nan_of_the_model_stays_a_nan():
    for lengths in ([(1, 70), (1, 70)], [(1, 70), (2, 70)]):
        case = Case(lengths, block_size=16)
        case.keys[1][40, 0, 3] = float("nan")
        out = attend(case)
        assert out[0].isfinite().all()
        assert out[1:, :2].isnan().all()
        assert out[1:, 2:].isfinite().all()


def test_scores_beyond_the_range_of_exp():
    case = Case([(1, 100), (30, 100)], head_size=64)
    case.query *= 1000
    assert error(attend(case), case.expected()) < 1e-4


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from([1, 8, 20, 64]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_write_fills_its_slots_and_no_other(block_size, heads, size, dtype, strided, rng):
    num_blocks = 6
    slots = rng.sample(range(num_blocks * block_size), rng.randint(1, min(30, num_blocks * block_size)))
    layout = Padded()
    layout.reset(max_rows=1, max_blocks=1)
    attention = TritonPagedAttention(layout)
    cache = attention.allocate(num_blocks, block_size, heads, size, dtype=dtype, device=DEVICE)
    cache.fill_(float("nan"))
    new = (
        torch.randn((heads, len(slots), size) if strided else (len(slots), heads, size)).to(dtype).to(DEVICE)
    )
    new = new.transpose(0, 1) if strided else new
    attention.write(cache, new, Case([(1, 1)]).batch(layout, np.array(slots, np.int64), [0]))
    flat = cache.transpose(1, 2).reshape(num_blocks * block_size, heads, size)
    assert torch.equal(flat[slots], new)
    assert flat[sorted(set(range(len(flat))) - set(slots))].isnan().all()


def rotated(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding as the paper writes it: pairs of channels as complex numbers."""
    half = cos.shape[-1]
    turned, rest = key[..., : 2 * half], key[..., 2 * half :]
    if interleaved:
        one, other = turned[..., ::2], turned[..., 1::2]
    else:
        one, other = turned[..., :half], turned[..., half:]
    product = torch.complex(one, other) * torch.complex(cos, sin)[:, None]
    parts = (product.real, product.imag)
    joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([joined, rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [8, 20, 32])
def test_writing_and_rotating_at_once(rotary, interleaved):
    case = Case([(9, 9), (1, 5)], head_size=32, value_size=24)
    layout = Padded()
    layout.reset(max_rows=1, max_blocks=1)
    attention = TritonPagedAttention(layout)
    slots = np.array(random.Random(0).sample(range(24), 10), np.int64)
    key, value = case.random(10, 2, 32), case.random(10, 2, 24)
    angle = case.random(10, rotary // 2)
    caches = [
        attention.allocate(6, 4, 2, n, dtype=torch.float32, device=DEVICE).fill_(float("nan"))
        for n in (32, 24)
    ]
    attention.write_rotated(
        *caches,
        key.to(DEVICE),
        value.to(DEVICE),
        angle.cos().to(DEVICE),
        angle.sin().to(DEVICE),
        case.batch(layout, slots, [0, 0]),
        interleaved=interleaved,
    )
    keys, values = (c.cpu().transpose(1, 2).reshape(24, 2, -1) for c in caches)
    assert error(keys[slots], rotated(key, angle.cos(), angle.sin(), interleaved).double()) < 1e-6
    assert torch.equal(values[slots], value)
    rest = sorted(set(range(24)) - set(slots.tolist()))
    assert keys[rest].isnan().all()
    assert values[rest].isnan().all()


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    st.sampled_from([(1, 3), (3, 5), (16, 8), (16, 160)]),
    st.randoms(use_true_random=False),
)
def test_blocks_move_whole_and_no_other(dtype, sizes, rng):
    """Copies within a cache, then out through staging and back in, tensors of two sizes at once."""
    n = 7
    caches = [
        torch.randint(0, 200, (n, tokens, width)).to(dtype).to(DEVICE)
        for tokens, width in (sizes, (sizes[0], sizes[1] + 1), sizes)
    ]
    before = [c.clone() for c in caches]
    chosen = rng.sample(range(n), 6)
    source, target = chosen[:3], chosen[3:]
    move_blocks(caches, caches, source, target)
    for old, new in zip(before, caches):
        assert torch.equal(new[target], old[source])
        rest = sorted(set(range(n)) - set(target))
        assert torch.equal(new[rest], old[rest])
    same = caches[::2]
    staged = gather_blocks(same, chosen)
    assert staged.is_contiguous()
    elsewhere = [torch.zeros_like(c) for c in same]
    scatter_blocks(staged, elsewhere, chosen[::-1])
    for old, new in zip(same, elsewhere):
        assert torch.equal(new[chosen[::-1]], old[chosen])
        assert not new[sorted(set(range(n)) - set(chosen))].any()
    move_blocks(caches, caches, [], [])


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_blocks_go_to_the_host_and_back():
    caches = [torch.randn(9, 4, 16, width, device=DEVICE) for width in (64, 32, 64)]
    host = [torch.zeros(5, *c.shape[1:]) for c in caches]
    before = [c.clone() for c in caches]
    move_blocks(caches, host, [1, 8, 3], [4, 0, 2])
    for cache, tier in zip(caches, host):
        assert torch.equal(tier[[4, 0, 2]], cache[[1, 8, 3]].cpu())
        cache[[1, 8, 3]] = 0
    move_blocks(host, caches, [4, 0, 2], [1, 8, 3])
    assert all(torch.equal(a, b) for a, b in zip(before, caches))


def held(cache: torch.Tensor, case: Case, s: int, size: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a quantised cache holds of sequence ``s``, float64 [context, heads, size], and the steps there."""
    table, tokens = case.tables[s], case.block_size
    cache = cache.cpu()[table]
    numbers = (
        cache[:, :, : tokens * size].reshape(len(table), case.heads, tokens, size).view(DTYPES[form]).double()
    )
    scale = scales_of(cache).double()[:, :, None, None]
    # fp8 has three bits after the first one, and 2 ** -9 (2 ** -10) as its least number.
    least = {"INT8": 1.0, "E4M3_FNUZ": 2.0**-10}.get(form, 2.0**-9)
    step = torch.full_like(numbers, 1.0) if form == "INT8" else 2 ** numbers.abs().log2().floor() / 8
    parts = numbers * scale, step.clamp_min(least) * scale
    one, other = (x.transpose(1, 2).flatten(0, 1)[: case.contexts[s]] for x in parts)
    return one, other


@pytest.mark.parametrize("lengths", [[(1, 70), (1, 1)], [(20, 45), (1, 33)]], ids=["decode", "mixed"])
@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_one_byte_a_channel(kv_dtype, scales, lengths):
    """What was written is held to half a step, and half a step more each time that the scale may have grown.

    Attention is dense attention over what is held.
    """
    form = format_on(kv_dtype, DEVICE)
    for block_size, dtype in ((16, torch.float32), (7, torch.bfloat16), (64, torch.float16)):
        case = Case(lengths, block_size=block_size, head_size=32, value_size=16, dtype=dtype)
        attention = TritonPagedAttention(Padded(), kv_dtype=kv_dtype, scales=scales)
        layout = Padded()
        layout.reset(max_rows=2, max_blocks=max(map(len, case.tables)))
        for row, table in enumerate(case.tables):
            layout.open(row, table)
        caches = []
        for contents, size in ((case.keys, 32), (case.values, 16)):
            cache = attention.allocate(
                case.num_blocks, block_size, 2, size, dtype=dtype, device=DEVICE
            ).fill_(255)
            assert cache.dtype == torch.uint8
            caches.append(cache)
            done = [0, 0]
            while done != case.contexts:
                to = [min(d + 19, t) for d, t in zip(done, case.contexts)]
                new = torch.cat([c[a:b] for c, a, b in zip(contents, done, to)]).to(DEVICE)
                slots = np.concatenate(
                    [
                        [
                            case.tables[s][t // block_size] * block_size + t % block_size
                            for t in range(done[s], to[s])
                        ]
                        for s in range(2)
                    ]
                ).astype(np.int64)
                attention.write(cache, new, case.batch(layout, slots, [0, 1]))
                done = to
        batch = case.batch(layout, case.slots(), [0, 1])
        with patch.object(torch, "empty", poisoned):
            out = attention.attend(case.query.to(DEVICE), *caches, batch, **case.options).cpu()
        for cache, contents, size in zip(caches, (case.keys, case.values), (32, 16)):
            for s in range(2):
                known, step = held(cache, case, s, size, form)
                written = contents[s].double()
                if scales == "head":
                    largest = scales_of(cache.cpu())[0].double()[None, :, None] * LARGEST[form]
                    written = written.clamp(-largest, largest)
                times = 1 if scales == "head" else 2 + block_size // 19
                assert ((known - written).abs() <= 0.501 * times * step).all()
                contents[s] = known
        assert error(out, case.expected()) < TOLERANCE[dtype]


def test_fp8_rounds_as_torch_does():
    """Numbers at, between and beyond those of e4m3, under a scale of 1."""
    form = format_on("fp8", DEVICE)
    numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(DTYPES[form]).float()
    numbers = numbers[numbers.isfinite()].sort().values
    x = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([1e-9, 0.3, -0.0, LARGEST[form]])])
    x = torch.cat([x, torch.zeros(-len(x) % 16)]).view(-1, 1, 16)
    case, layout = Case([(len(x), len(x))], block_size=len(x)), Padded()
    layout.reset(max_rows=1, max_blocks=1)
    attention = TritonPagedAttention(layout, kv_dtype="fp8")
    cache = attention.allocate(1, len(x), 1, 16, dtype=torch.float32, device=DEVICE)
    attention.write(cache, x.to(DEVICE), case.batch(layout, np.arange(len(x)), [0]))
    assert scales_of(cache).item() == 1
    assert torch.equal(
        cache[0, 0, : x.numel()].cpu().view(DTYPES[form]).float(), x.to(DTYPES[form]).float().flatten()
    )


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_a_nan_stays_a_nan_in_one_byte(kv_dtype):
    case, layout = Case([(1, 20), (1, 20)], head_size=16, block_size=16), Padded()
    layout.reset(max_rows=2, max_blocks=2)
    for row, table in enumerate(case.tables):
        layout.open(row, table)
    case.keys[1][17, 0, 3] = float("nan")
    attention = TritonPagedAttention(layout, kv_dtype=kv_dtype)
    caches = [
        attention.allocate(case.num_blocks, 16, 2, 16, dtype=case.dtype, device=DEVICE) for _ in range(2)
    ]
    batch = case.batch(layout, case.slots(), [0, 1])
    for cache, contents in zip(caches, (case.keys, case.values)):
        attention.write(cache, torch.cat(contents).to(DEVICE), batch)
    out = attention.attend(case.query.to(DEVICE), *caches, batch, **case.options)
    assert out[0].isfinite().all()
    assert out[1, :2].isnan().all()
    assert out[1, 2:].isfinite().all()


@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_one_byte_lies_in_memory_as_it_does_on_a_cpu(kv_dtype, scales):
    """Bytes and scales are equal, written in chunks, so that either kernel reads what the other wrote.

    One head of one sequence has a block with a NaN and one with an infinity, and the other sequence's numbers are tiny.
    """
    if format_on(kv_dtype, DEVICE) == "E4M3_FNUZ":
        pytest.skip("this device has an fp8 of its own")
    case, layout = Case([(5, 50), (1, 7)], head_size=16, block_size=16), Padded()
    layout.reset(max_rows=2, max_blocks=max(map(len, case.tables)))
    for row, table in enumerate(case.tables):
        layout.open(row, table)
    case.keys[0][21, 1, 3], case.keys[0][40, 1, 2] = float("nan"), float("inf")
    case.keys[1] *= 1e-38
    kernels = TritonPagedAttention, CPUPagedAttention
    devices = DEVICE, torch.device("cpu")
    one, other = (k(layout, kv_dtype=kv_dtype, scales=scales) for k in kernels)
    caches = [
        [
            k.allocate(case.num_blocks, 16, 2, 16, dtype=case.dtype, device=d).fill_(0)
            for k, d in zip((one, other), devices)
        ]
        for _ in range(2)
    ]
    for (mine, theirs), contents in zip(caches, (case.keys, case.values)):
        for start, stop in ((0, 20), (20, 30), (30, 50)):
            slots = [
                case.tables[s][t // 16] * 16 + t % 16
                for s in range(2)
                for t in range(start, min(stop, case.contexts[s]))
            ]
            new = torch.cat([c[start:stop] for c in contents])
            batch = case.batch(layout, np.array(slots, np.int64), [0, 1])
            one.write(mine, new.to(DEVICE), batch)
            other.write(theirs, new, batch)
        known, found = (scales_of(c.cpu()) for c in (mine, theirs))
        torch.testing.assert_close(known, found, rtol=1e-6, atol=0, equal_nan=True)
        difference = mine.cpu()[:, :, :-16].view(torch.int8).int() - theirs[:, :, :-16].view(torch.int8).int()
        if kv_dtype == "int8":  # has no NaN: its scale has
            difference = difference[found.isfinite()]
        assert difference.abs().max() <= (1 if GPU else 0)
    batch = case.batch(layout, case.slots(), [0, 1])
    mine = one.attend(case.query.to(DEVICE), *(c[0] for c in caches), batch, **case.options).cpu()
    theirs = other.attend(case.query, *(c[0].cpu() for c in caches), batch, **case.options)
    assert mine[:5, 2:].isnan().all() or (kv_dtype, scales) == ("int8", "head")
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_model_with_one_byte_a_channel():
    """Through the executor: blocks are smaller, and the first token, which reads little, is the same."""
    model = build("Llama", torch.float32, head_dim=16)
    said, weights = [], []
    for params in ({}, {"kv_dtype": "int8"}):
        executor = ModelExecutor(
            model, layout=Padded(), kernel=TritonPaged.from_params(params), poison=True, device=str(DEVICE)
        )
        said.append(serve(executor, prompts(lengths=(3, 9)), 3, seed=3))
        weights.append(executor.kv_bytes_per_block)
        executor.release()
    assert [s[0] for s in said[0]] == [s[0] for s in said[1]]
    assert weights[1] < weights[0] / 2


def test_a_layout_without_a_triton_form_is_refused_by_name(monkeypatch):
    class Backwards(Padded):
        device_functions = "pagedlab.kernels.layouts:backwards"

    monkeypatch.setattr(layouts, "backwards", BlockOf(len, len), raising=False)
    with pytest.raises(ConfigError, match="'Backwards' has no Triton form"):
        TritonPagedAttention(Backwards())
    monkeypatch.setattr(layouts, "backwards", BlockOf(len, len, "pagedlab.kernels.triton.tables:no"))
    with pytest.raises(ConfigError, match="'Backwards' names the Triton function"):
        TritonPagedAttention(Backwards())


def test_what_is_not_served_is_refused_by_name(monkeypatch):
    attention = TritonPagedAttention(Padded())
    with pytest.raises(ConfigError, match="up to 256 channels, not 257"):
        attention.allocate(1, 16, 1, 257, dtype=torch.float32, device=DEVICE)
    case, layout = Case([(1, 1)]), Padded()
    layout.reset(max_rows=1, max_blocks=1)
    batch = case.batch(layout, case.slots(), [0])
    cache = torch.zeros(4, 8, 2, 16, device=DEVICE).transpose(1, 2)
    with pytest.raises(ConfigError, match="must be contiguous"):
        attention.write(cache, case.keys[0].to(DEVICE), batch)
    kernel = TritonPaged.from_params({})
    assert kernel.resolve("cuda:1", "bfloat16") is kernel
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel.resolve("cpu", "float64") is kernel
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="'triton-paged' runs on cuda, not on 'cpu'"):
        kernel.resolve("cpu", "float32")
    with pytest.raises(ConfigError, match="serves a cache of float32, bfloat16, float16, not 'float64'"):
        kernel.resolve("cuda", "float64")


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_model_says_the_same(name):
    """Through the executor: chunks beside decoding sequences, grouped heads, windows and a soft cap."""
    dtype = torch.float32 if GPU else torch.float64
    texts = prompts(lengths=(3, 21, 9))
    outputs = [
        serve(executor_for(build(name, dtype), kernel=kernel, device=str(DEVICE)), texts, 4, seed=3)
        for kernel in ("triton-paged", "dense")
    ]
    assert outputs[0] == outputs[1]


def test_an_executor_moves_blocks_with_the_kernel():
    """As on a GPU: many independent moves at once, and a chain of moves in order."""
    executor = executor_for(build("Llama", torch.float32), kernel="triton-paged", device=str(DEVICE))
    assert (executor._move_blocks is not None) == GPU
    executor._move_blocks = executor.attention.move_blocks
    executor.prepare(num_blocks=8, block_size=4, host_blocks=4, max_num_seqs=1)
    for tier in (DEVICE_TIER, HOST_TIER):
        for cache in executor._tiers[tier]:
            for block in range(len(cache)):
                cache[block] = 10 * tier + block
    moves = deque([Move(0, 1, 1, 3), Move(0, 2, 1, 0), Move(0, 1, 0, 2), Move(0, 2, 0, 5), Move(1, 0, 0, 1)])
    executor.move(moves)
    assert not moves
    for cache in executor._tiers[DEVICE_TIER]:
        assert [float(block.max()) for block in cache] == [0, 2, 1, 3, 4, 1, 6, 7]
    for cache in executor._tiers[HOST_TIER]:
        assert [float(block.max()) for block in cache] == [2, 11, 12, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_here_is_refused_by_name():
    with pytest.raises(ConfigError, match="no device 'cuda:1' here: torch sees 0 GPUs"):
        pl.run(pl.Config(device="cuda:1"), ["import"], max_tokens=1)


def test_a_run_short_of_memory_says_the_same(tiny):
    """By name through the whole engine, with preemption by swapping; the run says which kernel it was."""
    config = pl.Config(
        model="tiny", dtype="float32", num_blocks=9, block_size=4, preemption="swap", device=str(DEVICE)
    )
    texts = ["def f(x):\n    return", "def f(x):\n    return y", "import os"]
    runs = [
        pl.run(config.replace(kernel=kernel), texts, max_tokens=8) for kernel in ("dense", "triton-paged")
    ]
    assert runs[0].outputs == runs[1].outputs
    assert runs[1].summary()["kernel"] == "triton-paged"
    assert runs[1].summary()["preemptions"] > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiled_for_gpus_that_are_not_here(target):
    """In a process of its own: a function that is interpreted cannot be compiled. Nothing spills in the defaults."""
    shapes = [
        {},
        {"dtype": "float32", "head_size": 256, "block_size": 13},
        {"kv_dtype": "fp8", "layout": "extents"},
        {"kv_dtype": "int8", "head_size": 256, "features": True, "layout": "two-level"},
    ]
    script = (
        "import json; from pagedlab.kernels.triton.resources import compile_kernels;"
        f"print(json.dumps(compile_kernels([{target!r}], {shapes!r})))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    kernels = {row["kernel"] for row in rows if row["kv_dtype"] == "model"}
    assert kernels == {"decode", "reduce", "prefill", "write", "write-rotated", "move-blocks"}
    assert len(rows) == 2 * 6 + 2 * 3
    for row in rows:
        assert 0 < row["registers"] <= 512, row
        assert row["stack"] == row["spills"] == 0, row
        assert row["shared"] <= row["shared_limit"], row


def test_an_interpreted_process_does_not_compile():
    if GPU:
        pytest.skip("not interpreted here")
    from pagedlab.kernels.triton.resources import compile_kernels

    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set"):
        compile_kernels(["sm_90"])
    with pytest.raises(ConfigError, match="no target 'sm_95'; known: sm_80, sm_90"):
        compile_kernels(["sm_95"])


def test_the_benchmark(monkeypatch):
    """Every contender at one small point; on a GPU the timing is that of a run."""
    from pagedlab.bench import kernel_gpu

    monkeypatch.setattr(kernel_gpu, "NUM_HEADS", 2)
    monkeypatch.setattr(kernel_gpu, "NUM_KV_HEADS", 1)
    monkeypatch.setattr(kernel_gpu, "HEAD_SIZE", 16)
    rows = kernel_gpu.measure(points=[(2, 64)], block_sizes=(16,), rounds=1, device=str(DEVICE))
    paged = [row for row in rows if row["kernel"] == "triton-paged"]
    assert {row["layout"] for row in paged} == {"padded", "csr"}
    assert {row["launch"] for row in paged} == {"rule"}  # conftest.py says that nothing is tuned
    copy = next(row for row in rows if row["kernel"] == "copy")
    assert copy["ratio_copy"] == 1
    assert max(row["ratio_dense"] for row in rows if row["kernel"].startswith("sdpa")) == 1
    for row in rows:
        assert (row["num_seqs"], row["context_len"]) == (2, 64)
        assert row["gb_per_s"] / copy["gb_per_s"] == pytest.approx(row["ratio_copy"])
    assert {row["block_size"] for row in paged} == {16}


SMALL = {"NUM_HEADS": 2, "NUM_KV_HEADS": 1, "HEAD_SIZE": 16, "SCALE": 0.25}


@pytest.mark.parametrize("query_len", [64, 16])
def test_the_benchmark_of_chunks(monkeypatch, query_len):
    from pagedlab.bench import kernel, kernel_gpu, kernel_gpu_prefill

    for name, size in SMALL.items():
        monkeypatch.setattr(kernel_gpu, name, size)
    monkeypatch.setattr(kernel_gpu_prefill, "PRODUCT", 32)
    rows = kernel_gpu_prefill.measure(
        points=[(2, query_len, 64)], block_sizes=(16,), rounds=1, device=str(DEVICE)
    )
    by_kernel = {row["kernel"]: row for row in rows}
    assert set(by_kernel) == {"sdpa enable_gqa", "sdpa expanded", "matmul", "triton-paged"}
    assert {row["layout"] for row in rows if row["kernel"] == "triton-paged"} == {"padded", "csr"}
    product, paged = by_kernel["matmul"], by_kernel["triton-paged"]
    assert product["ratio_matmul"] == 1
    assert product["ratio_sdpa"] is None
    assert max(row["ratio_sdpa"] for row in rows if row["kernel"].startswith("sdpa")) == 1
    assert paged["tflop_per_s"] / product["tflop_per_s"] == pytest.approx(paged["ratio_matmul"])
    assert paged["launch"] == "rule"
    decode = kernel_gpu.measure(points=[(2, 64), (1, 32)], block_sizes=(16,), rounds=1, device=str(DEVICE))
    summary = kernel.summary([*decode, *rows])
    assert [(row["num_seqs"], row["query_len"], row["context_len"]) for row in summary] == [
        (2, None, 64),
        (1, None, 32),
        (2, query_len, 64),
    ]
    mine = [row for row in decode if (row["kernel"], row["num_seqs"]) == ("triton-paged", 2)]
    assert summary[0]["ratio_copy"] == max(row["ratio_copy"] for row in mine)
    assert summary[2]["ratio_sdpa"] == max(
        row["ratio_sdpa"] for row in rows if row["kernel"] == "triton-paged"
    )
    copying, multiplying = kernel.draw([*decode, *rows]).axes
    assert [tick.get_text() for tick in copying.get_xticklabels()] == ["2 × 64", "1 × 32"]
    assert len(multiplying.patches) == 2


def test_flashinfer_is_a_contender_where_it_is_installed(monkeypatch):
    """A stand-in that attends by the tables it was given, as FlashInfer's documentation describes them."""
    from pagedlab.bench import kernel_gpu

    class Wrapper:
        def __init__(self, workspace, layout):
            assert (workspace.dtype, layout) == (torch.uint8, "HND")

        def plan(self, indptr, indices, last, heads, kv_heads, size, page, *, q_data_type, kv_data_type):
            assert (heads, kv_heads, size, page) == (2, 1, 16, 16)
            assert q_data_type == kv_data_type == torch.float32
            assert indptr.tolist() == [0, 2, 4]
            assert sorted(indices.tolist()) == [0, 1, 2, 3]
            assert last.tolist() == [16, 16]
            self.pages = indices.view(2, 2).long()

        def run(self, query, caches):
            keys, values = (c[self.pages].transpose(1, 2).flatten(2, 3) for c in caches)
            return sdpa(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    for name, size in SMALL.items():
        monkeypatch.setattr(kernel_gpu, name, size)
    monkeypatch.setitem(
        sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    )
    query = torch.randn(2, 2, 16, device=DEVICE)
    made = kernel_gpu.forms(query, 32, [16], torch.Generator().manual_seed(0))
    key, value = torch.randn(2, 2, 1, 32, 16, device=DEVICE)
    out = made["flashinfer", "csr", 16](key, value)
    assert out.shape == query.shape
    assert out.isfinite().all()


def test_contenders_of_chunks_compute_the_same(monkeypatch):
    from pagedlab.bench import kernel_gpu, kernel_gpu_prefill

    for name, size in SMALL.items():
        monkeypatch.setattr(kernel_gpu, name, size)
    monkeypatch.setattr(kernel_gpu_prefill, "PRODUCT", 32)
    query = torch.randn(1, 24, 2, 16, device=DEVICE)
    made = kernel_gpu_prefill.forms(query, 64, [64], torch.Generator())
    key, value = torch.randn(2, 1, 1, 64, 16, device=DEVICE)
    wanted = made["sdpa enable_gqa", "contiguous", None](key, value).transpose(1, 2).flatten(0, 1)
    got = made["triton-paged", "csr", 64](key, value)  # one block: its number is no question
    assert ((got - wanted).norm() / wanted.norm()).item() < (1e-2 if GPU else 1e-5)
