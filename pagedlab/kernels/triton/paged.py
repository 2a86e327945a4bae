"""`TritonPagedAttention`: paged attention on a GPU, for every layout that has a Triton `block_of`.

A batch in which every sequence has one query token runs through `decode`, with each context cut into pieces until
the GPU is full; any other batch through one launch of `prefill`. With ``batch_invariant`` a sequence's output is the
same bits whoever shares its batch: decoding sequences then always go through `decode`, in pieces of a fixed length.
In either mode equal inputs give equal bits: there are no atomics, sums are taken in a fixed order, and `tuning` settles
once how a case is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from pagedlab.errors import ConfigError
from pagedlab.kernels.base import AttentionBatch
from pagedlab.kernels.layouts import device_functions, triton_block_of
from pagedlab.kernels.scaled import TAIL, allocate_bytes, set_head_scales
from pagedlab.kernels.triton.cache_write import rotate_and_store, store_tokens
from pagedlab.kernels.triton.choices import choices_of_process
from pagedlab.kernels.triton.decode import decode_splits, reduce_splits
from pagedlab.kernels.triton.formats import (
    FORMATS,
    LARGEST,
    QUANTISED_CHUNK,
    format_on,
)
from pagedlab.kernels.triton.moves import move_blocks, on
from pagedlab.kernels.triton.plans import Plan
from pagedlab.kernels.triton.prefill import prefill_tiles
from pagedlab.kernels.triton.quantised import store_quantised
from pagedlab.kernels.triton.shapes import FUSED, MOST_CHANNELS, WRITING, Launch, Shape, round_up
from pagedlab.kernels.triton.tuning import Case, Run, Tuner, device_name, sample_batch, stamp
from pagedlab.policies.layout import Layout

MOST_SPLITS = 64
"""Pieces of a context at most, where they are cut to fill the GPU: joining them is serial."""
INTERPRETED_PROCESSORS = 4
OPERANDS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class _Work(NamedTuple):
    """What `attend` is asked for."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    plan: Plan
    scale: float
    window: int
    soft_cap: float
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None


