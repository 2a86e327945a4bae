"""What policies see of a block: one physical slot of a tier and what lies in it.

    free ──take──▶ in use (ref_count ≥ 1) ──drop──▶ cached (ref_count 0, still found by its prefix) ──evict──▶ free

The cache owns and changes these objects; policies only read them. They hash by identity, so they can be keys.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

DEVICE = 0
HOST = 1
DISK = 2
TIER_NAMES = ("device", "host", "disk")


GONE = -1
"""Serial of what holds no findable content."""


class Origin(NamedTuple):
    """Whose sequence stored a block, and what its request said about it."""

    session: str | None = None
    request_class: str | None = None
    salt: Hashable = None
    agent_step: int | None = None
    """Step of the session's workflow at which it was stored."""
    next_step: int | None = None
    """Step at which it will be needed next."""
    retention_priority: int | None = None
    """0 to 100."""
    retention_seconds: float | None = None
    """How long the priority lasts; None: for ever."""


NOBODY = Origin()


class _Slot:
    """What is looked at whenever a block changes hands, in one cache line (slots of a base class come first)."""

    __slots__ = ("index", "key", "last_released", "ref_count")


class Block(_Slot):
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
        "origin",
        "parent",
        "parent_key",
        "serial",
        "tier",
    )

    def __init__(self, index: int, tier: int = DEVICE, size: int = 0) -> None:
        self.index = index
        """Physical block number in its tier."""
        self.tier = tier
        self.ref_count = 0
        """Tables that hold the block."""
        self.fill = size
        """Tokens in it while it is shared (a shared block is never written); else what it can hold."""
        self.key: int | None = None
        self.serial = GONE
        """Identity of the content; copies in several tiers have the same."""
        self.parent: Hashable = None
        self.parent_key: int | None = None
        self.content: Hashable = None
        self.origin = NOBODY
        """Session, request class and salt of the sequence that stored it."""
        self.depth = 0
        """Tokens before this block in its sequence."""
        self.hits = 0
        """Admissions that found it, since it was stored."""
        self.born = -1
        """It was stored in its tier by the n-th store; blocks that one sequence stores at once share it."""
        self.created = 0
        """Engine time at which it was stored, in picoseconds."""
        self.last_released = 0
        """Engine time of the last release, in picoseconds."""

    @property
    def session(self) -> str | None:
        """The session whose sequence stored it."""
        return self.origin.session

    @property
    def request_class(self) -> str | None:
        """The class of the request that stored it."""
        return self.origin.request_class

    @property
    def salt(self) -> Hashable:
        """The tenant that stored it."""
        return self.origin.salt

    def stand_for(self, other: Block, born: int, now: int) -> None:
        """Take on the content of ``other``, of which this block (in another tier) becomes a copy."""
        self.key, self.parent, self.parent_key = other.key, other.parent, other.parent_key
        self.content, self.depth, self.origin = other.content, other.depth, other.origin
        self.born, self.created, self.hits = born, now, other.hits

    def __repr__(self) -> str:
        state = "in use" if self.ref_count else "cached" if self.key is not None else "free"
        return f"<block {TIER_NAMES[self.tier]}:{self.index} {state} depth {self.depth} hits {self.hits}>"


FIELDS = (*_Slot.__slots__, *Block.__slots__)
"""All that a block has."""
