"""The step and memory tables of a run, from records of which each may stand for many steps."""

from __future__ import annotations

import numpy as np

from pagedlab.engine.clock import PS_PER_SECOND
from pagedlab.engine.records import StepLog
from pagedlab.lab.measures import Columns


def tables(records: StepLog, pool_tokens: int) -> tuple[Columns, Columns]:
    """Return the columns of ``steps`` and ``memory``, a row for every single step, as `StepRecord.each` gives them.

    Every column is an array [num_steps]. Times are in seconds, memory in tokens and as shares of ``pool_tokens``.
    """
    f, moved, m = records.columns()
    i = np.zeros(len(records), dtype=np.int64)
    counts = f.pop("count")
    if (counts > 1).any():
        rows = np.repeat(np.arange(len(counts)), counts)
        i = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        f, m, moved = ({name: column[rows] for name, column in each.items()} for each in (f, m, moved))
    growth = f["growth"]
    start = f["start"] + i * f["duration"] + growth * (i * (i - 1) // 2)
    duration = f["duration"] + i * growth
    more = i * f["decode_tokens"]
    reserved = np.maximum(0, m["reserved"] - more)
    used = m["stored"] + m["reserved"] + m["internal"]
    m["stored"] = m["stored"] + more
    m["internal"] = used - m["stored"] - reserved
    m["reserved"] = reserved
    step = f["step"] + i
    # Records count from the beginning of the run, rows each for itself.
    blocks = {f"blocks_{link}": np.diff(column, prepend=0) for link, column in moved.items()}
    steps = {
        "step": step,
        "start": start / PS_PER_SECOND,
        "duration": duration / PS_PER_SECOND,
        "running": f["num_running"],
        "waiting": f["num_waiting"],
        "prefill_tokens": f["prefill_tokens"],
        "decode_tokens": f["decode_tokens"],
        # What came from the disk went on to the device.
        "moves": sum(blocks.values()) - blocks["blocks_from_disk"],
        **blocks,
        "preemptions": f["preemptions"],
        "recomputed_tokens": f["recomputed_tokens"],
        "context_tokens": f["context_tokens"] + more,
        "prefill_pairs": f["prefill_pairs"],
    }
    memory = {
        "step": step,
        "time": (start + duration) / PS_PER_SECOND,
        **m,
        **{f"{kind}_share": column / pool_tokens for kind, column in m.items()},
    }
    return steps, memory
