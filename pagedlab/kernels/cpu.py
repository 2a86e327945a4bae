"""Paged attention on CPU cores: numba loops that read keys and values where they lie.

Decoding is limited by memory, so every key and value is read once, whichever query heads want it, in the order it lies
in. A cache tensor is ``[block, head, token, channel]``: the tokens of one block and one KV head are one piece::

    block 7   head 0 | token 0: c0 c1 c2 .. | token 1: c0 c1 .. | ...      <- one contiguous piece of
              head 1 | token 0: c0 c1 c2 .. | ...                             block_size * head_size numbers
    block 8   ...

One *task* is one sequence, one KV head and a tile of its query tokens; the tile's rows (query tokens times the query
heads of the group) share each key that is loaded (`wide` with AVX-512, else `cpu_tile`). Over tiles of keys runs the
online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): scores of the tile, a new maximum, the old sums rescaled,
then one pass over the values. Blocks lie anywhere, so the hardware's own prefetcher stops at the end of each; asking
for the next ones early is what makes paged decoding as fast as dense and faster.

Few long sequences leave threads without work, so their contexts are cut into pieces, one task each, and the pieces'
sums joined (split-KV; flash-decoding, Dao et al. 2023). How many pieces depends on the batch and the threads: equal
inputs on equally many threads give equal bits. With ``batch_invariant`` a piece has a fixed length, and a sequence's
output is the same bits in every company and with every number of threads.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic
from numba.extending import register_jitable
from numpy.typing import NDArray

from pagedlab.errors import ConfigError
from pagedlab.kernels.base import AttentionBatch
from pagedlab.kernels.cpu_tile import KEY_TILE, ROW_TILE, tile
from pagedlab.kernels.cpu_write import write_bytes, write_numbers
from pagedlab.kernels.layouts import device_functions
from pagedlab.kernels.scaled import (
    LARGEST_E4M3,
    LARGEST_INT8,
    TAIL,
    allocate_bytes,
    runs_of,
    set_head_scales,
)
from pagedlab.kernels.wide import fits, wide_tile
from pagedlab.policies.layout import Layout

TASKS_PER_THREAD = 4
"""Tasks that are wanted for each thread before contexts are cut: few are hard to share out evenly."""
SHORTEST_PIECE = 512
"""Keys of a piece at least, where contexts are cut to fill the cores: a piece has sums to write and to join."""

intrinsic: Any = _numba_intrinsic  # its type speaks of the function given, not of the one that comes back


@intrinsic
def _call(typingctx, address, arguments):
    """Call the C function at ``address`` with the numbers in the tuple ``arguments``; pointers go as integers."""

    def codegen(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.intp, arguments), codegen


@functools.cache
def _batch_loop(block_of: Callable[..., Any], fingerprint: str) -> Callable[..., str]:
    """Return the loop over a batch for one layout: what is cut into tasks, and which thread takes which.

    ``fingerprint`` stands for the code of ``block_of``. numba's cache on disk knows a function by the values that it
    refers to, so one that returns its fingerprint is compiled anew when the layout's code has changed.
    """
    find = register_jitable(block_of)

    @njit(parallel=True, nogil=True, error_model="numpy", cache=True)
    def attend(
        code, tensors, shape, reals, query_start, context_lens, rows, entries, index, piece, parts
    ):  # fmt: skip
        num_kv_heads, group, block_size, window, tile = shape[0], shape[1], shape[4], shape[7], shape[8]
        work = 0
        for s in range(rows.shape[0]):
            count, length = np.int64(query_start[s + 1] - query_start[s]), np.int64(context_lens[s])
            for j in range(0, count, tile):
                n, position = min(tile, count - j), length - count + j
                work += n * (position + n - _first(position, window)) * num_kv_heads
        for part in prange(parts):
            mine, beyond = work * part // parts, work * (part + 1) // parts
            blocks = np.empty(context_lens.max() // block_size + 1, np.int32)
            done = row = 0
            for s in range(rows.shape[0]):
                count, length = np.int64(query_start[s + 1] - query_start[s]), np.int64(context_lens[s])
                pieces = _pieces(count, length, window, tile, piece)
                found = False
                for head in range(num_kv_heads):
                    for j in range(0, count, tile):
                        n, position = min(tile, count - j), length - count + j
                        for i in range(pieces):
                            first = _first(position, window) + i * piece
                            end = first + piece if i + 1 < pieces else position + n
                            if mine <= done < beyond:
                                if not found:
                                    start = _first(length - count, window)
                                    for k in range(start // block_size, (length - 1) // block_size + 1):
                                        blocks[k] = find(entries, index, rows[s], k)
                                    found = True
                                arguments = (
                                    tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], blocks.ctypes.data,
                                    tensors[5], tensors[6], shape.ctypes.data, reals.ctypes.data, head,
                                    query_start[s] + j, n, position, first, end, row if pieces > 1 else -1,
                                )  # fmt: skip
                                _call(code, arguments)
                            done += n * (end - first)
                            row += n * group if pieces > 1 else 0
        return fingerprint

    return attend


@njit(nogil=True, error_model="numpy", cache=True)
def _first(position, window):
    """Return the first key that a token at ``position`` sees."""
    return max(0, position - window + 1) if window > 0 else 0


@njit(nogil=True, error_model="numpy", cache=True)
def _pieces(count, length, window, tile, piece):
    """Into how many pieces a sequence's context is cut: 1 unless its query tokens are one tile."""
    if piece == 0 or count > tile:
        return 1
    return max(1, (length - _first(length - count, window) + piece - 1) // piece)


@njit(nogil=True, error_model="numpy", cache=True)
def _partial_rows(query_start, context_lens, shape, piece):
    """Return how many rows of partial sums a batch has."""
    rows = 0
    for s in range(context_lens.shape[0]):
        count, length = np.int64(query_start[s + 1] - query_start[s]), np.int64(context_lens[s])
        pieces = _pieces(count, length, shape[7], shape[8], piece)
        rows += pieces * count * shape[1] * shape[0] if pieces > 1 else 0
    return rows


@njit(nogil=True, error_model="numpy", cache=True)
def _join(partial, out, joined, query_start, context_lens, shape, piece):
    """Join the sums of a context's pieces in ``out`` [num_tokens, num_heads, value_size], and tick its tokens."""
    num_kv_heads, group, size = shape[0], shape[1], shape[3]
    at = 0
    for s in range(context_lens.shape[0]):
        count, length = np.int64(query_start[s + 1] - query_start[s]), np.int64(context_lens[s])
        pieces = _pieces(count, length, shape[7], shape[8], piece)
        if pieces == 1:
            continue
        joined[query_start[s] : query_start[s + 1]] = True
        for head in range(num_kv_heads):
            rows = count * group
            for r in range(rows):
                target = out[query_start[s] + r // group, head * group + r % group]
                top = partial[at + r, size]
                for i in range(1, pieces):
                    top = max(top, partial[at + i * rows + r, size])
                total = partial.dtype.type(0)
                target[:] = 0
                for i in range(pieces):
                    piece_row = partial[at + i * rows + r]
                    weight = np.exp(piece_row[size] - top)
                    total += weight * piece_row[size + 1]
                    for d in range(size):
                        target[d] += weight * piece_row[d]
                for d in range(size):
                    target[d] /= total
            at += pieces * rows


# --- the implementation ---------------------------------------------------------------------------------------------

# numba's fallback thread pool (workqueue) ends the process when two Python threads enter it at once, and a notebook
# runs engines in threads; with OpenMP, where torch and numba share one pool, the lock costs nothing.
_one_launch = threading.Lock()


@functools.cache
def _most_threads() -> int:
    """Start numba's pool and return its size."""
    threads = torch.get_num_threads()
    most = int(numba.get_num_threads())
    # Starting numba's pool sizes the OpenMP pool that it shares with torch; put torch's size back.
    torch.set_num_threads(threads)
    return most


def launch(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a parallel numba function with ``arguments`` and, last, the number of threads: as many as torch uses."""
    threads = min(torch.get_num_threads(), _most_threads())
    with _one_launch:
        if numba.get_num_threads() != threads:
            numba.set_num_threads(threads)
        function(*arguments, threads)


_AS_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def _view(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's own memory as an array; 16-bit floats, which numpy or numba do not have, as their bits."""
    bits = _AS_BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).detach().numpy()


STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What the bytes of a cache are, by ``kv_dtype``."""


class CPUPagedAttention:
    """Decode and chunked prefill straight from the blocks, for caches of float32, bfloat16, float16, float64 and bytes.

    Arithmetic is float64 for a float64 cache and float32 otherwise. Uses as many threads as torch does
    (``torch.set_num_threads``). ``split_tokens`` is the length of a piece of context if ``batch_invariant``.
    ``kv_dtype`` "int8" or "fp8" (e4m3) keeps one byte a channel and a scale for each block and head, or with ``scales``
    "head" one for all blocks of a head, set by the first tokens that are written (what is later larger saturates; int8
    then keeps no NaN).
    """

    def __init__(
        self,
        layout: Layout,
        *,
        batch_invariant: bool = False,
        split_tokens: int = 2048,
        kv_dtype: str = "model",
        scales: str = "block",
        **params: Any,
    ) -> None:
        block_of = device_functions(layout).numba
        block_of = getattr(block_of, "py_func", block_of)
        code = block_of.__code__
        digest = hashlib.sha256(code.co_code + repr((code.co_consts, code.co_names)).encode()).hexdigest()
        self._batch_loop = _batch_loop(block_of, digest)
        self.batch_invariant, self.split_tokens = batch_invariant, split_tokens
        self.scales = scales
        self.stored = STORED.get(kv_dtype)
        self.quantised = self.stored is not None
        self.axis_order: tuple[str, ...] = ("block", "head", "token", "channel")
        if self.quantised:
            self.axis_order = ("block", "head", "byte")
        self._scaled: set[int] = set()
        """Addresses of caches whose heads have their scales."""
        _most_threads()

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Return an empty [num_blocks, num_kv_heads, block_size, head_size], or bytes if quantised."""
        if not self.quantised:
            return torch.empty(num_blocks, num_kv_heads, block_size, head_size, dtype=dtype, device=device)
        cache = allocate_bytes(num_blocks, block_size, num_kv_heads, head_size, device, "cpu-paged")
        self._scaled.discard(cache.data_ptr())
        return cache

    def write(self, cache: torch.Tensor, new: torch.Tensor, batch: AttentionBatch) -> None:
        """Store ``new`` [num_tokens, num_kv_heads, head_size] at ``batch.slots``."""
        if not self.quantised:
            write_numbers(_view(cache), _view(new.to(cache.dtype).contiguous()), batch.slots)
            return
        size = new.shape[2]
        if cache.shape[-1] != batch.block_size * size + TAIL:
            raise ConfigError(
                f"a cache of {cache.shape[-1]} bytes a head is not of {batch.block_size} tokens of {size}"
            )
        if not len(new):
            return
        fixed, fp8 = self.scales == "head", self.stored == torch.float8_e4m3fn
        if fixed and cache.data_ptr() not in self._scaled:
            set_head_scales(cache, new, LARGEST_E4M3 if fp8 else LARGEST_INT8)
            self._scaled.add(cache.data_ptr())
        order, runs = runs_of(batch.slots, batch.block_size)
        numbers = new.detach().float().contiguous().numpy()
        held = cache.numpy(), cache.view(torch.float32).numpy()
        write_bytes(*held, numbers, order, runs, batch.slots, batch.block_size, fixed, fp8)

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [num_tokens, num_heads, value_head_size]; see `pagedlab.kernels.base`."""
        dtype = key_cache.dtype
        real = torch.float64 if dtype == torch.float64 else torch.float32
        num_tokens, num_heads, size = query.shape
        num_kv_heads, block_size, value_size = value_cache.shape[1], batch.block_size, value_cache.shape[-1]
        if self.quantised:
            value_size = (value_size - TAIL) // block_size
        if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
            raise ValueError("cpu-paged reads cache tensors by address: they must be contiguous")
        stored = self.stored or dtype
        wide = next((d for d in (query.dtype, real) if fits(d, stored, size, value_size)), None)
        task = tile(stored) if wide is None else wide_tile(wide, stored)
        computed = real if wide is None else wide
        q = query.to(computed).contiguous()
        out = torch.empty(num_tokens, num_heads, value_size, dtype=computed)
        if num_tokens == 0:
            return out.to(query.dtype)
        group, tail = num_heads // num_kv_heads, TAIL if self.quantised else 0
        tokens = max(1, ROW_TILE // group)
        pitches = block_size * size + tail, block_size * value_size + tail
        shape = _numbers(
            num_kv_heads, group, size, value_size, block_size, *pitches, sliding_window or 0, tokens
        )
        piece = self._piece(batch, max(len(batch.rows), num_tokens // tokens) * num_kv_heads)
        rows = _partial_rows(batch.query_start, batch.context_lens, shape, piece) if piece else 0
        partial = torch.empty(rows, value_size + 2, dtype=real)
        slopes, levels = _by_head(alibi_slopes, q, real), _by_head(sinks, q, real)
        tensors = [q, key_cache, value_cache, out, partial, slopes, levels]
        launch(
            self._batch_loop,
            task.address,
            np.array([0 if x is None else x.data_ptr() for x in tensors], np.int64),
            shape,
            _numbers(float(scale), float(soft_cap or 0.0)),
            batch.query_start,
            batch.context_lens,
            batch.rows,
            batch.entries,
            batch.index,
            piece,
        )
        if rows:
            whole = out if computed == real else torch.empty(out.shape, dtype=real)
            cut = np.zeros(num_tokens, np.bool_)
            sums = partial.numpy(), whole.numpy(), cut
            _join(*sums, batch.query_start, batch.context_lens, shape, piece)
            if whole is not out:
                out[cut] = whole[cut].to(computed)
        return out if computed == query.dtype else out.to(query.dtype)

    def _piece(self, batch: AttentionBatch, tasks: int) -> int:
        """Return the keys of a piece where uncut contexts make ``tasks`` tasks; 0 to cut none."""
        if self.batch_invariant:
            return self.split_tokens
        wanted = TASKS_PER_THREAD * torch.get_num_threads()
        if torch.get_num_threads() == 1 or tasks >= wanted:
            return 0
        piece = -(-batch.max_context_len * tasks // wanted)
        return max(SHORTEST_PIECE, -(-piece // KEY_TILE) * KEY_TILE)


@functools.lru_cache(maxsize=1024, typed=True)
def _numbers(*numbers: float) -> NDArray[Any]:
    """The numbers as an array of int64, or of float64 if the first is a float; layers ask for the same ones again."""
    return np.array(numbers, np.float64 if isinstance(numbers[0], float) else np.int64)


def _by_head(numbers: torch.Tensor | None, query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    if numbers is None:
        return None
    if numbers.shape != query.shape[1:2]:
        raise ConfigError(
            f"ALiBi slopes and attention sinks are one number for each of {query.shape[1]} query heads, "
            f"not {tuple(numbers.shape)}"
        )
    return numbers.detach().to(dtype).contiguous()
