"""The host's side of `quantised`: the form of fp8 on a device, and its range."""

from __future__ import annotations

import functools

import torch

from pagedlab.kernels.scaled import LARGEST_E4M3, LARGEST_INT8
from pagedlab.kernels.triton import quantised

FORMATS: dict[str, int] = {
    name: getattr(quantised, name).value for name in ("E4M3", "E4M3_BITS", "E4M3_FNUZ", "INT8")
}
LARGEST = {"E4M3": LARGEST_E4M3, "E4M3_BITS": LARGEST_E4M3, "E4M3_FNUZ": 240.0, "INT8": LARGEST_INT8}
QUANTISED_CHUNK = 16
"""Tokens that a program of `store_quantised` takes at a time."""


@functools.cache
def format_on(kv_dtype: str, device: torch.device) -> str:
    """Return the key of `FORMATS` that ``kv_dtype`` ("fp8" or "int8") has on ``device``."""
    if kv_dtype == "int8":
        return "INT8"
    if device.type == "cpu":
        return "E4M3_BITS"
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName
        return "E4M3_FNUZ" if architecture.startswith("gfx94") else "E4M3_BITS"
    return "E4M3" if torch.cuda.get_device_capability(device) >= (8, 9) else "E4M3_BITS"
