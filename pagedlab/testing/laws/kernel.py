"""The laws of slot `kernel`: attention by the book, and nothing from slots that no query may see."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pagedlab.errors import ConfigError, LawBroken
from pagedlab.policies.kernel import OPTIONS
from pagedlab.testing.law import Skipped, law
from pagedlab.testing.subject import Subject

if TYPE_CHECKING:
    import torch

_Batch = tuple[list[tuple[int, int]], dict[str, Any]]
_BATCHES: tuple[_Batch, ...] = (
    ([(1, 1)], {}),
    ([(3, 3), (1, 9), (2, 5)], {}),
    ([(1, 7), (4, 6)], {"group": 1, "block_size": 1}),
    ([(1, 33), (5, 20), (1, 2)], {"num_kv_heads": 1, "group": 7, "block_size": 16}),
    ([(1, 12), (6, 11)], {"sliding_window": 4, "block_size": 3}),
    ([(2, 8), (1, 17)], {"soft_cap": 1.5, "head_size": 20}),
    ([(1, 14), (7, 9)], {"alibi_slopes": True, "group": 3}),
    ([(1, 10), (4, 13)], {"sinks": True}),
)
"""Queries and context of each sequence, and what else is particular about the batch. True: a number for each head."""
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
    """Attention over the blocks equals softmax(QKᵀ)V in float64: ragged batches, grouped heads, blocks of any size."""
    _compare(subject, None)


@law("kernel")
def check_kernel_sliding_window_agrees_with_dense(subject: Subject) -> None:
    """With a window w a query sees the last w tokens and no other, if ``attend`` has ``sliding_window``."""
    _compare(subject, "sliding_window")


@law("kernel")
def check_kernel_soft_cap_agrees_with_dense(subject: Subject) -> None:
    """A soft cap c makes each score x to ``c * tanh(x / c)``, if ``attend`` has ``soft_cap``."""
    _compare(subject, "soft_cap")


@law("kernel")
def check_kernel_alibi_slopes_agree_with_dense(subject: Subject) -> None:
    """ALiBi takes a head's slope times the distance from each score, if ``attend`` has ``alibi_slopes``."""
    _compare(subject, "alibi_slopes")


@law("kernel")
def check_kernel_sinks_agree_with_dense(subject: Subject) -> None:
    """A head's sink takes part in the softmax and has no value, if ``attend`` has ``sinks``."""
    _compare(subject, "sinks")


@law("kernel")
def check_kernel_unused_slots_cannot_leak(subject: Subject) -> None:
    """NaN in every slot that no query may see changes nothing."""
    device, dtype, kernel = _place(subject)
    limit, lacking = _limit(kernel, dtype), set(OPTIONS) - _options(kernel)
    for seed, (lengths, shape) in enumerate(_BATCHES):
        if lacking.intersection(shape):
            continue
        with suppress(ConfigError):
            clean, poisoned = (
                _error(kernel, device, dtype, lengths, shape, seed, poison) for poison in (0.0, float("nan"))
            )
            if clean <= limit and not poisoned <= limit:
                raise LawBroken(
                    f"{_told(lengths, shape)}: with NaN in the unused slots the result is another"
                )


def _compare(subject: Subject, option: str | None) -> None:
    """Compare the batches with ``option`` with the textbook, or those without any; what is refused is left out."""
    device, dtype, kernel = _place(subject)
    if option is not None and option not in _options(kernel):
        raise Skipped(f"attend has no {option}: a model that needs it is refused")
    limit, refused, served = _limit(kernel, dtype), "", False
    for seed, (lengths, shape) in enumerate(_BATCHES):
        if next((name for name in OPTIONS if name in shape), None) != option:
            continue
        try:
            error = _error(kernel, device, dtype, lengths, shape, seed, 0.0)
        except ConfigError as reason:
            refused = str(reason)
            continue
        served = True
        if error <= limit:
            continue
        plain = {name: given for name, given in shape.items() if name != option}
        if option is not None and not _error(kernel, device, dtype, lengths, plain, seed, 0.0) <= limit:
            raise Skipped(f"without {option} the result is wrong already")
        raise LawBroken(f"{_told(lengths, shape)}: relative error {error:.2g} in {dtype} on {device}")
    if not served:
        raise Skipped(f"it serves nothing that is tried: {refused}")


def _told(lengths: list[tuple[int, int]], shape: dict[str, Any]) -> str:
    return f"contexts of {', '.join(f'{t} tokens, {q} queried' for q, t in lengths)}; {shape or 'plain'}"


def _limit(kernel: Any, dtype: str) -> float:
    return float(max(_TOLERANCE if dtype == "float64" else 1e-4, kernel.rounding))


def _options(kernel: Any) -> frozenset[str]:
    """Return the options that the ``attend`` of this kernel has."""
    from pagedlab.executors.attention import make_attention
    from pagedlab.kernels.base import options_of
    from pagedlab.policies.layout import CSR

    return options_of(make_attention(kernel, CSR()))


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

    from pagedlab.executors.attention import make_attention
    from pagedlab.kernels.base import AttentionBatch
    from pagedlab.kernels.dense import dense_attention
    from pagedlab.policies.layout import CSR

    heads, group = shape.get("num_kv_heads", 2), shape.get("group", 2)
    size, block_size = shape.get("head_size", 16), shape.get("block_size", 4)
    window = shape.get("sliding_window")
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

    implementation = make_attention(kernel, layout)
    options: dict[str, Any] = {"scale": size**-0.5} | {name: shape[name] for name in OPTIONS if name in shape}
    for name in ("alibi_slopes", "sinks"):
        if name in shape:
            options[name] = draw(heads * group)
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
    out = implementation.attend(query, caches[0], caches[1], batch(first), **options)
    at, parts = 0, []
    for (q, _), keys, values in zip(lengths, *contents):
        parts.append(dense_attention(query[at : at + q].double(), keys.double(), values.double(), **options))
        at += q
    wanted = torch.cat(parts)
    if out.shape != wanted.shape:
        raise LawBroken(f"the result has shape {list(out.shape)}, not {list(wanted.shape)}")
    return float((out.double() - wanted).norm() / wanted.norm())
