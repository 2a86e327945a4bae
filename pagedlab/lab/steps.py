"""The step and memory tables of a run, from records of which each may stand for many steps."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from pagedlab.engine.clock import PS_PER_SECOND
from pagedlab.engine.records import StepRecord

_KINDS = ("stored", "reserved", "internal", "external", "cached", "free", "saved")
_FIELDS = ("step", "start", "duration", "count", "growth", "num_running", "num_waiting", "prefill_tokens",
           "decode_tokens", "moves", "preemptions", "context_tokens", "prefill_pairs")  # fmt: skip


def tables(
    records: Sequence[StepRecord], pool_tokens: int
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return the columns of ``steps`` and ``memory``, a row for every single step, as `StepRecord.each` gives them.

    Times are in seconds, memory in tokens and as shares of ``pool_tokens``.
    """
    get = attrgetter(*_FIELDS)
    flat = np.array([get(r) for r in records], dtype=np.int64).reshape(-1, len(_FIELDS))
    held = np.array([r.memory for r in records], dtype=np.int64).reshape(-1, len(_KINDS))
    counts = flat[:, _FIELDS.index("count")]
    rows = np.repeat(np.arange(len(flat)), counts)
    first = np.cumsum(counts) - counts
    i = np.arange(len(rows)) - first[rows]
    f = dict(zip(_FIELDS, flat[rows].T, strict=True))
    m = dict(zip(_KINDS, held[rows].T, strict=True))
    growth = f["growth"]
    start = f["start"] + i * f["duration"] + growth * (i * (i - 1) // 2)
    duration = f["duration"] + i * growth
    more = i * f["decode_tokens"]
    reserved = np.maximum(0, m["reserved"] - more)
    used = m["stored"] + m["reserved"] + m["internal"]
    m["stored"] = m["stored"] + more
    m["internal"] = used - m["stored"] - reserved
    m["reserved"] = reserved
    step = (f["step"] + i).tolist()
    steps = {
        "step": step,
        "start": (start / PS_PER_SECOND).tolist(),
        "duration": (duration / PS_PER_SECOND).tolist(),
        "running": f["num_running"].tolist(),
        "waiting": f["num_waiting"].tolist(),
        "prefill_tokens": f["prefill_tokens"].tolist(),
        "decode_tokens": f["decode_tokens"].tolist(),
        "moves": np.where(i == 0, f["moves"], 0).tolist(),
        "preemptions": f["preemptions"].tolist(),
        "context_tokens": (f["context_tokens"] + more).tolist(),
        "prefill_pairs": f["prefill_pairs"].tolist(),
    }
    memory = {
        "step": step,
        "time": ((start + duration) / PS_PER_SECOND).tolist(),
        **{kind: m[kind].tolist() for kind in _KINDS},
        **{f"{kind}_share": (m[kind] / pool_tokens).tolist() for kind in _KINDS},
    }
    return steps, memory
