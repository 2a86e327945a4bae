"""The data that the cache asks an executor to copy."""

from __future__ import annotations

from typing import NamedTuple


class Move(NamedTuple):
    """Copy one block's keys and values, all layers, from ``(src_tier, src)`` to ``(dst_tier, dst)``.

    Device to device is copy-on-write, device to host is swapping out, host to device swapping in or prefetch; host to
    disk is a copy that goes one tier further down, disk to device a hit or prefetch. Moves are
    carried out in the order in which they were made: a block may be saved, then overwritten.
    """

    src_tier: int
    src: int
    dst_tier: int
    dst: int
