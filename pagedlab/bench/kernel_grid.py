"""Paged decoding on this CPU over a grid: sequences × context × layout × block size, each against dense attention.

One token of each sequence, 16 query heads over 8 KV heads of 64. At every point `cpu-paged` over each layout and block
size takes turns with the ways to say grouped-query attention with torch on contiguous keys and values (``ratio_dense``
compares with the fastest of them at that point) and with a copy (``ratio_copy``); each ratio is the median of the
rounds' ratios. ``gb_per_s`` counts keys and values (for the copy: bytes read plus written) at the median time.

Beside them, on some points (`pagedlab.bench.kernel_peers`): `gather-sdpa`, which copies each context together first
(``ratio_gather`` compares with it; ``ratio_gather_batch`` with copying the whole batch's at once), torch's compiled
flex_attention over a paged cache, and `cpu-paged` over caches of one byte a channel (dtype int8 and fp8;
``ratio_dense`` still compares with dense attention over the dtype of the point).

Cold: each call reads the next stretch of a pool that is larger than the last-level cache. Warm (columns ``_warm``):
each call is timed right after another on the same stretch; None where a stretch is larger than ``warm_bytes``.
``blocks`` says how a sequence's blocks lie: in random order, or adjacent as a contiguous allocator leaves them. At a
point of microseconds a ratio speaks mostly of the cost of a call.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pagedlab.bench import ONE_BYTE
from pagedlab.bench.kernel import (
    HEAD_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    SCALE,
    chunk_batch,
    dense_forms,
    threads_of,
)  # fmt: skip
from pagedlab.bench.kernel_peers import PAGE, byte_form, flex_form, gather_batch_form, gather_form
from pagedlab.errors import ConfigError
from pagedlab.kernels.cpu import CPUPagedAttention
from pagedlab.policies.layout import Padded
from pagedlab.registry import make, policy_names

POINTS = tuple(itertools.product((1, 4, 16, 64), (128, 1024, 8192)))
"""Sequences, tokens of context of each."""
BLOCK_SIZES = (16, 32, 128)
BLOCKS = ("random", "adjacent")
FLEX_POINTS = ((1, 8192), (16, 1024))
"""Where flex_attention is compiled, for each dtype and number of threads."""
PEER_LAYOUT, PEER_BLOCK_SIZE = Padded.name, 16
DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}

RACING = ("cpu-paged", "copy")
"""What is measured to the end however slow it is."""

Form = Callable[[torch.Tensor, torch.Tensor], Any]
"""A contender: attention (or a copy) over keys and values [num_seqs, num_kv_heads, context_len, head_size]."""
Key = tuple[str, str, int | None, str | None]
"""Kernel, layout, block size, how the blocks lie."""


def contenders(
    num_seqs: int,
    context_len: int,
    *,
    layouts: Iterable[str],
    block_sizes: Iterable[int],
    blocks: Iterable[str],
    dtype: torch.dtype,
    rng: torch.Generator,
    peers: bool = False,
    pool_bytes: int = 0,
) -> dict[Key, Form]:
    """Return what runs at one point, by kernel, layout, block size and how the blocks lie.

    ``peers`` adds gather + SDPA in both forms and caches of one byte, which go round through about ``pool_bytes`` each.
    """
    query = torch.randn(num_seqs, NUM_HEADS, HEAD_SIZE, generator=rng).to(dtype)
    target = torch.empty(num_seqs, NUM_KV_HEADS, context_len, HEAD_SIZE, dtype=dtype)
    forms: dict[Key, Form] = {
        (name, "contiguous", None, None): form for name, form in dense_forms(query).items()
    }
    forms["copy", "contiguous", None, None] = lambda k, v: target.copy_(k)

    def paged(name: str, block_size: int, order: str) -> Form:
        layout: Any = make("layout", name)
        batch = chunk_batch(layout, num_seqs, 1, context_len, block_size, rng, adjacent=order == "adjacent")
        attention = CPUPagedAttention(layout)
        shape = (num_seqs * context_len // block_size, NUM_KV_HEADS, block_size, HEAD_SIZE)
        return lambda k, v: attention.attend(query, k.view(shape), v.view(shape), batch, scale=SCALE)

    for name, block_size, order in itertools.product(layouts, block_sizes, blocks):
        forms["cpu-paged", name, block_size, order] = paged(name, block_size, order)
    if peers:
        key, tokens = (PEER_LAYOUT, PEER_BLOCK_SIZE, "random"), (context_len, PEER_BLOCK_SIZE)
        gather, batched = Padded(), Padded()
        forms["gather-sdpa", *key] = gather_form(query, gather, *tokens, rng)
        forms["gather-batch", *key] = gather_batch_form(query, batched, *tokens, rng)
        for kv_dtype in ONE_BYTE:
            form = byte_form(kv_dtype, query, Padded(), *tokens, rng, pool_bytes)
            forms[f"cpu-paged {kv_dtype}", *key] = form
    return forms


def measure(
    *,
    points: Iterable[tuple[int, int]] = POINTS,
    layouts: Iterable[str] | None = None,
    block_sizes: Iterable[int] = BLOCK_SIZES,
    blocks: Iterable[str] = ("random",),
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    threads: Iterable[int] | None = None,
    peers: bool = False,
    flex_points: Iterable[tuple[int, int]] = (),
    seconds: float = 6.0,
    pool_bytes: int = 512 * 2**20,
    warm_bytes: int = 64 * 2**20,
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """Return one row per point, kernel, layout, block size, order of blocks, dtype and number of threads.

    Each point is measured for about ``seconds``, at least four calls each. ``threads`` left out: as many as torch has.
    At ``flex_points`` flex_attention is compiled and measured too; where it cannot be, its row has a ``note`` that says
    why, and no figures.
    What the file ``keep`` holds already (a JSON object a line: point and rows) is read from there and not measured.
    """
    points, sizes, orders, flex = list(points), list(block_sizes), list(blocks), set(flex_points)
    names = list(policy_names("layout") if layouts is None else layouts)
    _check(points, [*sizes, PEER_BLOCK_SIZE] if peers else sizes, orders)
    done = _kept(keep)
    rows: list[dict[str, Any]] = []
    for title in dtypes:
        dtype = _dtype(title)
        pool: torch.Tensor | None = None
        for count, (num_seqs, context_len) in itertools.product(
            threads or (torch.get_num_threads(),), points
        ):
            asked = {
                "phase": "decode",
                "num_seqs": num_seqs,
                "context_len": context_len,
                "dtype": title,
                "threads": count,
            }
            contents = asked | {"layouts": names, "block_sizes": sizes, "blocks": orders}
            with_flex = (num_seqs, context_len) in flex
            contents |= {"peers": peers, "flex": with_flex}
            here = next((found for known, found in done if known == contents), None)
            if here is None:
                pool = _pool(pool_bytes, points, dtype) if pool is None else pool
                rng = torch.Generator().manual_seed(0)
                nbytes = _point_bytes(num_seqs, context_len, dtype)
                with torch.inference_mode(), threads_of(count):
                    forms = contenders(
                        num_seqs, context_len, layouts=names, block_sizes=sizes, blocks=orders, dtype=dtype, rng=rng,
                        peers=peers, pool_bytes=pool_bytes // dtype.itemsize,
                    )  # fmt: skip
                    why = _add_flex(forms, num_seqs, context_len, dtype, rng) if with_flex else ""
                    cold, warm = _timed(forms, pool, num_seqs, context_len, seconds, nbytes <= warm_bytes)
                here = [asked | row for row in _rows(cold, warm, nbytes, dtype.itemsize)]
                here += [asked | {"kernel": "flex_attention", "note": why}] if why else []
                if keep is not None:
                    with keep.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"point": contents, "rows": here}) + "\n")
            rows += here
    return rows


def _check(points: list[tuple[int, int]], block_sizes: list[int], blocks: list[str]) -> None:
    for (_, context_len), block_size in itertools.product(points, block_sizes):
        if block_size < 1 or context_len % block_size:
            raise ConfigError(f"block size {block_size} does not divide a context of {context_len} tokens")
    for order in blocks:
        if order not in BLOCKS:
            raise ConfigError(f"blocks lie {' or '.join(BLOCKS)}, not {order!r}")


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"no dtype {name!r} for the cache; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def _kept(keep: Path | None) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return the points in the file, each with its rows."""
    points = []
    if keep is not None and keep.exists():
        for number, line in enumerate(keep.read_text(encoding="utf-8").splitlines(), 1):
            try:
                point = json.loads(line)
                points.append((point["point"], point["rows"]))
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f"{keep}:{number} holds no measured point; each line is a JSON object with point and rows"
                ) from error
    return points


