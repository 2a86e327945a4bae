"""How fast does paged decoding read the KV cache on a GPU, next to dense attention and to a plain copy?

One token of each sequence, 32 query heads over 8 KV heads of 128 (Llama-3.1-8B) in bfloat16. Beside `triton-paged` over
each layout and block size run the flash backend of torch's scaled_dot_product_attention on contiguous keys and values,
in both ways to ask it for grouped heads (``ratio_dense`` compares with the faster), flex_attention where it compiles,
FlashInfer's paged decoding where it is installed, and a copy. Contenders take turns, and go round through buffers that
together are larger than the L2 cache. Each is captured as a CUDA graph where that can be done (``graph``), so that the
GPU is measured and not the Python around it.

`triton-paged` is tuned first: ``launch`` is what it chose, ``gain`` how many times as fast as the rule that was. The
choices go where a run finds them; ``PAGEDLAB_TUNING=off`` measures the rule.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pagedlab.bench.kernel import chunk_batch
from pagedlab.kernels.base import AttentionBatch
from pagedlab.policies.layout import CSR, Layout, Padded

if TYPE_CHECKING:
    from pagedlab.kernels.triton.paged import TritonPagedAttention

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 32, 8, 128
SCALE = HEAD_SIZE**-0.5
POINTS = ((1, 32_768), (8, 32_768), (16, 1024), (16, 8192), (64, 2048), (64, 8192), (256, 1024))
"""Sequences, tokens of context of each."""

Event: Any = torch.cuda.Event
Form = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A contender: attention (or a copy) over keys and values [num_seqs, num_kv_heads, context_len, head_size]."""
Key = tuple[str, str, int | None]
"""A contender's kernel, layout and block size."""


