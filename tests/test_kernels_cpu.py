"""The CPU kernel: contexts cut into pieces, equal bits for equal inputs, and caches of one byte a channel."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from test_kernels import CPU, TOLERANCE, Case, error
from test_model_executor import build, logits_of, one, prompts, run

import pagedlab as pl
from pagedlab.engine.orders import DEVICE, HOST, Move
from pagedlab.errors import ConfigError
from pagedlab.executors.model import ModelExecutor
from pagedlab.kernels import cpu
from pagedlab.kernels.cpu import CPUPagedAttention
from pagedlab.kernels.scaled import scales_of
from pagedlab.policies.kernel import CPUPaged
from pagedlab.policies.layout import CSR, Extents, Padded

LARGE = [(1, 700), (3, 300), (0, 9), (1, 1), (1, 64), (90, 200)]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("split_tokens", [16, 100])
def test_a_context_in_pieces_is_the_context(dtype, split_tokens):
    """Decode beside a chunk that is cut and one that is not, with all that may change a score."""
    kernel = CPUPaged(batch_invariant=True, split_tokens=split_tokens)
    for options in ({}, {"sliding_window": 150, "soft_cap": 5.0}):
        case = Case(LARGE, num_kv_heads=1, group=3, head_size=64, block_size=16, dtype=dtype, **options)
        assert error(case.attend(kernel, CSR()), case.expected()) < TOLERANCE[dtype]
        case.options |= {
            "alibi_slopes": torch.tensor([0.1, 0.0, 1.0]),
            "sinks": torch.tensor([2.0, -1.0, 9.0]),
        }
        assert error(case.attend(kernel, CSR()), case.expected()) < TOLERANCE[dtype]


def test_a_nan_in_one_piece_is_a_nan_of_the_sequence():
    case = Case([(1, 300), (1, 300)], block_size=16, head_size=64, dtype=torch.bfloat16)
    case.keys[1][140, 0, 3] = float("nan")
    out = case.attend(CPUPaged(batch_invariant=True, split_tokens=64), Padded())
    assert out[0].isfinite().all()
    assert out[1, :2].isnan().all()
    assert out[1, 2:].isfinite().all()


def test_contexts_are_cut_where_threads_lack_work(two_threads, monkeypatch):
    """One sequence alone is cut, and not beside others; a fixed length cuts both alike."""
    monkeypatch.setattr(cpu, "SHORTEST_PIECE", 64)
    alone = Case([(1, 600)], num_kv_heads=1, block_size=16)
    crowd = Case([(1, 600)] * 9, num_kv_heads=1, block_size=16)
    crowd.query[0], crowd.keys[0], crowd.values[0] = alone.query[0], alone.keys[0], alone.values[0]
    free, fixed = CPUPaged(), CPUPaged(batch_invariant=True, split_tokens=128)
    assert error(alone.attend(free, Padded()), alone.expected()) < 1e-5
    assert not torch.equal(alone.attend(free, Padded())[0], crowd.attend(free, Padded())[0])
    assert torch.equal(alone.attend(fixed, Padded())[0], crowd.attend(fixed, Padded())[0])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_equal_inputs_give_equal_bits(dtype, two_threads, monkeypatch):
    monkeypatch.setattr(cpu, "SHORTEST_PIECE", 64)
    for lengths in ([(1, 900)], LARGE):
        case = Case(lengths, num_kv_heads=1, head_size=64, block_size=16, dtype=dtype)
        first = case.attend(CPUPaged(), Extents())
        assert all(torch.equal(case.attend(CPUPaged(), layout()), first) for layout in (Extents, Padded))


@pytest.mark.parametrize(
    ("head_size", "group", "block_size"), [(80, 1, 256), (96, 8, 1), (256, 4, 33), (128, 2, 16)]
)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_head_sizes(head_size, group, block_size, dtype):
    case = Case([(1, 130), (20, 40)], head_size=head_size, group=group, block_size=block_size, dtype=dtype)
    assert error(case.attend(CPUPaged(), CSR()), case.expected()) < TOLERANCE[dtype]


def test_numbers_by_head_are_one_for_each():
    case = Case([(1, 30)])
    for name in ("alibi_slopes", "sinks"):
        case.options = case.options | {"alibi_slopes": None, "sinks": None} | {name: torch.zeros(2)}
        with pytest.raises(ConfigError, match=r"one number for each of 4 query heads, not \(2,\)"):
            case.attend(CPUPaged(), Padded())


# --- one byte a channel -----------------------------------------------------------------------------------------------


NUMBERS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
NEAR = {"int8": 0.03, "fp8": 0.12}
"""How far attention over what is held may be from attention over what was written, of numbers around 1."""
both_formats = pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])


class Bytes:
    """A case whose contexts are written to caches of one byte a channel, so many tokens at a time."""

    def __init__(
        self, case: Case, kv_dtype: str, *, chunk: int = 1000, scales: str = "block", **params: Any
    ) -> None:
        self.case, self.layout, self.kv_dtype = case, Padded(), kv_dtype
        self.attention = CPUPagedAttention(self.layout, kv_dtype=kv_dtype, scales=scales, **params)
        self.layout.reset(max_rows=len(case.tables), max_blocks=max(map(len, case.tables)))
        for row, table in enumerate(case.tables):
            self.layout.open(row, table)
        self.caches = []
        self.rows = list(range(len(case.tables)))
        for contents in (case.keys, case.values):
            size = contents[0].shape[-1]
            cache = self.attention.allocate(
                case.num_blocks, case.block_size, case.heads, size, dtype=case.dtype, device=CPU
            )
            self.caches.append(cache.fill_(255))
            for at in range(0, max(case.contexts), chunk):
                self.write(cache, contents, at, at + chunk)

    def write(self, cache: torch.Tensor, contents: list[torch.Tensor], start: int, stop: int) -> None:
        size = self.case.block_size
        slots = [
            self.case.tables[s][t // size] * size + t % size
            for s, context in enumerate(self.case.contexts)
            for t in range(start, min(stop, context))
        ]
        new = torch.cat([c[start:stop] for c in contents])
        self.attention.write(cache, new, self.case.batch(self.layout, np.array(slots, np.int64), self.rows))

    def held(self, cache: torch.Tensor, s: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a cache holds of sequence ``s``, and the steps between numbers there: [context, heads, size]."""
        case, table = self.case, self.case.tables[s]
        size = (cache.shape[-1] - 16) // case.block_size
        numbers = cache[table][:, :, :-16].view(NUMBERS[self.kv_dtype]).double()
        numbers = numbers.view(len(table), case.heads, case.block_size, size)
        steps = torch.ones_like(numbers)
        if self.kv_dtype == "fp8":  # three bits after the first one, and 2 ** -9 as the least number
            steps = (2 ** numbers.abs().log2().floor() / 8).clamp_min(2.0**-9)
        scale = scales_of(cache)[table].double()[:, :, None, None]
        parts = (
            x.transpose(1, 2).flatten(0, 1)[: case.contexts[s]] for x in (numbers * scale, steps * scale)
        )
        known, steps = parts
        return known, steps

    def attend(self) -> torch.Tensor:
        batch = self.case.batch(self.layout, self.case.slots(), self.rows)
        return self.attention.attend(self.case.query, *self.caches, batch, **self.case.options)


