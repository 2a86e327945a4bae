"""Law 4: every kernel equals dense attention for every shape it accepts; slots that it must not read cannot leak."""

from __future__ import annotations

import threading
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import pagedlab as pl
import pagedlab.kernels.layouts as layouts
from pagedlab.errors import ConfigError
from pagedlab.kernels.base import AttentionBatch, PagedAttention
from pagedlab.kernels.dense import dense_attention
from pagedlab.kernels.layouts import BlockOf
from pagedlab.policies.kernel import CPUPaged, Dense, GatherSDPA, Kernel, TritonPaged
from pagedlab.policies.layout import CSR, Layout, Padded
from pagedlab.registry import lookup_class, policy_names

KERNELS = [Dense, GatherSDPA, CPUPaged]
LAYOUTS = [lookup_class("layout", name) for name in policy_names("layout")]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices are slower on several threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def implementation(kernel: Kernel, layout: Layout) -> PagedAttention:
    module, _, attribute = kernel.implementation.partition(":")
    return getattr(import_module(module), attribute)(layout, **kernel.get_params())


class Case:
    """A random batch, and its keys and values both contiguous (per sequence) and in blocks of random physical order."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        *,
        seed: int = 0,
        num_kv_heads: int = 2,
        group: int = 2,
        head_size: int = 16,
        value_size: int | None = None,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.queries, self.contexts = [q for q, _ in lengths], [t for _, t in lengths]
        self.heads, self.size, self.value_size = num_kv_heads, head_size, value_size or head_size
        self.block_size, self.dtype = block_size, dtype
        self.options: dict[str, Any] = {
            "scale": head_size**-0.5,
            "sliding_window": sliding_window,
            "soft_cap": soft_cap,
        }
        self.query = self.random(sum(self.queries), num_kv_heads * group, head_size)
        self.keys = [self.random(t, num_kv_heads, head_size) for t in self.contexts]
        self.values = [self.random(t, num_kv_heads, self.value_size) for t in self.contexts]
        needed = [-(-t // block_size) for t in self.contexts]
        self.num_blocks = sum(needed) + 3
        order = torch.randperm(self.num_blocks, generator=self.rng).tolist()
        self.tables = [[order.pop() for _ in range(n)] for n in needed]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64).to(self.dtype)

    def slots(self, first: list[int] | None = None) -> np.ndarray:
        return np.concatenate(
            [
                np.array(
                    [self.tables[s][t // self.block_size] * self.block_size + t % self.block_size], np.int64
                )
                for s, length in enumerate(self.contexts)
                for t in range((first or [0] * len(self.contexts))[s], length)
            ]
        )

    def expected(self) -> torch.Tensor:
        """Attention in float64 from the same rounded inputs."""
        parts, at = [], 0
        for q, k, v in zip(self.queries, self.keys, self.values):
            parts.append(
                dense_attention(self.query[at : at + q].double(), k.double(), v.double(), **self.options)
            )
            at += q
        return torch.cat(parts)

    def batch(self, layout: Layout, slots: np.ndarray, rows: list[int]) -> AttentionBatch:
        entries, index = layout.arrays()
        return AttentionBatch(
            query_start=np.concatenate([[0], np.cumsum(self.queries)]).astype(np.int32),
            context_lens=np.array(self.contexts, np.int32),
            rows=np.array(rows, np.int32),
            slots=slots,
            entries=entries,
            index=index,
            block_size=self.block_size,
            max_query_len=max(self.queries),
            max_context_len=max(self.contexts),
        )

    def attend(self, kernel: Kernel, layout: Layout) -> torch.Tensor:
        """Write the context through the kernel into poisoned caches, forget what no query sees, and attend."""
        layout.reset(max_rows=len(self.contexts) + 2, max_blocks=max(map(len, self.tables)))
        rows = torch.randperm(len(self.contexts) + 2, generator=self.rng).tolist()[: len(self.contexts)]
        for row, table in zip(rows, self.tables):
            layout.open(row, table[:1])
            layout.append(row, table[1:])
        attention = implementation(kernel, layout)
        window = self.options["sliding_window"]
        first = [
            0 if window is None else max(0, t - q + 1 - window) for q, t in zip(self.queries, self.contexts)
        ]
        caches = []
        for contents, size in ((self.keys, self.size), (self.values, self.value_size)):
            cache = attention.allocate(
                self.num_blocks, self.block_size, self.heads, size, dtype=self.dtype, device=CPU
            )
            cache.fill_(float("nan"))
            visible = torch.cat([c[at:] for c, at in zip(contents, first)])
            attention.write(cache, visible, self.batch(layout, self.slots(first), rows))
            caches.append(cache)
        return attention.attend(
            self.query, caches[0], caches[1], self.batch(layout, self.slots(), rows), **self.options
        )


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@st.composite
def cases(draw, **fixed):
    def one(name, strategy):
        return fixed[name] if name in fixed else draw(strategy)

    lengths = []
    for _ in range(draw(st.integers(1, 5))):
        context = draw(st.integers(1, 90) | st.integers(1, 12))
        query = draw(st.just(1) | st.just(context) | st.integers(1, context))
        lengths.append((query, context))
    return Case(
        lengths,
        seed=draw(st.integers(0, 1000)),
        num_kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 3, 7])),
        head_size=draw(st.sampled_from([8, 16, 20, 64])),
        value_size=draw(st.sampled_from([None, None, None, 12])),
        block_size=draw(st.sampled_from([1, 2, 3, 16]) | st.integers(1, 33)),
        dtype=one("dtype", st.sampled_from(list(TOLERANCE))),
        sliding_window=draw(st.none() | st.integers(1, 100)),
        soft_cap=draw(st.sampled_from([None, None, 1.5, 30.0])),
    )


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda cls: cls.name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda cls: cls.name)
@settings(deadline=None)
@given(case=cases())
def test_equals_dense_attention_and_nothing_leaks(kernel, layout, case):
    out = case.attend(kernel(), layout())
    assert out.shape == (*case.query.shape[:2], case.value_size)
    assert out.dtype == case.dtype
    assert error(out, case.expected()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda cls: cls.name)
def test_long_and_mixed_batch(kernel, dtype):
    """More than one tile of queries and of keys, decode beside prefill, group larger than a tile of rows."""
    lengths = [(1, 700), (200, 200), (65, 300), (1, 1), (1, 64), (1, 65)]
    for shape in ({"group": 3}, {"num_kv_heads": 1, "group": 35}, {"head_size": 64}, {"head_size": 128}):
        case = Case(lengths, block_size=16, dtype=dtype, **shape)
        assert error(case.attend(kernel(), CSR()), case.expected()) < TOLERANCE[dtype]


def test_the_yardstick_is_attention():
    case = Case([(5, 9)], dtype=torch.float64)
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = scaled_dot_product_attention(
        case.query.transpose(0, 1),
        case.keys[0].transpose(0, 1),
        case.values[0].transpose(0, 1),
        attn_mask=mask,
        enable_gqa=True,
    ).transpose(0, 1)
    out = dense_attention(case.query, case.keys[0], case.values[0], **case.options)
    assert error(out, expected) < 1e-14


def test_the_yardstick_knows_alibi_and_sinks():
    """ALiBi is a bias of torch's own attention; a sink takes its share of the softmax and gives nothing."""
    case = Case([(5, 9)], dtype=torch.float64)
    slopes, sinks = torch.tensor([0.5, 0.25, 2.0, 0.0]), torch.tensor([1.0, -3.0, 0.0, 20.0]).double()
    distance = torch.arange(4, 9)[:, None] - torch.arange(9)
    bias = (-slopes.double()[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))
    query, keys, values = (x.transpose(0, 1) for x in (case.query, case.keys[0], case.values[0]))
    plain = scaled_dot_product_attention(query, keys, values, attn_mask=bias, enable_gqa=True).transpose(0, 1)
    options = {**case.options, "alibi_slopes": slopes}
    arguments = case.query, case.keys[0], case.values[0]
    assert error(dense_attention(*arguments, **options), plain) < 1e-14
    scores = query @ keys.repeat_interleave(2, dim=0).transpose(1, 2) * case.options["scale"] + bias
    share = torch.sigmoid(scores.logsumexp(-1) - sinks[:, None])  # [heads, queries]
    out = dense_attention(*arguments, **options, sinks=sinks)
    assert error(out, plain * share.transpose(0, 1)[:, :, None]) < 1e-14


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda cls: cls.name)
def test_alibi_and_sinks(kernel, dtype):
    """Each alone and both, beside a window and a soft cap; one number for each query head."""
    slopes, sinks = torch.tensor([0.5, 0.1, 1.0, 0.0]), torch.tensor([3.0, -20.0, 0.0, float("-inf")])
    for options in ({"alibi_slopes": slopes}, {"sinks": sinks}, {"alibi_slopes": slopes, "sinks": sinks}):
        for others in ({}, {"sliding_window": 9}, {"soft_cap": 1.5}):
            case = Case([(1, 90), (7, 12), (1, 1), (40, 130)], head_size=64, dtype=dtype, **others)
            case.options |= options
            assert error(case.attend(kernel(), Padded()), case.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("head_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_output_does_not_depend_on_the_company(dtype, head_size):
    """Contexts of one piece and of many, chunks of one tile of queries and of many."""
    invariant = CPUPaged(batch_invariant=True, split_tokens=64)
    lengths = [(1, 300), (40, 130), (1, 7), (97, 97), (3, 900)]
    together = Case(lengths, dtype=dtype, block_size=16, head_size=head_size)
    try:
        outs = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append(together.attend(invariant, Padded()))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(1)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    at = 0
    for s, (q, t) in enumerate(lengths):
        alone = Case([(q, t)], dtype=dtype, block_size=16, head_size=head_size)
        alone.query = together.query[at : at + q]
        alone.keys, alone.values = [together.keys[s]], [together.values[s]]
        assert torch.equal(alone.attend(invariant, Padded()), outs[0][at : at + q])
        at += q


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda cls: cls.name)
def test_a_nan_of_the_model_stays_a_nan(kernel):
    case = Case([(1, 70), (1, 70)], block_size=16)
    case.keys[1][40, 0, 3] = float("nan")
    out = case.attend(kernel(), Padded())
    assert out[0].isfinite().all()
    assert out[1, :2].isnan().all()
    assert out[1, 2:].isfinite().all()


@pytest.mark.parametrize("block_size", [1, 5, 16, 100])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 70}, {"sliding_window": 9, "soft_cap": 5.0}], ids=str
)
@pytest.mark.parametrize("sizes", [{"head_size": 64}, {"head_size": 32, "value_size": 128}], ids=str)
def test_wide_heads_of_bfloat16(sizes, options, block_size):
    """The sizes that AVX-512 has its own loops for: odd groups, odd blocks, windows, no slot read that is not ours."""
    lengths = [(1, 130), (31, 64), (1, 1), (20, 100), (1, 65)]
    case = Case(lengths, group=5, block_size=block_size, dtype=torch.bfloat16, **sizes, **options)
    assert error(case.attend(CPUPaged(), CSR()), case.expected()) < TOLERANCE[torch.bfloat16]
    case = Case([(1, 70), (1, 70)], block_size=block_size, dtype=torch.bfloat16, **sizes)
    case.keys[1][40, 0, 3] = float("nan")
    out = case.attend(CPUPaged(), Padded())
    assert out[0].isfinite().all()
    assert out[1, :2].isnan().all()
    assert out[1, 2:].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda cls: cls.name)
