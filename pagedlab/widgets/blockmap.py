"""`BlockMap`: a pool of blocks on a canvas, one tile a block, redrawn as the run goes on.

    codes  [n] uint8   what a block is: `FREE`, a colour of a running sequence, `SHARED`, `CACHED`, `CLAIMED`, `NULL`
    notes  [n] int32   what belongs to it: sequence id, number of sharers, hits

A frame carries both whole (5 bytes a block); a delta only what changed (9 bytes a change). The frame is a trait whose
value is always the current one, so a reloaded page and a second view get the map back without being sent it.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from importlib.resources import files
from io import BytesIO
from typing import Any, NamedTuple

import anywidget
import numpy as np
import traitlets
from numpy.typing import ArrayLike, NDArray

from pagedlab.cache.pool import BlockPool
from pagedlab.engine.engine import Engine
from pagedlab.engine.sequence import Sequence
from pagedlab.policies.block import DEVICE, Block

NUM_COLORS = 6
FREE = 0
SEQUENCE = 1
"""First of the `NUM_COLORS` codes of blocks that one sequence holds; the colour is ``seq_id % NUM_COLORS``."""
SHARED = SEQUENCE + NUM_COLORS
CACHED = SHARED + 1
CLAIMED = CACHED + 1
"""Held by a sequence, with nothing in it yet."""
NULL = CLAIMED + 1
"""Never handed out."""
NUM_CODES = NULL + 1

_OKABE_ITO = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"]
PALETTES: dict[str, list[str]] = {
    # free, sequences (Okabe and Ito's colours), shared, cached, claimed, null; then lines, dot, outline, row numbers
    "light": [
        "#e9edf2",
        *_OKABE_ITO,
        *["#1f2937", "#dfe5ec", "#f6f8fa", "#d3dae3", "#9aa7b6", "#ffffff", "#111827", "#6b7280"],
    ],
    "dark": [
        "#2c333b",
        *_OKABE_ITO,
        *["#f1f5f9", "#39434e", "#161a1f", "#434e5b", "#7a8899", "#111827", "#ffffff", "#9ca3af"],
    ],
}
"""Every kind differs in shape too: shared blocks have a dot, cached ones are hatched, claimed ones hollow."""

LABELS = {
    "free": "free",
    "running": "running (one colour per sequence)",
    "shared": "shared",
    "cached": "cached, reusable",
    "claimed": "claimed, still empty",
    "null": "null block",
}
HOST_LABELS = {**LABELS, "running": "swapped out (one colour per sequence)", "shared": "", "claimed": ""}
DISK_LABELS = {**HOST_LABELS, "running": ""}
"""An empty label leaves a kind that does not occur out of the legend."""

Codes = NDArray[np.uint8]
Notes = NDArray[np.int32]


class Delta(NamedTuple):
    """The blocks that changed: ``where`` [m] uint32, and their new ``codes`` [m] and ``notes`` [m]."""

    where: NDArray[np.uint32]
    codes: Codes
    notes: Notes

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return int(self.where.nbytes + self.codes.nbytes + self.notes.nbytes)


def encode_frame(codes: Codes, notes: Notes) -> bytes:
    """Return a full frame: the codes, then the notes as little-endian int32."""
    return codes.tobytes() + notes.astype("<i4", copy=False).tobytes()


def decode_frame(frame: bytes) -> tuple[Codes, Notes]:
    """Return ``(codes, notes)`` of a full frame, as the page reads it."""
    n = len(frame) // 5
    return np.frombuffer(frame[:n], np.uint8), np.frombuffer(frame[n:], "<i4")


def encode_delta(before: tuple[Codes, Notes], after: tuple[Codes, Notes]) -> Delta:
    """Return what changed between two states of the same number of blocks."""
    where = np.flatnonzero((before[0] != after[0]) | (before[1] != after[1]))
    return Delta(where.astype("<u4"), after[0][where], after[1][where].astype("<i4"))


def apply_delta(state: tuple[Codes, Notes], delta: Delta) -> None:
    """Bring ``state`` up to date in place, as the page does."""
    state[0][delta.where] = delta.codes
    state[1][delta.where] = delta.notes


def default_columns(num_blocks: int) -> int:
    """Return the power of two that makes a map about four times as wide as high (at least 16)."""
    cols = 16
    while cols * cols < 4 * num_blocks:
        cols *= 2
    return cols


def read_pool(engine: Engine, tier: int = DEVICE) -> tuple[Codes, Notes, dict[str, str]]:
    """Return codes and notes of a tier's blocks, and the names of the sequences that hold some. O(blocks)."""
    pool = _pool(engine, tier)
    if pool is None:
        return np.zeros(0, np.uint8), np.zeros(0, np.int32), {}
    n = len(pool.blocks)
    codes, notes = np.zeros(n, np.uint8), np.zeros(n, np.int32)
    counts = np.fromiter((b.ref_count for b in pool.blocks), np.int32, n)
    cached = [b for b in pool.blocks if b.key is not None and not b.ref_count]
    where = [b.index for b in cached]
    codes[where] = CACHED
    notes[where] = [b.hits for b in cached]
    names: dict[str, str] = {}
    for seq in (*engine.running, *engine.waiting):
        held = [b.index for b in _held(seq, tier)] if tier else seq.table.indices
        if held:
            filled = len(held) if tier else -(-seq.num_computed // pool.block_size)
            codes[held[:filled]] = SEQUENCE + seq.seq_id % NUM_COLORS
            codes[held[filled:]] = CLAIMED
            notes[held] = seq.seq_id
            names[str(seq.seq_id)] = name_of(seq.request_id, seq.sample_index)
    shared = counts > 1
    codes[shared] = SHARED
    notes[shared] = counts[shared]
    codes[: pool.reserved] = NULL
    return codes, notes, names


def _pool(engine: Engine, tier: int) -> BlockPool | None:
    return engine.cache.pools[tier] if tier < len(engine.cache.pools) else None


def _held(sequence: Sequence, tier: int) -> list[Block]:
    """The sequence's blocks in a tier: in the host's those of one that is swapped out, in the disk's none."""
    table = sequence.table
    return (table.blocks, table.host_blocks, [])[tier]


def name_of(request_id: str, sample_index: int = 0, limit: int = 40) -> str:
    """Return a sequence's name as tooltips show it, cut to ``limit`` characters."""
    name = request_id if not sample_index else f"{request_id} #{sample_index}"
    return name if len(name) <= limit else name[: limit - 1] + "…"


def describe_block(engine: Engine, index: int, tier: int = DEVICE) -> str:
    """Return one line on a block: its state, who holds it, which tokens it has, how often it was hit."""
    pool = _pool(engine, tier)
    if pool is None or not 0 <= index < len(pool.blocks):
        return ""
    block = pool.blocks[index]
    words = [f"block {index}"]
    holders = [
        name_of(s.request_id, s.sample_index)
        for s in (*engine.running, *engine.waiting)
        if block in _held(s, tier)
    ]
    if index < pool.reserved:
        words.append("null block, never handed out")
    elif block.ref_count:
        more = f" and {len(holders) - 4} more" if len(holders) > 4 else ""
        words.append(f"held by {', '.join(holders[:4])}{more}" if holders else "in use")
    else:
        words.append("free" if block.key is None else "cached, reusable")
    if block.key is not None:
        words.append(f"tokens {block.depth} to {block.depth + pool.block_size - 1} of its prefix")
        words.append(f"{block.hits} hit{'' if block.hits == 1 else 's'}")
        if block.session is not None:
            words.append(f"session {name_of(str(block.session))}")
    return " · ".join(words)


class BlockMap(anywidget.AnyWidget):
    """A canvas with one tile a block; hover for its holder, click (or arrow keys) to select one.

    ``show`` takes a whole state and sends what changed, at most ``max_fps`` times a second; the last state is
    never lost. Readable in light and dark themes and with any colour vision.

    >>> blocks = BlockMap(64, title="device")
    >>> blocks.show([FREE] * 62 + [CACHED, SHARED])
    >>> blocks.counts()["free"]
    62
    """

    _esm = files("pagedlab.widgets").joinpath("static/blockmap.js").read_text(encoding="utf-8")
    _css = files("pagedlab.widgets").joinpath("static/blockmap.css").read_text(encoding="utf-8")

    n_blocks = traitlets.Int(0).tag(sync=True)
    cols = traitlets.Int(32).tag(sync=True)
    max_cell = traitlets.Int(22).tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    labels = traitlets.Dict().tag(sync=True)
    names = traitlets.Dict().tag(sync=True)
    palettes = traitlets.Dict().tag(sync=True)
    selected = traitlets.Int(-1).tag(sync=True)
    frame = traitlets.Bytes(b"").tag(sync=True, to_json=lambda value, widget: widget.current_frame())

    def __init__(
        self,
        num_blocks: int,
        *,
        title: str = "",
        cols: int | None = None,
        labels: Mapping[str, str] | None = None,
        max_cell: int = 22,
        max_fps: float = 15.0,
    ) -> None:
        self.max_fps = max_fps
        self._state = np.zeros(num_blocks, np.uint8), np.zeros(num_blocks, np.int32)
        self._sent: tuple[Codes, Notes] | None = None
        self._names: dict[str, str] = {}
        self._sent_at = float("-inf")
        self._trailing: asyncio.TimerHandle | None = None
        super().__init__(
            n_blocks=num_blocks,
            cols=cols or default_columns(num_blocks),
            max_cell=max_cell,
            title=title,
            labels={**LABELS, **(labels or {})},
            palettes=PALETTES,
        )
        self.add_class("pl-map")

    # ---- what it shows -----------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """True if a `show` now would be sent at once."""
        return time.monotonic() - self._sent_at >= 1 / self.max_fps

    def show(
        self, codes: ArrayLike, notes: ArrayLike | None = None, names: Mapping[str, str] | None = None
    ) -> None:
        """Show this state, now or at the next frame. ``names`` maps sequence ids to what tooltips call them."""
        new = np.array(codes, np.uint8).ravel()
        if len(new) != self.n_blocks:
            raise ValueError(f"codes for {self.n_blocks} blocks are needed, not {len(new)}; see resize()")
        self._state = (
            new,
            np.zeros(len(new), np.int32) if notes is None else np.array(notes, np.int32).ravel(),
        )
        if names is not None:
            self._names = dict(names)
        if self.due:
            self.flush()
        elif self._trailing is None:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                return
            self._trailing = loop.call_later(1 / self.max_fps, self.flush)

    def flush(self) -> None:
        """Send what has not been sent."""
        if self._trailing is not None:
            self._trailing.cancel()
            self._trailing = None
        self._sent_at = time.monotonic()
        before, self._sent = self._sent, self._state
        if self._names != self.names:
            self.names = self._names
        if self.comm is None:
            return
        if before is None or len(before[0]) != len(self._state[0]):
            self.send_state("frame")
            return
        delta = encode_delta(before, self._state)
        if delta.nbytes >= 5 * self.n_blocks:
            self.send_state("frame")
        elif delta.nbytes:
            self.send({"kind": "delta"}, buffers=[part.tobytes() for part in delta])

    def resize(self, num_blocks: int, *, title: str | None = None, cols: int | None = None) -> None:
        """Start over, all free, with another number of blocks."""
        self._state = np.zeros(num_blocks, np.uint8), np.zeros(num_blocks, np.int32)
        self._sent, self._names = None, {}
        with self.hold_sync():
            self.n_blocks = num_blocks
            self.cols = cols or default_columns(num_blocks)
            self.selected = -1
            if title is not None:
                self.title = title
        self.flush()

    def current_frame(self) -> bytes:
        """Return the current state as a full frame."""
        return encode_frame(*self._state)

    def counts(self) -> dict[str, int]:
        """Return how many blocks are of each kind of the legend."""
        counts = np.bincount(self._state[0], minlength=NUM_CODES)
        return {
            "free": int(counts[FREE]),
            "running": int(counts[SEQUENCE:SHARED].sum()),
            "shared": int(counts[SHARED]),
            "cached": int(counts[CACHED]),
            "claimed": int(counts[CLAIMED]),
            "null": int(counts[NULL]),
        }

    # ---- where no kernel is ------------------------------------------------------------------------------------

    def png(self) -> bytes:
        """Return the map as a picture, for viewers without a kernel."""
        from pagedlab.widgets.picture import draw_map

        buffer = BytesIO()
        draw_map(self._state[0], self.cols, self.title, self.labels, self.counts()).save(
            buffer, "PNG", optimize=True
        )
        return buffer.getvalue()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        bundle = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return {**bundle[0], "image/png": base64.b64encode(self.png()).decode()}, bundle[1]
