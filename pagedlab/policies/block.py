"""What policies see of a block: one physical slot of a tier and what lies in it.

    free ──take──▶ in use (ref_count ≥ 1) ──drop──▶ cached (ref_count 0, still found by its prefix) ──evict──▶ free

The cache owns and changes these objects; policies only read them, but for `Block.mark`. They hash by identity, so they
can be keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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

_ALONE = 1 << 62
"""More tokens than any prompt has: in a stretch whose blocks are that long, every block is the first."""


class Stretch:
    """Some blocks of a chain that one sequence stored, and what they have in common, in whatever tier they lie.

    They continue each other; the first continues ``parent`` (the serial of the content before it, or the salt of the
    tenant) and has ``depth`` tokens before it. A stretch may grow at its end; nothing else about it ever changes.
    """

    __slots__ = ("contents", "depth", "keys", "origin", "parent", "parent_key", "serials", "size")

    def __init__(
        self,
        keys: Sequence[int | None],
        contents: Sequence[Hashable] | None,
        parent: Hashable = None,
        parent_key: int | None = None,
        depth: int = 0,
        size: int = _ALONE,
        origin: Origin = NOBODY,
        serials: Sequence[int] | None = None,
    ) -> None:
        self.keys = keys
        self.contents = contents
        """None: nobody looks at tokens (a replay)."""
        self.serials = serials
        """As far as the lookup has given them; None where a key is as good as a serial (a replay)."""
        self.parent = parent
        self.parent_key = parent_key
        self.depth = depth
        self.size = size
        """Tokens in a block."""
        self.origin = origin

    def grow(self, keys: list[int], contents: list[Hashable]) -> None:
        """Take in what comes next; a lookup adds the serials."""
        self.keys += keys  # type: ignore[operator]
        if self.contents is not self.keys:
            self.contents += contents  # type: ignore[operator]

    def name(self, serials: Sequence[int]) -> None:
        """Add the serials of what comes next."""
        known = self.serials
        if not known:
            self.serials = serials
        elif isinstance(known, list):
            known += serials
        else:
            self.serials = [*known, *serials]


class _Nowhere(Stretch):
    __slots__ = ()

    def __reduce__(self) -> str:
        return "NOWHERE"


NOWHERE = _Nowhere((None,), None)
"""Where blocks belong that hold nothing findable."""


class _Slot:
    """What is looked at whenever a block changes hands, in one cache line (slots of a base class come first)."""

    __slots__ = ("index", "key", "last_released", "mark", "ref_count")


class Block(_Slot):
    """One block of ``block_size`` token slots in one tier.

    ``key`` is the chained hash by which lookups find the content, None while nothing can be found here. A hit
    is verified by ``content`` (the block's token ids) and ``parent`` (the ``serial`` of the content before
    it, or the salt of the tenant for a first block), so equal keys of unequal prefixes never meet.

    What a block has in common with those that were stored with it lies in its ``stretch``, and the block looks it up
    there. Setting it (whoever plays the cache for a policy may) gives the block a stretch of its own.
    """

    __slots__ = (
        "born",
        "created",
        "depth",
        "fill",
        "hits",
        "stretch",
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
        self.stretch: Stretch = NOWHERE
        self.depth = 0
        """Tokens before this block in its sequence."""
        self.hits = 0
        """Admissions that found it, since it was stored."""
        self.born = -1
        """It was stored in its tier by the n-th store; blocks that one sequence stores at once share it."""
        self.created = 0
        """Engine time at which it was stored in its tier, in picoseconds."""
        self.last_released = 0
        """Engine time of the last release, in picoseconds."""
        self.mark = 0
        """For the eviction policy of its tier to note something: no dictionary is as quick. Nobody else looks at it."""

    @property
    def at(self) -> int:
        """Which block of its stretch it is."""
        stretch = self.stretch
        return (self.depth - stretch.depth) // stretch.size

    @property
    def serial(self) -> int:
        """Identity of the content; copies in several tiers have the same. `GONE` where nothing can be found."""
        serials = self.stretch.serials
        if serials is None:
            return GONE if self.key is None else self.key
        at = self.at
        return serials[at] if at < len(serials) else GONE

    @serial.setter
    def serial(self, serial: int) -> None:
        self._alone().serials = None if serial == GONE else (serial,)

    @property
    def parent(self) -> Hashable:
        """Serial of the content before it, or the tenant's salt in a tuple."""
        stretch, at = self.stretch, self.at
        if not at:
            return stretch.parent
        before = stretch.keys if stretch.serials is None else stretch.serials
        return before[at - 1] if at <= len(before) else GONE

    @parent.setter
    def parent(self, parent: Hashable) -> None:
        self._alone().parent = parent

    @property
    def parent_key(self) -> int | None:
        """Key of the content before it; None for a first block."""
        at = self.at
        return self.stretch.keys[at - 1] if at else self.stretch.parent_key

    @parent_key.setter
    def parent_key(self, key: int | None) -> None:
        self._alone().parent_key = key

    @property
    def content(self) -> Hashable:
        """Its token ids, or what stands for them; None where nobody looks at them (a replay)."""
        contents = self.stretch.contents
        return None if contents is None else contents[self.at]

    @content.setter
    def content(self, content: Hashable) -> None:
        self._alone().contents = (content,)

    @property
    def origin(self) -> Origin:
        """Session, request class and salt of the sequence that stored it."""
        return self.stretch.origin

    @origin.setter
    def origin(self, origin: Origin) -> None:
        self._alone().origin = origin

    def _alone(self) -> Stretch:
        """Return a stretch that no other block is in, after putting the block there."""
        old = self.stretch
        if old is NOWHERE or old.size != _ALONE:
            serials = None if old.serials is None else (self.serial,)
            self.stretch = Stretch(
                (self.key,),
                (self.content,),
                self.parent,
                self.parent_key,
                0,
                _ALONE,
                old.origin,
                serials,
            )
        return self.stretch

    @property
    def session(self) -> str | None:
        """The session whose sequence stored it."""
        return self.stretch.origin.session

    @property
    def request_class(self) -> str | None:
        """The class of the request that stored it."""
        return self.stretch.origin.request_class

    @property
    def salt(self) -> Hashable:
        """The tenant that stored it."""
        return self.stretch.origin.salt

    def holds(self, content: Hashable, parent: Hashable) -> bool:
        """Whether it holds ``content`` as what continues ``parent``."""
        return self.content == content and self.parent == parent

    def stand_for(self, other: Block, born: int, now: int) -> None:
        """Take on the content of ``other``, of which this block (in another tier) becomes a copy."""
        self.key, self.stretch, self.depth, self.hits = other.key, other.stretch, other.depth, other.hits
        self.born, self.created = born, now

    def blank(self) -> None:
        """Hold nothing that can be found."""
        self.key = None
        self.stretch = NOWHERE

    def __repr__(self) -> str:
        state = "in use" if self.ref_count else "cached" if self.key is not None else "free"
        return f"<block {TIER_NAMES[self.tier]}:{self.index} {state} depth {self.depth} hits {self.hits}>"


FIELDS = (
    *("index", "tier", "ref_count", "fill", "key", "depth", "hits", "born", "created", "last_released"),
    *("serial", "parent", "parent_key", "content", "origin"),
)
"""All that a block is."""
