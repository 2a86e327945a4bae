"""How attention is cut: rows and keys a tile, warps and stages, by the shape of the heads.

Chosen so that nothing spills on the GPUs that `resources` compiles for, and by nothing else than the shape: a choice by
the batch would change the order of sums with the company.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import triton

MOST_CHANNELS = 256
"""Largest head that is served; beyond it nothing fits into shared memory and registers."""
FUSED = {"enable_fp_fusion": True}
"""Multiply and add in one, said aloud: Triton's default changes between versions, and with it the bits of results."""
LEAST_ROWS = 16
"""A matrix unit takes 16 rows; a smaller group is padded."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one layer's heads, and the tiles that go with them."""

    group: int
    constants: dict[str, int]
    """GROUP, SIZE, VALUE_SIZE and the two sizes padded to a power of two."""
    decode_rows: int
    decode_tile: int
    prefill_rows: int
    prefill_tile: int
    decode_options: dict[str, Any]
    prefill_options: dict[str, Any]

    @staticmethod
    @functools.cache
    def of(group: int, size: int, value_size: int, itemsize: int, quantised: bool = False) -> Shape:
        """Return the shape for ``group`` query heads a KV head, where products take numbers of ``itemsize`` bytes.

        Decoding a ``quantised`` cache takes registers of its own.
        """
        padded, value_padded = (max(16, triton.next_power_of_2(x)) for x in (size, value_size))
        widest = max(padded, value_padded)
        least = max(LEAST_ROWS, triton.next_power_of_2(group))
        # float32 in exact arithmetic does without matrix units: smaller tiles, more threads.
        exact = itemsize > 2
        decode_rows, prefill_rows = least, max(least, 32 if exact else 64)
        decode_tile, decode_warps = _cut(decode_rows, widest, exact, quantised)
        prefill_tile, prefill_warps = _cut(prefill_rows, widest, exact, quantised)
        return Shape(
            group=group,
            constants={
                "GROUP": group,
                "SIZE": size,
                "VALUE_SIZE": value_size,
                "PADDED": padded,
                "VALUE_PADDED": value_padded,
            },
            decode_rows=decode_rows,
            decode_tile=decode_tile,
            prefill_rows=prefill_rows,
            prefill_tile=prefill_tile,
            decode_options={"num_warps": decode_warps, "num_stages": 2, **FUSED},
            prefill_options={"num_warps": prefill_warps, "num_stages": 2, **FUSED},
        )


def _cut(rows: int, widest: int, exact: bool, quantised: bool) -> tuple[int, int]:
    """Return keys a tile, and warps."""
    if exact:
        return 32 if widest <= 64 or (rows <= 16 and widest <= 128) else 16, 8
    tile = 64 if widest <= 64 or (rows <= 32 and widest <= 128) else 32
    if quantised and rows > 32 and widest > 128:
        tile = 16
    return tile, 8 if widest > 128 or rows > 64 else 4


def round_up(x: int, step: int) -> int:
    """Return the least multiple of ``step`` that is not below ``x``."""
    return -(-x // step) * step