class TritonPagedAttention:
    """Triton kernels for caches of float32, bfloat16 and float16 (and float64 in the interpreter).

    ``split_tokens`` is the length of a piece of context if ``batch_invariant``. ``kv_dtype`` "fp8" or "int8" keeps one
    byte a channel and a scale for each block and head, or with ``scales`` "head" one for all blocks of a head, set by
    the first tokens that are written (what is later larger saturates; int8 then keeps no NaN). ``autotune`` measures
    how to cut a case that `choices` does not know; see `tuning`.
    """

    axis_order: tuple[str, ...] = ("block", "head", "token", "channel")

    def __init__(
        self,
        layout: Layout,
        *,
        batch_invariant: bool = False,
        split_tokens: int = 512,
        kv_dtype: str = "model",
        scales: str = "block",
        autotune: bool = False,
        **params: Any,
    ) -> None:
        self._block_of = triton_block_of(layout)
        self._layout, self._layout_name = layout, device_functions(layout).triton
        self.tuner = Tuner(choices_of_process(stamp()), autotune=autotune)
        self.batch_invariant, self.split_tokens = batch_invariant, split_tokens
        self.kv_dtype, self.scales = kv_dtype, scales
        self.quantised = kv_dtype != "model"
        if self.quantised:
            self.axis_order = ("block", "head", "byte")
        self._scaled: set[int] = set()
        """Addresses of caches whose heads have their scales."""
        self._plan: Plan | None = None

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
        """Return an empty [num_blocks, num_kv_heads, block_size, head_size], or bytes if quantised.

        Raises `ConfigError` beyond 256 channels.
        """
        if head_size > MOST_CHANNELS:
            raise ConfigError(
                f"kernel 'triton-paged' serves heads of up to {MOST_CHANNELS} channels, not {head_size}; "
                "'gather-sdpa' serves any"
            )
        if not self.quantised:
            return torch.empty(num_blocks, num_kv_heads, block_size, head_size, dtype=dtype, device=device)
        cache = allocate_bytes(num_blocks, block_size, num_kv_heads, head_size, device, "triton-paged")
        self._scaled.discard(cache.data_ptr())
        return cache

    def write(self, cache: torch.Tensor, new: torch.Tensor, batch: AttentionBatch) -> None:
        """Store ``new`` [num_tokens, num_kv_heads, head_size] at ``batch.slots``."""
        num_tokens, num_heads, size = new.shape
        if num_tokens == 0:
            return
        plan = self._on_device(batch, cache.device)
        new = _by_channel(new)
        if self.quantised:
            self._write_quantised(cache, new, batch.block_size, plan)
            return
        with on(cache.device):
            store_tokens[num_tokens, num_heads](
                _whole(cache),
                new,
                plan.slots,
                new.stride(0),
                new.stride(1),
                NUM_KV_HEADS=num_heads,
                BLOCK_SIZE=cache.shape[2],
                SIZE=size,
                PADDED=triton.next_power_of_2(size),
                **WRITING,
            )

    def _write_quantised(self, cache: torch.Tensor, new: torch.Tensor, block_size: int, plan: Plan) -> None:
        _, num_heads, size = new.shape
        if cache.shape[-1] != block_size * size + TAIL:
            raise ConfigError(
                f"a cache of {cache.shape[-1]} bytes a head is not of {block_size} tokens of {size}"
            )
        form = format_on(self.kv_dtype, cache.device)
        if self.scales == "head" and cache.data_ptr() not in self._scaled:
            set_head_scales(cache, new, LARGEST[form])
            self._scaled.add(cache.data_ptr())
        with on(cache.device):
            store_quantised[len(plan.runs) - 1, num_heads](
                _whole(cache),
                cache.view(torch.float32),
                new,
                plan.order,
                plan.runs,
                plan.slots,
                new.stride(0),
                new.stride(1),
                NUM_KV_HEADS=num_heads,
                BLOCK_SIZE=block_size,
                SIZE=size,
                PADDED=triton.next_power_of_2(size),
                TAIL=TAIL,
                CHUNK=QUANTISED_CHUNK,
                FORMAT=FORMATS[form],
                FIXED=self.scales == "head",
                **FUSED,
            )

    def write_rotated(
        self,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: AttentionBatch,
        *,
        interleaved: bool = False,
    ) -> None:
        """Store ``value`` and the rotated ``key`` [num_tokens, num_kv_heads, size] at ``batch.slots`` in one launch.

        ``cos`` and ``sin`` [num_tokens, rotary_size / 2] turn the first ``rotary_size`` channels; the partner of a
        channel is half of them away or, ``interleaved``, its neighbour.
        """
        if self.quantised:
            raise ConfigError(f"write_rotated writes a cache of the model's dtype, not {self.kv_dtype!r}")
        num_tokens, num_heads, size = key.shape
        if num_tokens == 0:
            return
        plan = self._on_device(batch, key_cache.device)
        key, value = _by_channel(key), _by_channel(value)
        with on(key_cache.device):
            rotate_and_store[num_tokens, num_heads](
                _whole(key_cache),
                _whole(value_cache),
                key,
                value,
                cos.contiguous(),
                sin.contiguous(),
                plan.slots,
                key.stride(0),
                key.stride(1),
                value.stride(0),
                value.stride(1),
                NUM_KV_HEADS=num_heads,
                BLOCK_SIZE=key_cache.shape[2],
                SIZE=size,
                VALUE_SIZE=value.shape[-1],
                PADDED=triton.next_power_of_2(size),
                VALUE_PADDED=triton.next_power_of_2(value.shape[-1]),
                ROTARY=2 * cos.shape[-1],
                INTERLEAVED=interleaved,
                REAL=_real(key.dtype),
                **WRITING,
            )

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
        work = _Work(
            query,
            key_cache,
            value_cache,
            self._on_device(batch, query.device),
            float(scale),
            sliding_window or 0,
            float(soft_cap or 0.0),
            alibi_slopes,
            sinks,
        )
        return self._attend(work)

    def _attend(self, work: _Work, launch: Launch | None = None) -> torch.Tensor:
        """Do the work, cut as ``launch`` says, or as is chosen for it."""
        query, key_cache, value_cache, plan = work[:4]
        num_tokens, num_heads, size = query.shape
        num_kv_heads, value_size = value_cache.shape[1], value_cache.shape[-1]
        dtype, form, tail = key_cache.dtype, 0, 0
        block_size, key_scales, value_scales = plan.batch.block_size, None, None
        if self.quantised:
            dtype, form, tail = query.dtype, FORMATS[format_on(self.kv_dtype, query.device)], TAIL
            value_size = (value_size - TAIL) // block_size
            key_scales, value_scales = key_cache.view(torch.float32), value_cache.view(torch.float32)
        out = torch.empty(num_tokens, num_heads, value_size, dtype=query.dtype, device=query.device)
        if num_tokens == 0:
            return out
        shape = Shape.of(num_heads // num_kv_heads, size, value_size, dtype.itemsize, self.quantised)
        query = _by_channel(query.to(dtype))
        sources = (
            query,
            _whole(key_cache),
            _whole(value_cache),
            key_scales,
            value_scales,
            work.slopes,
            work.sinks,
            plan.entries,
            plan.index,
        )
        constants: dict[str, Any] = {
            "block_of": self._block_of,
            "NUM_KV_HEADS": num_kv_heads,
            "BLOCK_SIZE": block_size,
            "SCALE": work.scale,
            "WINDOW": work.window,
            "SOFT_CAP": work.soft_cap,
            "TAIL": tail,
            "FORMAT": form,
            "OPERAND": _operand(dtype, query.device),
            "REAL": _real(dtype),
            **shape.constants,
        }
        with on(query.device):
            if len(plan.decodes):
                chosen = launch or self._launch("decode", work, shape, dtype, block_size)
                self._decode(out, sources, plan, shape, chosen, constants)
            if plan.chunks:
                chosen = launch or self._launch("prefill", work, shape, dtype, block_size)
                tiles = plan.tiles(chosen.rows // shape.group)
                prefill_tiles[len(tiles), num_kv_heads](
                    out,
                    *sources,
                    tiles,
                    plan.query_start,
                    plan.context_lens,
                    plan.rows,
                    query.stride(0),
                    query.stride(1),
                    ROWS=chosen.rows,
                    TILE=chosen.tile,
                    **constants,
                    **chosen.options,
                )
        return out

    def _decode(
        self,
        out: torch.Tensor,
        sources: tuple[Any, ...],
        plan: Plan,
        shape: Shape,
        launch: Launch,
        constants: dict[str, Any],
    ) -> None:
        query, num_decodes = sources[0], len(plan.decodes)
        num_kv_heads, num_heads, value_size = constants["NUM_KV_HEADS"], *out.shape[1:]
        visible = plan.batch.max_context_len
        if constants["WINDOW"]:
            # The first piece begins at a whole tile, so that it may hold up to a tile of keys that are out of sight.
            visible = min(visible, constants["WINDOW"] + launch.tile - 1)
        split_len = self.split_len(visible, num_decodes * num_kv_heads, shape, launch, out.device)
        num_splits = -(-visible // split_len)
        real = torch.float64 if query.dtype == torch.float64 else torch.float32
        parts = sums = None
        if num_splits > 1:
            parts = torch.empty(num_decodes, num_heads, num_splits, value_size, dtype=real, device=out.device)
            sums = torch.empty(num_decodes, num_heads, num_splits, dtype=real, device=out.device)
        decode_splits[num_decodes, num_kv_heads, num_splits](
            out,
            parts,
            sums,
            *sources,
            plan.decodes,
            plan.query_start,
            plan.context_lens,
            plan.rows,
            split_len,
            num_splits,
            query.stride(0),
            query.stride(1),
            ROWS=launch.rows,
            TILE=launch.tile,
            SPLIT=num_splits > 1,
            **constants,
            **launch.options,
        )
        if num_splits > 1:
            reduce_splits[num_decodes, num_heads](
                out,
                parts,
                sums,
                plan.decodes,
                plan.query_start,
                plan.context_lens,
                split_len,
                num_splits,
                NUM_HEADS=num_heads,
                VALUE_SIZE=value_size,
                VALUE_PADDED=constants["VALUE_PADDED"],
                TILE=launch.tile,
                WINDOW=constants["WINDOW"],
                REAL=constants["REAL"],
                num_warps=1,
                **FUSED,
            )

    def split_len(
        self, visible: int, programs: int, shape: Shape, launch: Launch, device: torch.device
    ) -> int:
        """Return the keys of a piece, where the longest context has ``visible`` and one piece makes ``programs``."""
        if self.batch_invariant:
            return round_up(self.split_tokens, shape.decode[0].tile)
        wanted = -(-launch.programs * _processors(device) // programs)
        return round_up(-(-visible // min(wanted, MOST_SPLITS)), launch.tile)

    def _launch(self, kernel: str, work: _Work, shape: Shape, dtype: torch.dtype, block_size: int) -> Launch:
        """Return how to cut ``work``; the layers of a step that are alike ask once."""
        if self.tuner.idle:
            return (shape.decode if kernel == "decode" else shape.prefill)[0]
        has = (work.soft_cap > 0, work.slopes is not None, work.sinks is not None)
        alike = (kernel, id(shape), dtype, work.key_cache.shape[1], work.window, has)
        launch = work.plan.launches.get(alike)
        if launch is None:
            features = "+".join(name for name, there in zip(("soft-cap", "slopes", "sinks"), has) if there)
            launch = self._settled(kernel, work, shape, dtype, block_size, features)
            work.plan.launches[alike] = launch
        return launch

    def _settled(
        self, kernel: str, work: _Work, shape: Shape, dtype: torch.dtype, block_size: int, features: str
    ) -> Launch:
        """Return what the tuner says; if batch-invariant, it hears of nothing that depends on the batch."""
        launches, split_len = (shape.decode if kernel == "decode" else shape.prefill), 0
        if self.batch_invariant and kernel == "decode":
            split_len = round_up(self.split_tokens, launches[0].tile)
            launches = shape.in_pieces_of(split_len)
        query, cache, plan = work.query, work.key_cache, work.plan
        case = Case(
            device=device_name(query.device),
            kernel=kernel,
            layout=self._layout_name,
            dtype=str(dtype).removeprefix("torch."),
            kv_format=self.kv_dtype,
            group=shape.group,
            num_kv_heads=cache.shape[1],
            size=shape.constants["SIZE"],
            value_size=shape.constants["VALUE_SIZE"],
            block_size=block_size,
            window=work.window,
            features=features,
            split_len=split_len,
        )
        if not self.batch_invariant:
            num_seqs = len(plan.decodes) or len(plan.chunks)
            case = case.among(num_seqs, len(query), plan.batch.max_context_len)

        def prepare() -> Run:
            sample = work._replace(
                plan=self._planned(sample_batch(case, self._layout, len(cache)), query.device)
            )
            num_tokens = len(sample.plan.slots)
            sample = sample._replace(query=torch.ones_like(query[:1]).repeat(num_tokens, 1, 1))
            return lambda launch: self._attend(sample, launch)

        return self.tuner.launch(case, launches, prepare, query.device)

    def _on_device(self, batch: AttentionBatch, device: torch.device) -> Plan:
        """Return ``batch`` as a `Plan`; the layers of a step share one."""
        plan = self._plan
        if plan is None or plan.batch is not batch or plan.device != device:
            plan = self._plan = self._planned(batch, device)
        return plan

    def _planned(self, batch: AttentionBatch, device: torch.device) -> Plan:
        return Plan.of(batch, device, invariant=self.batch_invariant, quantised=self.quantised)

    def move_blocks(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        from_blocks: Sequence[int],
        to_blocks: Sequence[int],
    ) -> None:
        """Copy block ``from_blocks[i]`` of ``sources[t]`` to ``to_blocks[i]`` of ``targets[t]``; see `moves`."""
        move_blocks(sources, targets, from_blocks, to_blocks)


def _by_channel(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole(cache: torch.Tensor) -> torch.Tensor:
    if not cache.is_contiguous():
        raise ConfigError("triton-paged finds slots by address: a cache tensor must be contiguous")
    return cache


def _real(dtype: torch.dtype) -> tl.dtype:
    """Return what scores and sums are computed in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _operand(dtype: torch.dtype, device: torch.device) -> tl.dtype:
    if dtype == torch.bfloat16 and device.type == "cpu":
        return tl.float32  # the interpreter multiplies the bits of bfloat16 as integers
    return OPERANDS[dtype]


def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
