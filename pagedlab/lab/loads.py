"""The table of a run's prefetches, read from its event log."""

from __future__ import annotations

from typing import Any

from pagedlab import events as ev

Columns = dict[str, list[Any]]


def prefetched(events: Any, *, ended: bool) -> Columns:
    """Return one row a load that was carried out, in order: when, which block, and how it ended, and when.

    Times are in seconds; ``fate_time`` is None if it never ended. What was not used by the end of a run that has
    ``ended`` is useless; of one that was interrupted it is not known (None). Without an event log there are no rows.
    """
    rows: Columns = {name: [] for name in ("time", "block", "key", "fate", "fate_time")}
    row_of: dict[int, int] = {}
    for kind, time, blocks, keys, detail in zip(
        events["kind"], events["time"], events["blocks"], events["keys"], events["detail"], strict=True
    ):
        if kind == ev.BLOCKS_PREFETCHED:
            for block, key in zip(blocks, keys, strict=True):
                row_of[block] = len(rows["time"])
                for name, value in zip(
                    rows, (time, block, key, "useless" if ended else None, None), strict=True
                ):
                    rows[name].append(value)
        elif kind == ev.PREFETCH_ENDED:
            for block in blocks:
                if (row := row_of.pop(block, None)) is not None:
                    rows["fate"][row], rows["fate_time"][row] = detail, time
    return rows
