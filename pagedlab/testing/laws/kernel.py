"""The laws of slot `kernel`: attention by the book, and nothing from slots that no query may see."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pagedlab.errors import ConfigError, LawBroken
from pagedlab.testing.law import Skipped, law
from pagedlab.testing.subject import Subject

if TYPE_CHECKING:
    import torch

_BATCHES: tuple[tuple[list[tuple[int, int]], dict[str, Any]], ...] = (
    ([(1, 1)], {}),
    ([(3, 3), (1, 9), (2, 5)], {}),
    ([(1, 7), (4, 6)], {"group": 1, "block_size": 1}),
    ([(1, 33), (5, 20), (1, 2)], {"num_kv_heads": 1, "group": 7, "block_size": 16}),
    ([(1, 12), (6, 11)], {"sliding_window": 4, "block_size": 3}),
    ([(2, 8), (1, 17)], {"soft_cap": 1.5, "head_size": 20}),
)
"""Queries and context of each sequence, and what else is particular about the batch."""
_TOLERANCE = 1e-10
"""Relative error in float64; times what float32 has less of precision, and a kernel's ``rounding`` if larger."""


@law("kernel")
def check_kernel_unserved_devices_are_refused(subject: Subject) -> None:
    """`resolve` answers with a kernel, or with `ConfigError` for a device or dtype that it does not serve."""
    for device, dtype in (("no-such-device", "float32"), ("cpu", "no-such-dtype")):
        try:
            subject.fresh().resolve(device, dtype)
        except ConfigError:
            continue
        raise LawBroken(f"resolve({device!r}, {dtype!r}) was accepted")


@law("kernel")
def check_kernel_agrees_with_dense(subject: Subject) -> None:
    """Attention over the blocks equals softmax(QKᵀ)V in float64: ragged, grouped, windowed, soft-capped."""
    _compare(subject, 0.0)


@law("kernel")
def check_kernel_unused_slots_cannot_leak(subject: Subject) -> None:
    """NaN in every slot that no query may see changes nothing."""
    _compare(subject, float("nan"))


def _compare(subject: Subject, poison: float) -> None:
    device, dtype, kernel = _place(subject)
    limit = max(_TOLERANCE if dtype == "float64" else 1e-4, kernel.rounding)
    refused = []
    for seed, (lengths, shape) in enumerate(_BATCHES):
        try:
            clean = _error(kernel, device, dtype, lengths, shape, seed, 0.0)
        except ConfigError as error:
            refused.append(str(error))
            continue
        told = f"contexts of {', '.join(f'{t} tokens, {q} queried' for q, t in lengths)}; {shape or 'plain'}"
        if poison == 0.0 and not clean <= limit:
            raise LawBroken(f"{told}: relative error {clean:.2g} in {dtype} on {device}")
        if (
            poison != 0.0
            and clean <= limit
            and not _error(kernel, device, dtype, lengths, shape, seed, poison) <= limit
        ):
            raise LawBroken(f"{told}: with NaN in the unused slots the result is another")
    if len(refused) == len(_BATCHES):
        raise Skipped(f"it serves nothing that is tried: {refused[0]}")


def _place(subject: Subject) -> tuple[str, str, Any]:
    """Return a device and a dtype that the kernel serves here, and the kernel that it chooses there."""
    if find_spec("torch") is None:
        raise Skipped("torch is not installed")
    import torch

    reasons = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in ("float64", "float32"):
            try:
                return device, dtype, subject.fresh().resolve(device, dtype)
            except ConfigError as error:
                reasons.append(str(error))
    raise Skipped(f"it cannot run here: {reasons[0]}")


def _error(
    kernel: Any,
    device: str,
    dtype: str,
    lengths: list[tuple[int, int]],
    shape: dict[str, Any],
    seed: int,
    poison: float,
) -> float:
    """Return the relative error of one random batch, with ``poison`` in every slot that no query sees."""
    import numpy as np
    import torch

    from pagedlab.kernels.base import AttentionBatch
    from pagedlab.kernels.dense import dense_attention
    from pagedlab.policies.layout import CSR

    heads, group = shape.get("num_kv_heads", 2), shape.get("group", 2)
    size, block_size = shape.get("head_size", 16), shape.get("block_size", 4)
    window = shape.get("sliding_window")
    options = {"scale": size**-0.5, "sliding_window": window, "soft_cap": shape.get("soft_cap")}
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(device, getattr(torch, dtype))

    needed = [-(-t // block_size) for _, t in lengths]
    order = torch.randperm(sum(needed) + 2, generator=random).tolist()
    tables = [[order.pop() for _ in range(n)] for n in needed]
    layout = CSR()
    layout.reset(max_rows=len(lengths) + 1, max_blocks=max(needed))
    for row, table in enumerate(tables, 1):
        layout.open(row, table)
    entries, index = layout.arrays()

    def batch(first: list[int]) -> AttentionBatch:
        slots = [
            tables[s][at // block_size] * block_size + at % block_size
            for s, (_, t) in enumerate(lengths)
            for at in range(first[s], t)
        ]
        return AttentionBatch(
            query_start=np.cumsum([0] + [q for q, _ in lengths], dtype=np.int32),
            context_lens=np.array([t for _, t in lengths], np.int32),
            rows=np.arange(1, len(lengths) + 1, dtype=np.int32),
            slots=np.array(slots, np.int64),
            entries=entries,
            index=index,
            block_size=block_size,
            max_query_len=max(q for q, _ in lengths),
            max_context_len=max(t for _, t in lengths),
        )

    implementation = _implementation(kernel)(layout, **kernel.get_params())
    # With a window the beginning of a context is seen by no query: its slots hold anything. But where a cache has
    # scales, a block's first slot begins a new one.
    from_start = window is None or kernel.rounding > 0
    first = [0 if from_start else max(0, t - q + 1 - (window or 0)) for q, t in lengths]
    query = draw(sum(q for q, _ in lengths), heads * group, size)
    contents, caches = [], []
    for _ in ("keys", "values"):
        content = [draw(t, heads, size) for _, t in lengths]
        cache = implementation.allocate(
            sum(needed) + 2, block_size, heads, size, dtype=query.dtype, device=query.device
        )
        cache.fill_(poison if cache.is_floating_point() or poison == 0 else 255)
        implementation.write(cache, torch.cat([c[at:] for c, at in zip(content, first)]), batch(first))
        contents.append(content)
        caches.append(cache)
    out = implementation.attend(query, *caches, batch(first), **options)
    at, parts = 0, []
    for (q, _), keys, values in zip(lengths, *contents):
        parts.append(dense_attention(query[at : at + q].double(), keys.double(), values.double(), **options))
        at += q
    wanted = torch.cat(parts)
    if out.shape != wanted.shape:
        raise LawBroken(f"the result has shape {list(out.shape)}, not {list(wanted.shape)}")
    return float((out.double() - wanted).norm() / wanted.norm())


def _implementation(kernel: Any) -> Any:
    from importlib import import_module

    module, _, attribute = kernel.implementation.partition(":")
    return getattr(import_module(module), attribute)