@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "lengths", [[(1, 170), (1, 1)], [(20, 45), (64, 133), (1, 33)]], ids=["decode", "mixed"]
)
@both_formats
def test_one_byte_a_channel(kv_dtype, lengths, dtype, scales):
    """What was written is held to half a step, and half a step more each time that the scale may have grown.

    Attention is dense attention over what is held, and near the one over what was written.
    """
    shapes: list[dict[str, Any]] = [
        {"block_size": 16, "sliding_window": 40, "head_size": 32, "value_size": 16},
        {"block_size": 7, "soft_cap": 3.0, "head_size": 64, "value_size": 64, "group": 3},
        {"block_size": 64, "head_size": 128, "value_size": 192, "num_kv_heads": 1, "group": 7},
    ]
    for shape in shapes:
        case = Case(lengths, dtype=dtype, **shape)
        exact = case.expected()
        cached = Bytes(case, kv_dtype, chunk=19, scales=scales)
        assert all(cache.dtype == torch.uint8 for cache in cached.caches)
        out = cached.attend()
        assert out.dtype == dtype
        for cache, contents in zip(cached.caches, (case.keys, case.values)):
            for s in range(len(lengths)):
                known, step = cached.held(cache, s)
                written = contents[s].double()
                if scales == "head":
                    largest = LARGEST[kv_dtype] * scales_of(cache)[0].double()[None, :, None]
                    written = written.clamp(-largest, largest)
                times = 1 if scales == "head" else 2 + case.block_size // 19
                assert ((known - written).abs() <= 0.501 * times * step).all()
                contents[s] = known
        assert error(out, case.expected()) < TOLERANCE[dtype]
        assert error(out, exact) < NEAR[kv_dtype]


