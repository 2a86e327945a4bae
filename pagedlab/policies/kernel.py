"""Slot `kernel`: how attention reads the blocks.

The policy here is the choice and its parameters; the device code lives in `pagedlab.kernels` and is found lazily by
``implementation`` ("module:attribute"), so that listing and simulating need no torch. An implementation is a class
with the methods of `pagedlab.kernels.base.PagedAttention`; it runs with every layout.
"""

from __future__ import annotations

from typing import ClassVar

from pagedlab.policies.base import Policy


class Kernel(Policy):
    """Contract of an attention kernel choice.

    ``implementation`` names the class that does the work, ``dtypes`` what the cache may hold, ``devices`` where it
    runs, and ``efficiency`` its share of copy bandwidth for cost models (None: not measured).
    """

    slot: ClassVar[str] = "kernel"
    implementation: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16", "float64")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
