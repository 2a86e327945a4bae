"""Slot `kernel`: how attention reads the blocks.

The policy here is the choice and its parameters; the device code lives in `pagedlab.kernels` and is found lazily by
``implementation`` ("module:attribute"), so that listing and simulating need no torch. An implementation is a class
with the methods of `pagedlab.kernels.base.PagedAttention`; it runs with every layout.

The executor asks ``resolve(device, dtype)`` once, before it allocates a cache, and uses what comes back: `auto` answers
with its choice, every other kernel with itself, or with the reason why it cannot serve there.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import ClassVar

from pagedlab.errors import ConfigError
from pagedlab.policies.base import Policy, param
from pagedlab.registry import register

OPTIONS = ("sliding_window", "soft_cap", "alibi_slopes", "sinks")
"""Keyword arguments of `pagedlab.kernels.base.PagedAttention.attend` that an implementation may leave out."""


class Kernel(Policy):
    """Contract of an attention kernel choice.

    ``implementation`` names the class that does the work, ``dtypes`` what the cache may hold, and ``devices`` where it
    runs. What it can do besides plain attention is read from the signature of its ``attend``, which names those of
    ``sliding_window``, ``soft_cap``, ``alibi_slopes`` and ``sinks`` that it has. A model that needs another one is
    refused by `ConfigError` before the first step.
    """

    slot: ClassVar[str] = "kernel"
    implementation: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16", "float64")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    @property
    def rounding(self) -> float:
        """Relative error that attention may have because the cache holds keys and values coarser than the dtype."""
        return 0.0

    def resolve(self, device: str, dtype: str) -> Kernel:
        """Return the kernel to use for a cache of ``dtype`` ("float32", ...) on ``device`` ("cpu", "cuda:0", ...).

        Raises `ConfigError` that names what this kernel supports if that device or dtype is not among it.
        """
        title = self.name or type(self).__name__
        if device.partition(":")[0] not in self.devices:
            raise ConfigError(f"kernel {title!r} runs on {', '.join(self.devices)}, not on {device!r}")
        if dtype not in self.dtypes:
            raise ConfigError(f"kernel {title!r} serves a cache of {', '.join(self.dtypes)}, not {dtype!r}")
        return self


_ROUNDING = {"model": 0.0, "fp8": 0.08, "int8": 0.04}
"""By ``kv_dtype``: three bits after the first one; 127 steps up to a block's largest channel."""


@register("kernel", "dense")
class Dense(Kernel):
    """The yardstick: each context gathered from its blocks, then softmax(QKᵀ)V by the book, in at least float32."""

    implementation = "pagedlab.kernels.dense:DenseReference"


@register("kernel", "gather-sdpa")
class GatherSDPA(Kernel):
    """Each context gathered from its blocks into contiguous memory, then torch's scaled_dot_product_attention.

    What a system does that has no paged kernel: it moves every key and value twice more than needed.
    """

    implementation = "pagedlab.kernels.gather:GatherSDPA"


@register("kernel", "cpu-paged")
class CPUPaged(Kernel):
    """Reads keys and values where they lie (Kwon et al. 2023, section 4.3), with an online softmax, on CPU cores.

    Long contexts are cut into pieces where a batch has fewer tasks than the cores can share (Dao et al. 2023).
    """

    implementation = "pagedlab.kernels.cpu:CPUPagedAttention"
    devices = ("cpu",)

    batch_invariant: bool = param(
        False, help="a sequence's output is the same bits whoever shares its batch, on any number of threads"
    )
    split_tokens: int = param(
        2048, low=16, high=2**20, unit="tokens", help="piece of context a task reads, if batch_invariant"
    )
    kv_dtype: str = param(
        "model",
        choices=("model", "fp8", "int8"),
        help="what the cache holds; fp8 and int8 halve it or better and change what is said a little",
    )
    scales: str = param(
        "block",
        choices=("block", "head"),
        help="of fp8 and int8: one for each block and head, or for each head",
    )

    @property
    def rounding(self) -> float:
        return _ROUNDING[self.kv_dtype]


@register("kernel", "triton-paged")
class TritonPaged(Kernel):
    """Reads keys and values where they lie, on a GPU: split-KV decoding and variable-length prefill in Triton.

    Decoding cuts long contexts into pieces that run side by side (flash-decoding, Dao et al. 2023). Runs on the CPU
    only in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.

    Tiles, warps and stages follow a rule, unless a file of choices knows better (``PAGEDLAB_TUNING`` names it or says
    ``off``; else it lies in the folder for caches). ``autotune`` measures what the file does not hold and writes it
    there, so that the first steps of a new model take longer. Outputs differ in the last bits; one file, one output.
    """

    implementation = "pagedlab.kernels.triton.paged:TritonPagedAttention"
    devices = ("cuda",)
    dtypes = ("float32", "bfloat16", "float16")

    batch_invariant: bool = param(False, help="a sequence's output is the same bits whoever shares its batch")
    split_tokens: int = param(
        512, low=16, high=2**20, unit="tokens", help="piece of context a program reads, if batch_invariant"
    )
    kv_dtype: str = param(
        "model",
        choices=("model", "fp8", "int8"),
        help="what the cache holds; fp8 and int8 halve it or better and change what is said a little",
    )
    scales: str = param(
        "block",
        choices=("block", "head"),
        help="of fp8 and int8: one for each block and head, or for each head",
    )
    autotune: bool = param(
        False, help="measure tiles and warps where none are chosen yet; else the file of choices, or a rule"
    )

    @property
    def rounding(self) -> float:
        return _ROUNDING[self.kv_dtype]

    def resolve(self, device: str, dtype: str) -> Kernel:
        if find_spec("triton") is None:
            raise ConfigError(
                "kernel 'triton-paged' needs triton, which is not installed; 'gather-sdpa' does without"
            )
        if interpreted() and device == "cpu" and dtype in (*self.dtypes, "float64"):
            return self
        return super().resolve(device, dtype)


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@register("kernel", "auto")
class Auto(Kernel):
    """The fastest kernel for the device at hand: cpu-paged on a CPU, triton-paged on a GPU, else gather-sdpa."""

    implementation = ""

    def resolve(self, device: str, dtype: str) -> Kernel:
        if device.partition(":")[0] == "cpu":
            return CPUPaged.from_params({}).resolve(device, dtype)
        if find_spec("triton") is not None and dtype in TritonPaged.dtypes:
            return TritonPaged.from_params({}).resolve(device, dtype)
        return GatherSDPA().resolve(device, dtype)