@both_formats
def test_one_byte_a_channel_in_pieces(kv_dtype):
    """Cut or not, with ALiBi and sinks, the same is read: what is held is compared with itself."""
    outs = []
    for params in ({}, {"batch_invariant": True, "split_tokens": 48}):
        case = Case([(1, 170), (3, 90)], block_size=16, head_size=64)
        case.options |= {"alibi_slopes": torch.tensor([0.1, 0.0, 1.0, 0.5]), "sinks": torch.arange(4.0)}
        outs.append(Bytes(case, kv_dtype, **params).attend())
        assert error(outs[-1], case.expected()) < NEAR[kv_dtype]
    assert not torch.equal(*outs)
    assert error(outs[0], outs[1].double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_formats
def test_registers_and_plain_loops_read_the_same_bytes(kv_dtype, dtype, monkeypatch):
    """Every number of rows and every code that is written, keys that are hidden, and blocks of any length."""
    for group, block_size, window in ((1, 16, None), (2, 5, 70), (8, 1, None), (13, 100, 33)):
        case = Case(
            [(1, 200), (1, 9), (4, 64), (3, 130)],
            group=group,
            block_size=block_size,
            head_size=64,
            value_size=128,
            dtype=dtype,
            sliding_window=window,
        )
        for contents in (*case.keys, *case.values):
            contents *= torch.logspace(-3, 0, contents.shape[-1]).to(dtype)
        cached = Bytes(case, kv_dtype)
        out = cached.attend()
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "fits", lambda *_: False)
            plain = cached.attend()
        assert error(out, plain.double()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_formats
def test_every_byte_is_its_number(kv_dtype, dtype, size):
    """One token sees itself alone: what comes out is what the bytes of its value stand for, times the scale."""
    case = Case([(1, 1)], num_kv_heads=1, group=1, head_size=size, value_size=256, block_size=1, dtype=dtype)
    cached = Bytes(case, kv_dtype)
    codes = torch.arange(256).to(torch.uint8)
    codes[128] = 0 if kv_dtype == "int8" else 128  # -128 is never written
    cached.caches[1][case.tables[0][0], 0, :256] = codes
    scales_of(cached.caches[1]).fill_(4.0)
    out, wanted = cached.attend().flatten().float(), 4 * codes.view(NUMBERS[kv_dtype]).float()
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.nan_to_num(), wanted.nan_to_num())


def test_fp8_rounds_as_torch_does():
    """Numbers at, between and beyond those of e4m3, and any bits at all, under a scale of 1; the largest saturate."""
    numbers = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    some = torch.randint(-(2**31), 2**31, (50_000,), generator=torch.Generator().manual_seed(1))
    edges = torch.tensor(
        [0.0, 1e-45, 2.0**-10, 3 * 2.0**-11, 1e-9, 463.9, 464.0, 1e30, float("inf"), float("nan")]
    )
    x = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, edges])
    near = torch.cat([x.nextafter(x + 1), x.nextafter(x - 1)])
    x = torch.cat([x, near, -x, some.int().view(torch.float32), some / 2**26])
    x = torch.cat([x, torch.zeros(-len(x) % 16)]).view(-1, 1, 16)
    case, layout = Case([(1, 1 + len(x))], block_size=1 + len(x)), Padded()
    layout.reset(max_rows=1, max_blocks=1)
    attention = CPUPagedAttention(layout, kv_dtype="fp8", scales="head")
    cache = attention.allocate(1, 1 + len(x), 1, 16, dtype=torch.float32, device=CPU)
    attention.write(cache, torch.full((1, 1, 16), 224.0), case.batch(layout, np.arange(1), [0]))
    attention.write(cache, x, case.batch(layout, 1 + np.arange(len(x)), [0]))
    assert scales_of(cache).item() == 1
    held, nan = cache[0, 0, 16:-16], x.flatten().isnan()
    wanted = x.clamp(-448, 448).to(torch.float8_e4m3fn).flatten()
    assert torch.equal(held[~nan], wanted.view(torch.uint8)[~nan])
    assert held.view(torch.float8_e4m3fn).float().isnan()[nan].all()


