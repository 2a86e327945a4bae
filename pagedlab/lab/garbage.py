"""The garbage collector while a run is made: records come by the hundred thousand, stay, and form no cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_COLLECT_AFTER = 1_000_000
"""Objects made between two looks of the garbage collector."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Let the collector look seldom meanwhile, and not at all through what is there to stay afterwards.

    What was made joins the old objects, which the collector comes back to when they have grown by a quarter. A process
    that keeps objects of its own from the collector (`gc.freeze`) pays one full look instead.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _COLLECT_AFTER) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        gc.set_threshold(*before)
