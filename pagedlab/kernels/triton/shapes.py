"""How attention is cut: rows and keys a tile, warps and stages, by the shape of the heads.

For each shape there is a rule, and a short list of other launches that `tuning` may find to be faster. The rule goes by
nothing else than the shape: a choice by the batch would change the order of sums with the company. What spills on a GPU
that `resources` compiles for is not on the list; what wants more shared memory than one has is left out there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton

MOST_CHANNELS = 256
"""Largest head that is served; beyond it nothing fits into shared memory and registers."""
FUSED = {"enable_fp_fusion": True}
"""Multiply and add in one, said aloud: Triton's default changes between versions, and with it the bits of results."""
WRITING = {"num_warps": 1, **FUSED}
"""For one token and head, a program of `cache_write` needs no more threads."""
LEAST_ROWS = 16
"""A matrix unit takes 16 rows; a smaller group is padded."""
LEAST_KEYS = 16
DEEP = 5
"""Stages with which two tiles are under way: keys are found through the table, and either load takes its share."""
PROGRAMS = 4
"""Programs of `decode` that are wanted on each multiprocessor before contexts are cut into more pieces."""


class Launch(NamedTuple):
    """How one launch of `decode` or `prefill` is cut; two launches differ in time, and in the last bits of sums."""

    rows: int
    """Rows a tile: query heads of one KV head, in `prefill` times query tokens."""
    tile: int
    """Keys a tile."""
    num_warps: int
    num_stages: int
    programs: int = 0
    """Of `decode`: programs wanted on each multiprocessor, by which contexts are cut into pieces."""

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles with."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **FUSED}

    def __str__(self) -> str:
        text = f"{self.rows}x{self.tile}, {self.num_warps} warps, {self.num_stages} stages"
        return f"{text}, {self.programs} programs" if self.programs else text


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one layer's heads, and the launches that go with them."""

    group: int
    constants: dict[str, int]
    """GROUP, SIZE, VALUE_SIZE and the two sizes padded to a power of two."""
    decode: tuple[Launch, ...]
    prefill: tuple[Launch, ...]
    """Launches that serve this shape, the rule first."""

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
        rows = max(least, 32 if exact else 64)
        # Where registers are left for larger tiles, and where they are short even for deeper pipelines.
        roomy, tight = widest <= 128 and not (exact or quantised), widest > 128 and quantised
        decode = Launch(least, *_cut(least, widest, exact, quantised), 2, PROGRAMS)
        prefill = Launch(rows, *_cut(rows, widest, exact, quantised), 2)
        return Shape(
            group=group,
            constants={
                "GROUP": group,
                "SIZE": size,
                "VALUE_SIZE": value_size,
                "PADDED": padded,
                "VALUE_PADDED": value_padded,
            },
            decode=_distinct(decode, _decoding(decode, roomy and least <= LEAST_ROWS, tight), least),
            prefill=_distinct(prefill, _prefilling(prefill, roomy and rows <= 64, tight), least),
        )

    def in_pieces_of(self, length: int) -> tuple[Launch, ...]:
        """Return the launches of `decode` that cut a context into pieces of ``length`` keys, whatever the batch."""
        return tuple(x for x in self.decode if x.programs == PROGRAMS and length % x.tile == 0)


def _decoding(rule: Launch, roomy: bool, tight: bool) -> Iterator[Launch]:
    half = rule.tile // 2
    yield rule._replace(programs=rule.programs // 2)
    yield rule._replace(programs=2 * rule.programs)
    yield rule._replace(tile=half)
    yield rule._replace(tile=half, num_stages=DEEP)
    yield rule._replace(tile=half, num_warps=rule.num_warps // 2, num_stages=3)
    if not tight:
        yield rule._replace(num_stages=3)
        yield rule._replace(num_stages=DEEP)
    if roomy:
        yield rule._replace(num_warps=rule.num_warps // 2)
        yield rule._replace(tile=2 * rule.tile)


def _prefilling(rule: Launch, roomy: bool, tight: bool) -> Iterator[Launch]:
    yield rule._replace(num_stages=3)
    yield rule._replace(num_stages=DEEP)
    yield rule._replace(tile=rule.tile // 2)
    if not tight:
        yield rule._replace(rows=rule.rows // 2)
    if roomy:
        yield rule._replace(num_warps=2 * rule.num_warps)
        yield rule._replace(rows=2 * rule.rows, num_warps=2 * rule.num_warps)
        yield rule._replace(rows=2 * rule.rows, num_warps=2 * rule.num_warps, num_stages=3)


def _distinct(rule: Launch, others: Iterable[Launch], least: int) -> tuple[Launch, ...]:
    """Return the rule, then those ``others`` that the matrix units can take and that hold ``least`` rows."""
    return tuple(dict.fromkeys([rule, *(x for x in others if x.rows >= least and x.tile >= LEAST_KEYS)]))


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