@both_formats
def test_scales_are_by_the_largest_channel_and_only_grow(kv_dtype):
    """A power of two for fp8, so that what is held already is rounded again without loss but of the smallest."""
    case = Case([(1, 16)], block_size=16, head_size=64)
    case.keys[0][7:] *= 8
    once, twice = Bytes(case, kv_dtype).caches[0], Bytes(case, kv_dtype, chunk=7).caches[0]
    table = case.tables[0]
    largest = case.keys[0].abs().amax((0, 2))
    scales = scales_of(once)[table[0]]
    assert torch.equal(scales, scales_of(twice)[table[0]])
    if kv_dtype == "int8":
        assert torch.equal(scales, largest / 127)
        return
    assert torch.equal(scales.log2(), scales.log2().round())
    assert ((largest <= 448 * scales) & (largest > 224 * scales)).all()
    differ = once[table] != twice[table]
    assert (case.keys[0].transpose(0, 1).flatten(1)[differ[0, :, :-16]].abs() < 0.02).all()


@both_formats
def test_a_nan_stays_a_nan_in_one_byte(kv_dtype):
    for size in (16, 64):
        case = Case([(1, 20), (1, 20)], block_size=16, head_size=size)
        case.keys[1][17, 0, 3] = float("nan")
        out = Bytes(case, kv_dtype).attend()
        assert out[0].isfinite().all()
        assert out[1, :2].isnan().all()
        assert out[1, 2:].isfinite().all()


@both_formats
def test_a_nan_outlives_what_is_written_later(kv_dtype):
    """The scale grows and all is rounded again: int8 has lost the head's block, fp8 the one number."""
    case = Case([(1, 16)], block_size=16)
    case.keys[0][3, 1, 5] = float("nan")
    case.keys[0][7:] *= 100
    cached = Bytes(case, kv_dtype, chunk=7)
    known, _ = cached.held(cached.caches[0], 0)
    wanted = torch.zeros(16, 2, 16, dtype=torch.bool)
    wanted[(slice(None), 1) if kv_dtype == "int8" else (3, 1, 5)] = True
    assert torch.equal(known.isnan(), wanted)
    torch.testing.assert_close(known[~wanted], case.keys[0].double()[~wanted], rtol=0.125, atol=2.0)


@both_formats
def test_a_block_that_is_used_again_begins_a_new_scale(kv_dtype):
    case = Case([(1, 16)], block_size=16)
    cached = Bytes(case, kv_dtype)
    case.keys[0] *= 1000
    cached.write(cached.caches[0], case.keys, 0, 16)
    case.keys[0] /= 1000
    cached.write(cached.caches[0], case.keys, 0, 16)
    assert torch.equal(cached.caches[0], Bytes(case, kv_dtype).caches[0])


@both_formats
def test_equal_bytes_give_equal_bits(kv_dtype, two_threads, monkeypatch):
    """On two threads again and again; with pieces of a fixed length also alone, in a crowd and on one thread."""
    monkeypatch.setattr(cpu, "SHORTEST_PIECE", 64)
    case = Case([(1, 600)], num_kv_heads=1, block_size=16, head_size=64)
    crowd = Case([(1, 600)] * 9, num_kv_heads=1, block_size=16, head_size=64)
    crowd.query[0], crowd.keys[0], crowd.values[0] = case.query[0], case.keys[0], case.values[0]
    free = Bytes(case, kv_dtype)
    out = free.attend()
    assert all(torch.equal(free.attend(), out) for _ in range(5))
    assert not torch.equal(Bytes(crowd, kv_dtype).attend()[0], out[0])
    fixed = {"batch_invariant": True, "split_tokens": 128}
    alone = Bytes(case, kv_dtype, **fixed).attend()
    assert torch.equal(Bytes(crowd, kv_dtype, **fixed).attend()[0], alone[0])
    torch.set_num_threads(1)
    assert torch.equal(Bytes(case, kv_dtype, **fixed).attend(), alone)