def _add_flex(
    forms: dict[Key, Form], num_seqs: int, context_len: int, dtype: torch.dtype, rng: torch.Generator
) -> str:
    """Add flex_attention to the contenders, or return why it is not there."""
    page = min(PAGE, context_len)
    query = torch.randn(num_seqs, NUM_HEADS, HEAD_SIZE, generator=rng).to(dtype)
    try:
        forms["flex_attention", "contiguous", page, "random"] = flex_form(query, context_len, page, rng)
    except Exception as error:  # whatever the compiler, or the one below it, has to say
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return ""


def _point_bytes(num_seqs: int, context_len: int, dtype: torch.dtype) -> int:
    return 2 * num_seqs * NUM_KV_HEADS * context_len * HEAD_SIZE * dtype.itemsize


def _pool(nbytes: int, points: list[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    """Return memory for the largest point, or ``nbytes`` if that is more, filled with a repeated stretch of noise."""
    largest = max(_point_bytes(*point, dtype) for point in points)
    pool = torch.empty(max(nbytes, largest) // dtype.itemsize, dtype=dtype)
    noise = torch.randn(min(2**20, len(pool)), generator=torch.Generator().manual_seed(0)).to(dtype)
    for part in torch.split(pool, len(noise)):
        part.copy_(noise[: len(part)])
    return pool


def _timed(
    forms: dict[Key, Form],
    pool: torch.Tensor,
    num_seqs: int,
    context_len: int,
    seconds: float,
    warm_too: bool,
) -> tuple[dict[Key, list[float]], dict[Key, list[float]]]:
    """Seconds of each call by contender, cold and warm; contenders take turns.

    The order is drawn anew each round: who follows the copy finds the caches full of what is still to be written back.
    """
    shape = (2, num_seqs, NUM_KV_HEADS, context_len, HEAD_SIZE)
    size = 2 * num_seqs * NUM_KV_HEADS * context_len * HEAD_SIZE
    stretches = [part.view(shape) for part in torch.split(pool, size) if len(part) == size]
    turn = itertools.cycle(stretches)

    def call(form: Form, stretch: torch.Tensor) -> float:
        start = time.perf_counter()
        form(stretch[0], stretch[1])
        return time.perf_counter() - start

    for form in forms.values():
        call(form, next(turn))  # compile, and fill the thread pools
    cold: dict[Key, list[float]] = {key: [] for key in forms}
    for _ in range(3):
        for key, form in forms.items():
            cold[key].append(call(form, next(turn)))
    warm: dict[Key, list[float]] = {key: [] for key in forms}
    hopeless = 4 * min(min(times) for key, times in cold.items() if key[0].startswith("sdpa"))
    # Three calls are enough for what is far behind the fastest dense attention, as some of its forms are.
    racing = [key for key in forms if key[0] in RACING or min(cold[key]) < hopeless]
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while True:
        shuffle(racing)
        for key in racing:
            stretch = next(turn)
            cold[key].append(call(forms[key], stretch))
            if warm_too:
                warm[key].append(call(forms[key], stretch))
        if time.perf_counter() > end:
            return cold, warm


def _rows(
    cold: dict[Key, list[float]], warm: dict[Key, list[float]], nbytes: int, itemsize: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender from the seconds of its calls; the i-th calls of all belong to one round."""
    copy = cold["copy", "contiguous", None, None]
    dense, dense_warm = _fastest_dense(cold), _fastest_dense(warm)
    gather, batched = (
        cold.get((kernel, PEER_LAYOUT, PEER_BLOCK_SIZE, "random"))
        for kernel in ("gather-sdpa", "gather-batch")
    )
    for key, times in cold.items():
        kernel, layout, block_size, order = key
        again, read = warm[key], nbytes
        cached: dict[str, Any] = {}
        if kernel.endswith(ONE_BYTE):
            kernel, kv_dtype = kernel.split()
            cached, read = {"dtype": kv_dtype}, nbytes // itemsize
        yield cached | {
            "kernel": kernel,
            "layout": layout,
            "block_size": block_size,
            "blocks": order,
            "gb_per_s": read / statistics.median(times) / 1e9,
            "gb_per_s_best": read / min(times) / 1e9,
            "ratio_dense": _ratio(dense, times),
            "ratio_copy": _ratio(copy, times) * read / nbytes,
            "ratio_gather": _ratio(gather, times) if gather else None,
            "ratio_gather_batch": _ratio(batched, times) if batched else None,
            "gb_per_s_warm": read / statistics.median(again) / 1e9 if again else None,
            "ratio_dense_warm": _ratio(dense_warm, again) if again else None,
            "calls": len(times),
        }


def _fastest_dense(times: dict[Key, list[float]]) -> list[float]:
    """The calls of the form of dense attention with the smallest median."""
    raced = (calls for key, calls in times.items() if key[0].startswith("sdpa") and calls)
    return min(raced, key=statistics.median, default=[])


def _ratio(rival: list[float], times: list[float]) -> float:
    """Median of the rounds' ratios: a slow moment that lasts a round or longer hits both sides alike."""
    return statistics.median(r / t for r, t in zip(rival, times))