@dataclass
class Paged:
    """The contender `triton-paged`."""

    attention: TritonPagedAttention
    query: torch.Tensor
    shape: tuple[int, ...]
    batch: AttentionBatch

    def __call__(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend over keys and values [num_seqs, num_kv_heads, context_len, head_size], cut into blocks."""
        caches = key.view(self.shape), value.view(self.shape)
        return self.attention.attend(self.query, *caches, self.batch, scale=SCALE)


def forms(
    query: torch.Tensor, context_len: int, block_sizes: Iterable[int], rng: torch.Generator
) -> dict[Key, Form]:
    """Return the contenders by kernel, layout and block size; ``query`` [num_seqs, num_heads, head_size]."""
    from pagedlab.kernels.triton.paged import TritonPagedAttention

    num_seqs, device = len(query), query.device
    alone = query[:, :, None]
    grouped = query.view(num_seqs, NUM_KV_HEADS, -1, HEAD_SIZE)
    flash = [SDPBackend.FLASH_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH]
    target = torch.empty(num_seqs, NUM_KV_HEADS, context_len, HEAD_SIZE, dtype=query.dtype, device=device)

    def with_gqa(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(flash):
            return sdpa(alone, k, v, enable_gqa=True)

    def regrouped(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(flash):
            return sdpa(grouped, k, v)

    def copy(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return target.copy_(k)

    def paged(layout: Layout, block_size: int) -> Form:
        batch = chunk_batch(layout, num_seqs, 1, context_len, block_size, rng)
        shape = (num_seqs * context_len // block_size, NUM_KV_HEADS, block_size, HEAD_SIZE)
        return Paged(TritonPagedAttention(layout, autotune=True), query, shape, batch)

    made: dict[Key, Form] = {
        ("sdpa enable_gqa", "contiguous", None): with_gqa,
        ("sdpa regrouped", "contiguous", None): regrouped,
        ("copy", "contiguous", None): copy,
    }
    for block_size in block_sizes:
        if (wrapped := _flashinfer(query, context_len, block_size, rng)) is not None:
            made["flashinfer", "csr", block_size] = wrapped
    if (flex := _flex(alone)) is not None:
        made["flex_attention", "contiguous", None] = flex
    for layout, block_size in itertools.product((Padded, CSR), block_sizes):
        made["triton-paged", layout.name, block_size] = paged(layout(), block_size)
    return made


def _flex(query: torch.Tensor) -> Form | None:
    """Return compiled flex_attention, or None where torch has none or no GPU is there to compile for."""
    if query.device.type != "cuda":
        return None
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        return None
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda k, v: compiled(query, k, v, enable_gqa=True)


def _flashinfer(query: torch.Tensor, context_len: int, block_size: int, rng: torch.Generator) -> Form | None:
    """Return FlashInfer's paged decoding over blocks in random order, or None where it is not installed."""
    try:
        flashinfer: Any = import_module("flashinfer")
    except ImportError:
        return None
    num_seqs, per_seq, device = len(query), context_len // block_size, query.device
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    wrapper.plan(
        torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * per_seq,
        torch.randperm(num_seqs * per_seq, generator=rng).to(device, torch.int32),
        torch.full((num_seqs,), block_size, dtype=torch.int32, device=device),
        NUM_HEADS,
        NUM_KV_HEADS,
        HEAD_SIZE,
        block_size,
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
    )
    shape = (num_seqs * per_seq, NUM_KV_HEADS, block_size, HEAD_SIZE)

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = wrapper.run(query, (k.view(shape), v.view(shape)))
        return out

    return attend


def measure(
    *,
    points: Iterable[tuple[int, int]] = POINTS,
    block_sizes: Iterable[int] = (16, 32),
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 20,
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Return one row per point, kernel, layout and block size."""
    rows: list[dict[str, Any]] = []
    sizes = list(block_sizes)
    rng = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for num_seqs, context_len in points:
            shape = (2, num_seqs, NUM_KV_HEADS, context_len, HEAD_SIZE)
            nbytes = 2 * num_seqs * NUM_KV_HEADS * context_len * HEAD_SIZE * dtype.itemsize
            buffers = [
                torch.randn(shape, dtype=dtype, device=device) for _ in range(_num_buffers(nbytes, device))
            ]
            query = torch.randn(num_seqs, NUM_HEADS, HEAD_SIZE, dtype=dtype, device=device)
            contenders = forms(query, context_len, sizes, rng)
            times, graphs = race(contenders, buffers, rounds)
            made = rows_of(times, graphs, nbytes, dtype, num_seqs, context_len)
            rows += [
                row | chosen(contenders[row["kernel"], row["layout"], row["block_size"]]) for row in made
            ]
    return rows


def race(
    contenders: dict[Key, Form], buffers: list[torch.Tensor], rounds: int
) -> tuple[dict[Key, list[float]], dict[Key, bool]]:
    """Let contenders take turns; return the seconds of one call of each in every round, and which ran as a graph.

    One that cannot run here is left out with a warning.
    """
    timers: dict[Key, tuple[Callable[[], float], bool]] = {}
    for key, form in contenders.items():
        try:
            timers[key] = _timer(form, buffers)
        except (RuntimeError, NotImplementedError) as error:
            warnings.warn(f"{key[0]} cannot run here: {str(error)[:200]}", stacklevel=3)
    times: dict[Key, list[float]] = {key: [] for key in timers}
    for _ in range(rounds):
        for key, (timer, _) in timers.items():
            times[key].append(timer())
    return times, {key: graph for key, (_, graph) in timers.items()}


def chosen(form: Form) -> dict[str, Any]:
    """Return the launch that a contender took, and its gain over the rule, where that was a choice."""
    if not isinstance(form, Paged):
        return {"launch": None, "gain": None}
    settled = list(form.attention.tuner.settled.values())
    return (
        {"launch": str(settled[0].launch), "gain": settled[0].gain}
        if settled
        else {"launch": "rule", "gain": None}
    )


def rows_of(
    times: dict[Key, list[float]],
    graphs: dict[Key, bool],
    nbytes: int,
    dtype: torch.dtype,
    num_seqs: int,
    context_len: int,
) -> list[dict[str, Any]]:
    """Return the rows of one point from the seconds that one call of each contender took."""
    median = {key: statistics.median(seconds) for key, seconds in times.items()}
    dense = min((s for (name, _, _), s in median.items() if name.startswith("sdpa")), default=None)
    copy = median["copy", "contiguous", None]
    return [
        {
            "num_seqs": num_seqs,
            "context_len": context_len,
            "dtype": str(dtype).removeprefix("torch."),
            "kernel": name,
            "layout": layout,
            "block_size": block_size,
            "gb_per_s": nbytes / median[name, layout, block_size] / 1e9,
            "gb_per_s_best": nbytes / min(seconds) / 1e9,
            "ratio_dense": None if dense is None else dense / median[name, layout, block_size],
            "ratio_copy": copy / median[name, layout, block_size],
            "graph": graphs[name, layout, block_size],
        }
        for (name, layout, block_size), seconds in times.items()
    ]


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, point by point, what the best layout and block size of `triton-paged` reach: of decoding the share of a
    copy's bandwidth, of chunks that of a matrix product's rate, and how many times as fast as dense attention they are.
    """
    columns = ("ratio_copy", "ratio_matmul", "ratio_dense", "ratio_sdpa")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row.get("kernel") == "triton-paged" and "graph" in row:
            point = {name: row.get(name) for name in ("dtype", "num_seqs", "query_len", "context_len")}
            best = found.setdefault(tuple(point.values()), point)
            for name in columns:
                values = [x for x in (best.get(name), row.get(name)) if x is not None]
                best[name] = max(values, default=None)
    return list(found.values())


def _num_buffers(nbytes: int, device: str) -> int:
    if device == "cpu":
        return 2
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, min(64, -(-4 * cache // nbytes)))


def _timer(form: Form, buffers: list[torch.Tensor]) -> tuple[Callable[[], float], bool]:
    """Return a function that runs ``form`` over every buffer and says the seconds of one call, and if it is a graph."""

    def everything() -> None:
        for key, value in buffers:
            form(key, value)

    everything()  # compile, allocate, and send the batch
    if buffers[0].device.type == "cpu":

        def watch() -> float:
            start = time.perf_counter()
            everything()
            return (time.perf_counter() - start) / len(buffers)

        return watch, False

    everything()
    torch.cuda.synchronize()
    replay: Callable[[], None] = everything
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            everything()
        replay = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()

    def events() -> float:
        start, end = (Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / len(buffers)

    return events, replay is not everything
