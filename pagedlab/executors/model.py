"""`ModelExecutor`: carries out a step's orders with a real Hugging Face model and real tensors.

The whole batch, prompt chunks and decoding sequences together, goes through the model in one flat row
(``input_ids`` [1, num_tokens]); each attention layer finds its keys and values in the paged cache::

    orders.batch ─▶ tokens, positions, slots, rows ─▶ model(...) ──▶ logits of rows that sample ─▶ tokens
                                                        │  ▲ every attention layer
                                                        ▼  │
                                            write(new K, V at slots) ; attend(blocks of rows)

One cache tensor for keys and one for values per layer and tier; its axes are the kernel's choice, block first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from pagedlab.costs.shape import ModelShape
from pagedlab.engine.orders import DISK, TIER_NAMES, Damage, Move, SequenceStep, StepOrders, StepResult
from pagedlab.errors import ConfigError, InvariantBroken
from pagedlab.executors.attention import check_options, make_attention
from pagedlab.executors.disk import BlockFile, SlotFault, Spoils
from pagedlab.executors.linears import FastPath
from pagedlab.executors.loading import dtype_name, load_model
from pagedlab.executors.probe import Place, probe_logits
from pagedlab.executors.sampling import sample
from pagedlab.kernels.base import AttentionBatch, PagedAttention
from pagedlab.kernels.cpu import CPUPagedAttention
from pagedlab.policies.kernel import Kernel
from pagedlab.policies.layout import Layout


class ModelExecutor:
    """Runs any Hugging Face causal LM that uses transformers' attention interface over a paged cache.

    ``model`` is ``"tiny"``, a folder, a hub name or a model object (changed in place until `release`). ``dtype`` None
    keeps the weights' own; ``device`` None leaves a model object where it is and puts others on the CPU. ``fast`` swaps
    modules for equal, faster ones (never in float64; ``fast_path.notes`` says which; on top of the weights it takes as
    much memory again); ``num_threads`` sets torch's pool. ``poison`` fills a fresh cache with NaN, so that a read of a
    slot that nobody wrote cannot go unnoticed (tests).

    Raises `ModelNotServed` or `ConfigError`, in one line, if the model cannot be served, or not with this kernel (whose
    ``attend`` has no sinks, say, where the model needs them). A model object then has its own attention back.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        layout: Layout,
        kernel: Kernel,
        dtype: str | None = None,
        num_threads: int | None = None,
        tokenizer: Any | None = None,
        fast: bool = True,
        device: str | None = None,
        poison: bool = False,
    ) -> None:
        if num_threads is not None:
            if num_threads < 1:
                raise ConfigError(f"num_threads must be 1 or more, not {num_threads}")
            torch.set_num_threads(num_threads)
        self.loaded = load_model(model, dtype=dtype, device=device, tokenizer=tokenizer)
        self.model: PreTrainedModel = self.loaded.model
        self.device = self.model.device
        self.layout = layout
        try:
            self.kernel = kernel.resolve(str(self.device), dtype_name(self.loaded.dtype))
            self.attention = make_attention(self.kernel, layout)
            self._options = check_options(
                self.attention,
                self.loaded.layers.values(),
                kernel=self.kernel.name or type(self.kernel).__name__,
                model=self.loaded.name,
            )
        except BaseException:
            self.model.set_attn_implementation(self.loaded.own_attention)
            raise
        # A GPU kernel's own way to move many blocks of all layers at once, if it has one.
        self._move_blocks = (
            getattr(self.attention, "move_blocks", None) if self.device.type == "cuda" else None
        )
        self.poison = poison
        self.eos_token_ids = self.loaded.eos_token_ids
        self.max_model_len = self.loaded.max_model_len
        self.shape = _shape_of(self.model)
        self.num_blocks = self.block_size = self.host_blocks = 0
        self._tiers: tuple[list[torch.Tensor], ...] = ([], [])
        self.disk: BlockFile | None = None
        self._spoils = Spoils()
        self._rows = _Rows(layout, 0, 0)
        self.fast_path = FastPath()
        if fast and self.loaded.dtype != torch.float64:
            self.fast_path.install(self.model, self.loaded.layers, lambda: probe_logits(self.model))

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of one block's keys and values, all layers (0 before `prepare`)."""
        return sum(cache[0].nbytes for cache in self._tiers[0])

    def release(self) -> PreTrainedModel:
        """Give the model back as it was: its own attention, its own layers. The executor cannot be used afterwards."""
        self._close_disk()
        self.fast_path.remove()
        self.model.set_attn_implementation(self.loaded.own_attention)
        return self.model

    def prepare(
        self,
        *,
        num_blocks: int,
        block_size: int,
        host_blocks: int,
        max_num_seqs: int,
        disk_blocks: int = 0,
        disk_path: str | None = None,
    ) -> None:
        """Allocate the cache of every tier for a run, and forget the last one.

        Raises `ConfigError` if a size is out of range or the memory does not suffice.
        """
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "max_num_seqs": max_num_seqs}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} must be 1 or more, not {size}")
        for name, size in (("host_blocks", host_blocks), ("disk_blocks", disk_blocks)):
            if size < 0:
                raise ConfigError(f"{name} must be 0 or more, not {size}")
        self._close_disk()
        self._tiers = ([], [])  # The old run's tensors go before the new ones come.
        try:
            self._tiers = (
                self._allocate(num_blocks, block_size, self.device),
                self._allocate(host_blocks, block_size, torch.device("cpu")) if host_blocks else [],
            )
        except (RuntimeError, MemoryError) as error:
            total = (num_blocks + host_blocks) * block_size * self.loaded.kv_bytes_per_token
            raise ConfigError(
                f"no memory for a cache of {total / 2**30:.2f} GiB; lower num_blocks ({error})"
            ) from None
        self.num_blocks, self.block_size, self.host_blocks = num_blocks, block_size, host_blocks
        if disk_blocks:
            self.disk = BlockFile(disk_blocks, self.kv_bytes_per_block, disk_path)
        self._caches = dict(zip(self.loaded.layers, _pairs(self._tiers[0]), strict=True))
        max_blocks = min(num_blocks, -(-self.max_model_len // block_size))
        self._rows = _Rows(self.layout, max_num_seqs, max_blocks)

    def _allocate(self, num_blocks: int, block_size: int, device: torch.device) -> list[torch.Tensor]:
        tensors = []
        for layer in self.loaded.layers.values():
            for size in (layer.key_size, layer.value_size):
                cache = self.attention.allocate(
                    num_blocks, block_size, layer.num_kv_heads, size, dtype=self.loaded.dtype, device=device
                )
                if self.poison:
                    # All bits set are NaN too where a cache holds fp8, or its scales.
                    cache.fill_(math.nan if cache.is_floating_point() else 255)
                tensors.append(cache)
        return tensors

    def move(self, moves: deque[Move]) -> None:
        """Carry out ``moves`` from the left, popping each once all layers have it."""
        while moves:
            if DISK in (moves[0].src_tier, moves[0].dst_tier):
                self._move_slot(moves[0])
                moves.popleft()
                continue
            group = _independent(moves)
            for tier, block in ((m.src_tier, m.src) for m in group):
                self._check_block(tier, block)
            for tier, block in ((m.dst_tier, m.dst) for m in group):
                self._check_block(tier, block)
            source, target = self._tiers[group[0].src_tier], self._tiers[group[0].dst_tier]
            with torch.inference_mode():
                if self._move_blocks is not None:
                    self._move_blocks(source, target, [m.src for m in group], [m.dst for m in group])
                elif len(group) == 1:
                    for src, dst in zip(source, target, strict=True):
                        dst[group[0].dst].copy_(src[group[0].src])
                else:
                    here = torch.tensor([m.src for m in group], device=source[0].device)
                    there = torch.tensor([m.dst for m in group], device=target[0].device)
                    for src, dst in zip(source, target, strict=True):
                        dst.index_copy_(0, there, src.index_select(0, here).to(dst.device))
            # Nothing in a group reads what it writes, so one that a fault cuts short can be done again from its start.
            for move in group:
                if not self._spoils.passed_on(move):
                    self._spoils.done(move)
                moves.popleft()

    def _move_slot(self, move: Move) -> None:
        """Copy a block to the disk or up from it, by way of the file's buffer. One that fails spoils its target."""
        file = self.disk
        self._check_block(move.src_tier, move.src)
        self._check_block(move.dst_tier, move.dst)
        assert file is not None
        if self._spoils.passed_on(move):
            if move.dst_tier == DISK:
                file.forget(move.dst)
            return
        staging = torch.frombuffer(file.staging, dtype=torch.uint8)
        try:
            if move.dst_tier == DISK:
                self._each_part(self._tiers[move.src_tier], move.src, staging, write=False)
                file.store(move.dst)
            else:
                file.load(move.src)
                self._each_part(self._tiers[move.dst_tier], move.dst, staging, write=True)
        except SlotFault as fault:
            self._spoils.failed(move, str(fault))
        else:
            self._spoils.done(move)

    @torch.inference_mode()
    def _each_part(self, tier: list[torch.Tensor], block: int, staging: torch.Tensor, *, write: bool) -> None:
        """Copy a block of every layer's keys and values from ``staging``, one after the other, or to it."""
        at = 0
        for cache in tier:
            part = cache[block]
            end = at + part.nbytes
            room = staging[at:end].view(part.dtype).view(part.shape)
            if write:
                part.copy_(room)
            else:
                room.copy_(part)
            at = end

    def take_damage(self) -> Damage | None:
        """See `pagedlab.engine.orders.Fallible`."""
        return self._spoils.take()

    def _close_disk(self) -> None:
        if self.disk is not None:
            self.disk.close()
        self.disk, self._spoils = None, Spoils()

    def _check_block(self, tier: int, block: int) -> None:
        size = (self.num_blocks, self.host_blocks, 0 if self.disk is None else self.disk.num_blocks)[tier]
        if not 0 <= block < size:
            raise InvariantBroken(f"no block {block} in tier {TIER_NAMES[tier]}, which has {size}")

    def execute(self, orders: StepOrders) -> StepResult:
        """Run the batch once through the model and sample. After an exception the same orders may be given again."""
        self.move(orders.moves)
        rows = self._rows.sync(orders)
        batch = orders.batch
        if not batch:
            return StepResult(samples=[])
        logits, sampling = self._forward(batch, rows)
        samples: list[list[int]] = [[] for _ in batch]
        failures: dict[int, str] = {}
        if sampling:
            drawn, broken = sample(logits, [batch[i] for i in sampling])
            for i, tokens in zip(sampling, drawn, strict=True):
                samples[i] = tokens
            failures = {sampling[i]: reason for i, reason in broken.items()}
        return StepResult(samples=samples, failures=failures)

    @torch.inference_mode()
    def _forward(self, batch: Sequence[SequenceStep], rows: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Return logits [num sampling, vocab] and the batch entries they belong to."""
        tokens: list[int] = []
        positions: list[int] = []
        starts = [0]
        sampling: list[int] = []
        keep: list[int] = []
        for i, step in enumerate(batch):
            tokens += step.tokens
            positions += range(step.start, step.start + len(step.tokens))
            starts.append(len(tokens))
            if step.num_samples:
                sampling.append(i)
                keep.append(len(tokens) - 1)
        lengths = [step.context_len for step in batch]
        entries, index = self.layout.arrays()
        attention = AttentionBatch(
            query_start=np.array(starts, dtype=np.int32),
            context_lens=np.array(lengths, dtype=np.int32),
            rows=np.array(rows, dtype=np.int32),
            slots=self._slots(batch, len(tokens)),
            entries=entries,
            index=index,
            block_size=self.block_size,
            max_query_len=max(len(step.tokens) for step in batch),
            max_context_len=max(lengths),
        )
        extra: dict[str, Any] = {}
        kept = torch.tensor(keep, device=self.device, dtype=torch.long)
        if self.loaded.keeps_logits:
            extra["logits_to_keep"] = kept
        try:
            logits = self.model(
                torch.tensor([tokens], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                use_cache=False,
                paged=_PagedStep(self.attention, self._options, self._caches, attention),
                **extra,
            ).logits[0]
        finally:
            self.fast_path.end()
        return (logits if self.loaded.keeps_logits else logits.index_select(0, kept)), sampling

    def _slots(self, batch: Sequence[SequenceStep], num_tokens: int) -> NDArray[np.int64]:
        size = self.block_size
        slots = np.empty(num_tokens, dtype=np.int64)
        at = 0
        for step in batch:
            first, count = step.start, len(step.tokens)
            if count == 1:
                slots[at] = step.table[first // size] * size + first % size
            else:
                where = np.arange(first, first + count)
                low = first // size
                blocks = np.array(step.table[low : (first + count - 1) // size + 1], dtype=np.int64)
                slots[at : at + count] = blocks[where // size - low] * size + where % size
            at += count
        return slots

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of ``text``; `ConfigError` if the model came without a tokenizer."""
        if self.loaded.tokenizer is None:
            raise ConfigError(f"{self.loaded.name} has no tokenizer; give prompts as token ids")
        return [int(i) for i in self.loaded.tokenizer(text, verbose=False)["input_ids"]]

    def detokenize(self, tokens: Sequence[int]) -> str | None:
        """Return the text of ``tokens`` without special tokens, or None if the model came without a tokenizer."""
        if self.loaded.tokenizer is None:
            return None
        return str(self.loaded.tokenizer.decode(list(tokens), skip_special_tokens=True))


@dataclass(slots=True)
class _PagedStep:
    """One step's way from an attention layer to its part of the cache."""

    attention: PagedAttention
    options: frozenset[str]
    caches: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]
    batch: AttentionBatch

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        key_cache, value_cache = self.caches[module]
        if key is not None and value is not None:
            self.attention.write(key_cache, key, self.batch)
            self.attention.write(value_cache, value, self.batch)
        options: dict[str, Any] = {}
        if sliding_window is not None or "sliding_window" in self.options:
            options["sliding_window"] = sliding_window
        if soft_cap is not None or "soft_cap" in self.options:
            options["soft_cap"] = soft_cap
        if sinks is not None:
            options["sinks"] = sinks
        return self.attention.attend(query, key_cache, value_cache, self.batch, scale=scale, **options)

    def place(self, module: torch.nn.Module, dtype: torch.dtype) -> Place | None:
        key_cache, value_cache = self.caches[module]
        # Only of this kernel is it known how its caches lie in memory.
        if type(self.attention) is not CPUPagedAttention or not key_cache.dtype == value_cache.dtype == dtype:
            return None
        if key_cache.shape != value_cache.shape:
            return None
        return (
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            self.batch.slots.ctypes.data,
            self.batch.block_size,
        )


@dataclass(slots=True)
class _Row:
    """A sequence's row in the layout: how many blocks of which version of its table stand there."""

    row: int
    version: int
    length: int


class _Rows:
    """Keeps the layout's rows equal to the block tables of the live sequences.

    A fault in the middle of a change leaves the layout in doubt; the next `sync` then starts over from empty, which
    costs one pass over all tables and nothing else.
    """

    def __init__(self, layout: Layout, max_rows: int, max_blocks: int) -> None:
        self.layout = layout
        self.max_rows = max_rows
        self.max_blocks = max_blocks
        self.held: dict[int, _Row] = {}
        self.free: list[int] = []
        self.in_doubt = True

    def sync(self, orders: StepOrders) -> list[int]:
        """Return the row of each entry of the batch, its table up to date. O(new blocks)."""
        if self.in_doubt:
            self.layout.reset(max_rows=self.max_rows, max_blocks=self.max_blocks)
            self.held = {}
            self.free = list(range(self.max_rows - 1, -1, -1))
        self.in_doubt = True
        for seq_id in orders.ended:
            self._close(seq_id)
        if len(self.free) + len(self.held) < len(orders.batch):
            raise InvariantBroken(
                f"a batch of {len(orders.batch)} sequences where at most {self.max_rows} were announced"
            )
        if len(self.free) < sum(step.seq_id not in self.held for step in orders.batch):
            running = {step.seq_id for step in orders.batch}
            for seq_id in [s for s in self.held if s not in running]:
                self._close(seq_id)
        rows = [self._update(step) for step in orders.batch]
        self.in_doubt = False
        return rows

    def _update(self, step: SequenceStep) -> int:
        row = self.held.get(step.seq_id)
        # What is reserved beyond the longest sequence is never read.
        length = min(len(step.table), self.max_blocks)
        if row is not None and row.version == step.table_version and row.length <= length:
            if row.length < length:
                self.layout.append(row.row, step.table[row.length : length])
                row.length = length
            return row.row
        if row is not None:
            self._close(step.seq_id)
        number = self.free.pop()
        self.layout.open(number, step.table[:length])
        self.held[step.seq_id] = _Row(number, step.table_version, length)
        return number

    def _close(self, seq_id: int) -> None:
        row = self.held.pop(seq_id, None)
        if row is not None:
            self.layout.close(row.row)
            self.free.append(row.row)


def _pairs(tensors: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(tensors[::2], tensors[1::2], strict=True)


def _independent(moves: deque[Move]) -> list[Move]:
    """Return the longest run of moves from the left, within one pair of tiers, that can be done in any order."""
    first = moves[0]
    group: list[Move] = []
    read: set[tuple[int, int]] = set()
    written: set[tuple[int, int]] = set()
    for move in moves:
        source, target = (move.src_tier, move.src), (move.dst_tier, move.dst)
        if (move.src_tier, move.dst_tier) != (first.src_tier, first.dst_tier):
            break
        if group and (source in written or target in written or target in read):
            break
        group.append(move)
        read.add(source)
        written.add(target)
    return group


def _shape_of(model: PreTrainedModel) -> ModelShape | None:
    """Return what policies count work with; None for a model that one shape of layer does not describe."""
    try:
        return ModelShape.from_hf_config(model.config)
    except ConfigError:
        return None
