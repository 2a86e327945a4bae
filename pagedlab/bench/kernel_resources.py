"""What every Triton kernel takes on GPUs that need not be here: registers, stack, spills and shared memory.

Kernels are compiled ahead of time for A100 (sm_80), H100 and H200 (sm_90) and MI300 (gfx942), with every launch that a
run may choose; the first of each kernel is the rule's. ``registers`` are those of a thread (AMD: vector registers),
``stack`` and ``shared`` are bytes; ``spills`` counts spilled registers on AMD, while ptxas puts them on the stack.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from pagedlab.errors import ConfigError

SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"dtype": "float16"},
    {"dtype": "float32"},
    {"head_size": 64},
    {"head_size": 80},
    {"head_size": 96},
    {"head_size": 256},
    {"dtype": "float32", "head_size": 256},
    {"group": 1},
    {"head_size": 64, "group": 71},
    {"block_size": 13},
    {"block_size": 256},
    {"layout": "padded"},
    {"layout": "two-level"},
    {"layout": "extents"},
    {"features": True},
    {"kv_dtype": "fp8"},
    {"kv_dtype": "int8"},
    {"kv_dtype": "fp8", "head_size": 256},
    {"kv_dtype": "int8", "head_size": 256},
)
"""Arguments of `pagedlab.kernels.triton.resources.builds`: the default, and each size changed alone."""


def main(json: bool = False) -> list[dict[str, Any]]:
    """Compile and return the rows (the command line prints them)."""
    if find_spec("triton") is None:
        raise ConfigError("bench kernel-resources needs triton, which is not installed")
    from pagedlab.kernels.triton.resources import compile_kernels

    return compile_kernels(shapes=SHAPES, every_launch=True)