@both_formats
def test_copies_of_blocks_take_their_scales_along(kv_dtype):
    """Out to the host and back into other blocks, and a copy-on-write: the same bits come out."""
    prompt = prompts()[1][:10]
    said, params = [], {"kv_dtype": kv_dtype}
    for moved in (False, True):
        executor = ModelExecutor(
            build("Llama", torch.float32, head_dim=16),
            layout=Padded(),
            kernel=CPUPaged.from_params(params),
            poison=True,
        )
        executor.prepare(num_blocks=12, block_size=4, host_blocks=6, max_num_seqs=4)
        run(executor, one(0, prompt[:9], [1, 2, 3], samples=0))
        table = [1, 2, 3]
        if moved:
            executor.move(deque(Move(DEVICE, block, HOST, block + 1) for block in table))
            for cache in executor._tiers[DEVICE]:
                cache.fill_(255)
            executor.move(deque(Move(HOST, block + 1, DEVICE, block + 4) for block in table))
            executor.move(deque([Move(DEVICE, 7, DEVICE, 9)]))
            table = [5, 6, 9]
        step = one(0, prompt[9:], table, start=9, version=int(moved))
        run(executor, step)
        said.append([cache[table].clone() for cache in executor._tiers[DEVICE]])
        executor.release()
    for before, after in zip(*said, strict=True):
        assert torch.equal(scales_of(before), scales_of(after))
        assert torch.equal(before[:2], after[:2])
        assert torch.equal(before[2, :, : 2 * 16], after[2, :, : 2 * 16])


@both_formats
def test_a_model_with_one_byte_a_channel(kv_dtype):
    """Through the executor: blocks are smaller, and logits are near those of the model's own dtype."""
    model = build("Llama", torch.float32, head_dim=16)
    logits, weights = [], []
    for params in ({}, {"kv_dtype": kv_dtype}):
        executor = ModelExecutor(model, layout=Padded(), kernel=CPUPaged.from_params(params), poison=True)
        logits.append(logits_of(executor, prompts()))
        weights.append(executor.kv_bytes_per_block)
        executor.release()
    far = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < far < (0.15 if kv_dtype == "int8" else 0.5)
    assert weights[1] < weights[0] / 2


@pytest.mark.parametrize("scales", ["block", "head"])
@both_formats
def test_the_laws_of_a_kernel_allow_for_what_it_rounds_away(kv_dtype, scales):
    kernel = CPUPaged(kv_dtype=kv_dtype, scales=scales)
    rows = {row.check: row.status for row in pl.check_policy(kernel)}
    assert rows["agrees_with_dense"] == rows["unused_slots_cannot_leak"] == "passed"

    class Exact(CPUPaged):
        rounding = 0.0

    rows = {row.check: row for row in pl.check_policy(Exact(kv_dtype=kv_dtype), on_fail=None)}
    assert "relative error 0.0" in rows["agrees_with_dense"].detail


def test_what_one_byte_cannot_serve_is_named():
    attention = CPUPagedAttention(Padded(), kv_dtype="fp8")
    with pytest.raises(
        ConfigError, match="'cpu-paged' keeps one byte a channel for heads of a multiple of 16"
    ):
        attention.allocate(3, 16, 2, 20, dtype=torch.float32, device=CPU)
    cached = Bytes(Case([(1, 16)], block_size=16), "int8")
    with pytest.raises(ConfigError, match="a cache of 272 bytes a head is not of 16 tokens of 8"):
        cached.write(cached.caches[0], [torch.zeros(16, 2, 8)], 0, 16)
    with pytest.raises(ConfigError, match="kv_dtype must be one of model, fp8, int8"):
        CPUPaged(kv_dtype="e5m2")
