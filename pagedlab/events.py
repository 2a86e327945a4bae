"""What happened, in order: an append-only log that tables, plots and the block map read.

Where vLLM has a word for it (its KV event stream), so do we: `BlockStored`, `BlockRemoved`,
`AllBlocksCleared`. An event is one row; its blocks and keys are lists, so storing a prompt of 48 blocks is
one event.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

REQUEST_ARRIVED: Final = "RequestArrived"
REQUEST_REFUSED: Final = "RequestRefused"
REQUEST_ADMITTED: Final = "RequestAdmitted"
REQUEST_PREEMPTED: Final = "RequestPreempted"
REQUEST_RESUMED: Final = "RequestResumed"
REQUEST_FINISHED: Final = "RequestFinished"
SEQUENCE_FORKED: Final = "SequenceForked"
BLOCK_STORED: Final = "BlockStored"
BLOCK_REMOVED: Final = "BlockRemoved"
ALL_BLOCKS_CLEARED: Final = "AllBlocksCleared"
BLOCKS_ALLOCATED: Final = "BlocksAllocated"
BLOCKS_RELEASED: Final = "BlocksReleased"
PREFIX_HIT: Final = "PrefixHit"
BLOCKS_COPIED: Final = "BlocksCopied"
BLOCKS_LOADED: Final = "BlocksLoaded"
BLOCKS_SAVED: Final = "BlocksSaved"
BLOCKS_PREFETCHED: Final = "BlocksPrefetched"
PREFETCH_ENDED: Final = "PrefetchEnded"
TIER_FAULT: Final = "TierFault"
"""A copy to or from a lower tier failed: ``detail`` says how, ``blocks`` names the place in the tier ``medium``."""


class Event(NamedTuple):
    """One row. ``time`` is in picoseconds on the engine's clock; ``seq_id`` is -1 where no sequence is
    meant.
    """

    step: int
    time: int
    kind: str
    seq_id: int
    blocks: tuple[int, ...]
    keys: tuple[int, ...]
    parent_key: int | None
    medium: str
    detail: str
    token_ids: tuple[Hashable, ...]


class EventLog:
    """Append-only; ``step`` and ``time`` are set by the engine and stamped on every event that follows."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.step = 0
        self.time = 0
        self._rows: list[tuple[Any, ...]] = []

    def record(
        self,
        kind: str,
        seq_id: int = -1,
        blocks: Sequence[int] = (),
        keys: Sequence[int] = (),
        parent_key: int | None = None,
        medium: str = "device",
        detail: str = "",
        token_ids: Sequence[Hashable] = (),
    ) -> None:
        """Append one event. The sequences given must not be changed afterwards."""
        if self.enabled:
            self._rows.append(
                (self.step, self.time, kind, seq_id, blocks, keys, parent_key, medium, detail, token_ids)
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Event]:
        return self.since(0)

    def since(self, position: int) -> Iterator[Event]:
        """Iterate over the events from number ``position`` on."""
        for row in self._rows[position:]:
            step, time, kind, seq_id, blocks, keys, parent, medium, detail, token_ids = row
            yield Event(
                step, time, kind, seq_id, tuple(blocks), tuple(keys), parent, medium, detail, tuple(token_ids)
            )

    def columns(self) -> dict[str, list[Any]]:
        """Return the log as one list a column (``token_ids`` left out: it repeats the prompts)."""
        names = Event._fields[:-1]
        table = list(zip(*self._rows)) or [()] * len(Event._fields)
        out: dict[str, list[Any]] = {name: list(column) for name, column in zip(names, table)}
        out["blocks"] = [list(b) for b in out["blocks"]]
        out["keys"] = [list(k) for k in out["keys"]]
        return out

    def to_frame(self) -> pd.DataFrame:
        """Return the log as a pandas frame."""
        import pandas as pd

        return pd.DataFrame(self.columns())
