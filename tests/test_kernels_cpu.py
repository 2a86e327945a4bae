"""The CPU kernel: contexts cut into pieces, equal bits for equal inputs, and caches of one byte a channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_kernels import CPU, TOLERANCE, Case, error
from test_model_executor import build, prompts, serve

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


class Bytes:
    """A case whose contexts are written to caches of one byte a channel, so many tokens at a time."""

    def __init__(self, case: Case, *, chunk: int = 1000, scales: str = "block", **params: Any) -> None:
        self.case, self.layout = case, Padded()
        self.attention = CPUPagedAttention(self.layout, kv_dtype="int8", scales=scales, **params)
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
        numbers = cache[table][:, :, :-16].view(torch.int8).double()
        numbers = numbers.view(len(table), case.heads, case.block_size, size)
        steps = scales_of(cache)[table].double()[:, :, None, None].expand_as(numbers)
        known, steps = (x.transpose(1, 2).flatten(0, 1)[: case.contexts[s]] for x in (numbers * steps, steps))
        return known, steps

    def attend(self) -> torch.Tensor:
        batch = self.case.batch(self.layout, self.case.slots(), self.rows)
        return self.attention.attend(self.case.query, *self.caches, batch, **self.case.options)


@pytest.mark.parametrize("scales", ["block", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "lengths", [[(1, 170), (1, 1)], [(20, 45), (64, 133), (1, 33)]], ids=["decode", "mixed"]
)
def test_one_byte_a_channel(lengths, dtype, scales):
    """What was written is held to half a step, and half a step more each time that the scale may have grown.

    Attention is dense attention over what is held, and near the one over what was written.
    """
    shapes: list[dict[str, Any]] = [
        {"block_size": 16, "sliding_window": 40},
        {"block_size": 7, "soft_cap": 3.0},
    ]
    for shape in (*shapes, {"block_size": 64, "head_size": 128}):
        case = Case(lengths, dtype=dtype, value_size=16, **{"head_size": 32} | shape)
        exact = case.expected()
        cached = Bytes(case, chunk=19, scales=scales)
        assert all(cache.dtype == torch.uint8 for cache in cached.caches)
        out = cached.attend()
        for cache, contents in zip(cached.caches, (case.keys, case.values)):
            for s in range(len(lengths)):
                known, step = cached.held(cache, s)
                written = contents[s].double()
                written = written if scales == "block" else written.clamp(-127 * step, 127 * step)
                times = 1 if scales == "head" else 2 + case.block_size // 19
                assert ((known - written).abs() <= 0.501 * times * step).all()
                contents[s] = known
        assert error(out, case.expected()) < TOLERANCE[dtype]
        assert error(out, exact) < 0.03


def test_one_byte_a_channel_in_pieces():
    """Cut or not, with ALiBi and sinks, the same is read: what is held is compared with itself."""
    outs = []
    for params in ({}, {"batch_invariant": True, "split_tokens": 48}):
        case = Case([(1, 170), (3, 90)], block_size=16)
        case.options |= {"alibi_slopes": torch.tensor([0.1, 0.0, 1.0, 0.5]), "sinks": torch.arange(4.0)}
        outs.append(Bytes(case, **params).attend())
        assert error(outs[-1], case.expected()) < 0.03
    assert not torch.equal(*outs)
    assert error(outs[0], outs[1].double()) < 1e-6


def test_a_nan_stays_a_nan_in_one_byte():
    case = Case([(1, 20), (1, 20)], block_size=16)
    case.keys[1][17, 0, 3] = float("nan")
    out = Bytes(case).attend()
    assert out[0].isfinite().all()
    assert out[1, :2].isnan().all()
    assert out[1, 2:].isfinite().all()


def test_a_block_that_is_used_again_begins_a_new_scale():
    case = Case([(1, 16)], block_size=16)
    cached = Bytes(case)
    case.keys[0] *= 1000
    cached.write(cached.caches[0], case.keys, 0, 16)
    case.keys[0] /= 1000
    cached.write(cached.caches[0], case.keys, 0, 16)
    assert torch.equal(cached.caches[0], Bytes(case).caches[0])


def test_a_model_with_one_byte_a_channel():
    """Through the executor: blocks are smaller, and the first token, which reads little, is the same."""
    model = build("Llama", torch.float32, head_dim=16)
    said, weights = [], []
    for params in ({}, {"kv_dtype": "int8"}):
        executor = ModelExecutor(model, layout=Padded(), kernel=CPUPaged.from_params(params), poison=True)
        said.append(serve(executor, prompts(lengths=(3, 9)), 3, seed=3))
        weights.append(executor.kv_bytes_per_block)
        executor.release()
    assert [s[0] for s in said[0]] == [s[0] for s in said[1]]
    assert weights[1] < weights[0] / 2


def test_what_one_byte_cannot_serve_is_named():
    attention = CPUPagedAttention(Padded(), kv_dtype="int8")
    with pytest.raises(
        ConfigError, match="'cpu-paged' keeps one byte a channel for heads of a multiple of 16"
    ):
        attention.allocate(3, 16, 2, 20, dtype=torch.float32, device=CPU)
    cached = Bytes(Case([(1, 16)], block_size=16))
    with pytest.raises(ConfigError, match="a cache of 272 bytes a head is not of 16 tokens of 8"):
        cached.write(cached.caches[0], [torch.zeros(16, 2, 8)], 0, 16)