def test_scores_beyond_the_range_of_exp(kernel):
    case = Case([(1, 100), (30, 100)], head_size=64)
    case.query *= 1000
    assert error(case.attend(kernel(), Padded()), case.expected()) < 1e-4


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda cls: cls.name)
@settings(deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from([1, 8, 20, 64]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_write_fills_its_slots_and_no_other(kernel, block_size, heads, size, dtype, strided, random):
    num_blocks = 6
    slots = random.sample(range(num_blocks * block_size), random.randint(1, num_blocks * block_size))
    attention = implementation(kernel(), Padded())
    cache = attention.allocate(num_blocks, block_size, heads, size, dtype=dtype, device=CPU).fill_(
        float("nan")
    )
    shape = (heads, len(slots), size) if strided else (len(slots), heads, size)
    new = torch.randn(shape).to(dtype)
    new = new.transpose(0, 1) if strided else new
    case = Case([(1, 1)])
    layout = Padded()
    layout.reset(max_rows=1, max_blocks=1)
    attention.write(cache, new, case.batch(layout, np.array(slots, np.int64), [0]))

    assert attention.axis_order[0] == "block"
    canonical = cache.permute([attention.axis_order.index(a) for a in ("block", "token", "head", "channel")])
    flat = canonical.reshape(num_blocks * block_size, heads, size)
    assert torch.equal(flat[slots], new)
    untouched = sorted(set(range(len(flat))) - set(slots))
    assert flat[untouched].isnan().all()


def test_threads_may_attend_at_once():
    cases = [Case([(1, 200), (30, 60)], seed=seed, block_size=16) for seed in range(4)]
    worst: list[float] = []

    def work(case: Case) -> None:
        for _ in range(5):
            worst.append(error(case.attend(CPUPaged(), Padded()), case.expected()))

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 20
    assert max(worst) < 1e-5


class Reversed(Padded):
    """A layout of a user: the padded matrix from right to left, its device function a plain Python function."""

    device_functions = "pagedlab.kernels.layouts:reversed_matrix"

    def arrays(self):
        entries, index = super().arrays()
        return np.ascontiguousarray(entries.reshape(-1, index[0])[:, ::-1]).reshape(-1), index


def _block_of(entries, index, row, i):
    return entries[(row + 1) * index[0] - 1 - i]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda cls: cls.name)
def test_a_new_layout_runs_with_every_kernel(kernel, monkeypatch):
    monkeypatch.setattr(layouts, "reversed_matrix", BlockOf(_block_of, _block_of), raising=False)
    case = Case([(1, 50), (20, 33)])
    assert error(case.attend(kernel(), Reversed()), case.expected()) < 1e-5


def test_resolve_answers_or_names_what_is_supported():
    dense = Dense()
    assert dense.resolve("cuda:1", "float16") is dense
    assert isinstance(pl.make("kernel", "auto").resolve("cpu", "bfloat16"), CPUPaged)
    auto = pl.make("kernel", "auto")
    assert isinstance(auto.resolve("cuda", "bfloat16"), TritonPaged if find_spec("triton") else GatherSDPA)
    assert isinstance(auto.resolve("cuda", "float64"), GatherSDPA)
    with pytest.raises(ConfigError, match="'cpu-paged' runs on cpu, not on 'cuda'"):
        CPUPaged().resolve("cuda", "float32")
    with pytest.raises(ConfigError, match="float32, bfloat16, float16, float64, not 'float8_e4m3fn'"):
        pl.make("kernel", "auto").resolve("cpu", "float8_e4m3fn")
