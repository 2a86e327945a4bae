"""What policies see of a block: one physical slot of a tier and what lies in it.

    free ──take──▶ in use (ref_count ≥ 1) ──drop──▶ cached (ref_count 0, still found by its prefix) ──evict──▶ free

The cache owns and changes these objects; policies only read them. They hash by identity, so they can be keys.
"""

from __future__ import annotations

from collections.abc import Hashable

DEVICE = 0
HOST = 1
TIER_NAMES = ("device", "host")


class Block:
    """One block of ``block_size`` token slots in one tier.

    ``key`` is the chained hash by which lookups find the content, None while nothing can be found here. A hit
    is verified by ``content`` (the block's token ids) and ``parent`` (the ``serial`` of the content before
    it, or the salt of the tenant for a first block), so equal keys of unequal prefixes never meet.
    """

    __slots__ = (
        "born",
        "content",
        "created",
        "depth",
        "fill",
        "hits",
        "index",
        "key",
        "last_released",
        "parent",
        "parent_key",
        "ref_count",
        "request_class",
        "salt",
        "serial",
        "session",
        "tier",
    )

    def __init__(self, index: int, tier: int = DEVICE) -> None:
        self.index = index
        """Physical block number in its tier."""
        self.tier = tier
        self.ref_count = 0
        """Tables that hold the block."""
        self.fill = 0
        """Tokens in it while it is shared (a shared block is never written)."""
        self.key: int | None = None
        self.serial = -1
        """Identity of the content; copies in several tiers have the same."""
        self.parent: Hashable = None
        self.parent_key: int | None = None
        self.content: Hashable = None
        self.salt: Hashable = None
        self.depth = 0
        """Tokens before this block in its sequence."""
        self.session: str | None = None
        self.request_class: str | None = None
        self.hits = 0
        """Admissions that found it, since it was stored."""
        self.born = -1
        """It was the n-th block ever stored in its tier."""
        self.created = 0
        """Engine time at which it was stored, in picoseconds."""
        self.last_released = 0
        """Engine time of the last release, in picoseconds."""

    def stand_for(self, other: Block) -> None:
        """Take on what identifies the content of ``other``, of which this block (in another tier) is a copy."""
        self.key, self.parent, self.parent_key = other.key, other.parent, other.parent_key
        self.content, self.salt, self.depth = other.content, other.salt, other.depth
        self.session, self.request_class = other.session, other.request_class

    def __repr__(self) -> str:
        state = "in use" if self.ref_count else "cached" if self.key is not None else "free"
        return f"<block {TIER_NAMES[self.tier]}:{self.index} {state} depth {self.depth} hits {self.hits}>"
