"""The device tier at one moment: one small number per block, for a map of the memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagedlab.engine.engine import Engine

FREE, CACHED, SHARED, RESERVED, NULL, FIRST_COLOUR = range(6)
NUM_COLOURS = 12
"""Running sequences take turns with so many colours."""

LEGEND = {
    FREE: "free",
    CACHED: "cached",
    SHARED: "shared",
    RESERVED: "reserved, still empty",
    NULL: "never handed out",
}


class Snapshot(NamedTuple):
    """One code per device block, and what the codes stand for.

    ``blocks`` is uint8 [num_blocks]: 0 free, 1 cached, 2 held by several sequences, 3 held and still empty, 4 the null
    block, and from 5 on the colour of the one sequence that holds the block. ``legend`` names the codes of now.
    """

    blocks: NDArray[np.uint8]
    legend: dict[int, str]


def colour_of(seq_id: int) -> int:
    """Return a sequence's code in a snapshot."""
    return FIRST_COLOUR + seq_id % NUM_COLOURS


def snapshot(engine: Engine) -> Snapshot:
    """Return the state of every device block. O(pool)."""
    pool, size = engine.cache.device, engine.config.block_size
    codes = np.zeros(len(pool.blocks), dtype=np.uint8)
    codes[: pool.reserved] = NULL
    for block in pool.blocks:
        if block.ref_count > 1:
            codes[block.index] = SHARED
        elif block.ref_count == 0 and block.key is not None:
            codes[block.index] = CACHED
    legend = dict(LEGEND)
    for seq in engine.running:
        code = colour_of(seq.seq_id)
        filled = -(-seq.num_computed // size)
        for i, index in enumerate(seq.table.indices):
            if codes[index] != SHARED:
                codes[index] = code if i < filled else RESERVED
        name = seq.request_id if not seq.sample_index else f"{seq.request_id}, sample {seq.sample_index}"
        legend[code] = f"{legend[code]}; {name}" if code in legend else name
    return Snapshot(codes, legend)
