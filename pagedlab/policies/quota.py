"""Shares of a tier for tenants, around any eviction policy.

What a tenant sends must not decide what another one finds. Salts (`Request.salt`) keep contents apart; this wrapper
keeps room apart. A tenant is a salt; all who are not named in ``shares``, and requests without a salt, are one tenant
together, with what the shares leave.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Any

from pagedlab.errors import ConfigError
from pagedlab.policies.base import param
from pagedlab.policies.block import Block, Origin
from pagedlab.policies.eviction import Eviction
from pagedlab.registry import make, register


@dataclass(eq=False, slots=True)
class Part:
    """One tenant's part of the tier, in blocks."""

    name: str
    quota: int
    policy: Eviction
    """Orders the tenant's own blocks."""
    resident: int = 0
    idle: int = 0
    """Of these, released."""

    @property
    def excess(self) -> int:
        """Released blocks beyond the share."""
        return max(0, min(self.idle, self.resident - self.quota))


@register("eviction", "quota")
class Quota(Eviction):
    """Take from the tenant furthest over its share, in the order of ``inner``; reserved shares are never touched.

    Shares that are not reserved only say who gives first: room that one tenant leaves is used by the others. Reserved
    shares divide the tier. A tenant that has used up its own gives up its own blocks, also while others are free; what
    another one keeps within its share is never given up for it; and a request that needs more than its tenant's share
    is refused. So each tenant's hits in a replay are those of a tier of its own, as large as its share, whatever the
    others do. Sequences that run may use what is free beyond their tenant's share, until they end. An allocator of
    runs is refused: what is kept for one tenant could lie in the middle of the only run that another one can have.

    Each tenant has an ``inner`` of its own. O(log tenants) a victim and O(tenants) a request for room come on top.
    """

    inner: str = param("lru", help="eviction policy of each tenant's blocks, any other name of that slot")
    shares: str = param("", help='shares of the tier, as in "a=0.3,b=0.5"; all others have the rest together')
    reserved: bool = param(False, help="whether a share is kept for its tenant, and is all that it can have")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parsed()
        if self.inner == self.name:
            raise ConfigError(f"Quota.inner must be another policy than {self.inner!r} itself")
        if make("eviction", self.inner).needs_future:  # type: ignore[attr-defined]
            raise ConfigError(f"Quota.inner = {self.inner!r} has to know the future of one tenant alone")

    def _parsed(self) -> dict[str, float]:
        """Return the shares by tenant, or raise `ConfigError`."""
        shares: dict[str, float] = {}
        for item in filter(None, map(str.strip, self.shares.split(","))):
            name, _, text = (part.strip() for part in item.rpartition("="))
            try:
                share = float(text)
            except ValueError:
                share = -1.0
            if not name or not 0 < share <= 1:
                raise ConfigError(
                    f'Quota.shares: {item!r} is not a tenant and its share, above 0 and at most 1, like "a=0.3"'
                )
            if name in shares:
                raise ConfigError(f"Quota.shares names tenant {name!r} twice")
            shares[name] = share
        if sum(shares.values()) > 1 + 1e-9:
            raise ConfigError(f"Quota.shares = {self.shares!r} add up to more than 1")
        return shares

    def reset(self, *, capacity: int) -> None:
        named = {name: int(share * capacity + 1e-9) for name, share in self._parsed().items()}
        quotas = [*named.items(), ("", capacity - sum(named.values()))]
        self._capacity = capacity
        self._parts = [self._make_part(name, quota, capacity) for name, quota in quotas]
        self._others = self._parts[-1]
        self._tenants: dict[Hashable, Part] = {part.name: part for part in self._parts[:-1]}
        self._home: dict[Block, Part] = {}
        self._idle: set[Block] = set()
        self._asking = self._others

    def _make_part(self, name: str, quota: int, capacity: int) -> Part:
        policy = make("eviction", self.inner)
        assert isinstance(policy, Eviction)
        policy.attach(self.view)
        policy.reset(capacity=max(1, quota) if self.reserved else capacity)
        return Part(name, quota, policy)

    def _part(self, origin: Origin) -> Part:
        salt = origin.salt
        return self._others if salt is None else self._tenants.get(str(salt), self._others)

    # ---- observations --------------------------------------------------------------------------------------------

    def begin(self, origin: Origin) -> None:
        self._asking = self._part(origin)
        self._asking.policy.begin(origin)

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        self._asking.policy.miss(key, readmitted)

    def insert(self, block: Block) -> None:
        self._home[block] = part = self._part(block.origin)
        part.resident += 1
        part.policy.insert(block)

    def hit(self, block: Block) -> None:
        part = self._home[block]
        if block in self._idle:
            self._idle.discard(block)
            part.idle -= 1
        part.policy.hit(block)

    def release(self, block: Block) -> None:
        part = self._home[block]
        self._idle.add(block)
        part.idle += 1
        part.policy.release(block)

    def remove(self, block: Block) -> None:
        part = self._home.pop(block)
        part.resident -= 1
        if block in self._idle:
            self._idle.discard(block)
            part.idle -= 1
        part.policy.remove(block)

    # ---- victims -------------------------------------------------------------------------------------------------

    def _spare(self, protected: Collection[Block]) -> dict[Part, int]:
        """Return the released blocks of each part that are not protected."""
        spare = {part: part.idle for part in self._parts}
        for block in self._idle.intersection(protected):
            spare[self._home[block]] -= 1
        return spare

    @staticmethod
    def _furthest(n: int, most: dict[Part, int], own: Part | None = None, more: int = 0) -> dict[Part, int]:
        """Spread up to ``n`` victims: each from the part that is furthest over its share, at most so many of each.

        ``own`` is about to get ``more`` blocks.
        """
        counts = dict.fromkeys(most, 0)
        heap = [
            (part.quota - part.resident - (more if part is own else 0), i, part)
            for i, (part, limit) in enumerate(most.items())
            if limit > 0
        ]
        heapify(heap)
        while heap and n > 0:
            under, i, part = heap[0]
            counts[part] += 1
            n -= 1
            if counts[part] == most[part]:
                heappop(heap)
            else:
                heapreplace(heap, (under + 1, i, part))
        return counts

    @staticmethod
    def _named(counts: dict[Part, int], protected: Collection[Block]) -> list[Block]:
        return [b for part, n in counts.items() if n for b in part.policy.victims(n, protected)]

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        spare = self._spare(protected)
        if sum(spare.values()) < n:
            return []
        return self._named(self._furthest(n, spare), protected)

    @property
    def partitioned(self) -> bool:
        return True

    @property
    def reserves(self) -> bool:
        return self.reserved and bool(self._parsed())

    def limit(self, origin: Origin) -> int:
        return self._part(origin).quota if self.reserved else self._capacity

    def _offered(self, own: Part, protected: Collection[Block]) -> dict[Part, int]:
        """Return how many blocks each part may give up for the part ``own``."""
        spare = self._spare(protected)
        if not self.reserved:
            return spare
        return {part: n if part is own else min(n, part.excess) for part, n in spare.items()}

    def obtainable(self, origin: Origin, protected: Collection[Block] = ()) -> int:
        return sum(self._offered(self._part(origin), protected).values())

    def victims_for(
        self, origin: Origin, n: int, free: int, protected: Collection[Block] = ()
    ) -> list[Block] | None:
        part = self._part(origin)
        offered = self._offered(part, protected)
        if sum(offered.values()) < n - free:
            return None
        if not self.reserved:
            return self._named(self._furthest(n - free, offered, part, n), protected)
        own = min(offered.pop(part), max(0, part.resident + n - part.quota))
        counts = self._furthest(n - free - own, offered)
        own += max(0, n - free - own - sum(counts.values()))
        return self._named({part: own, **counts}, protected)

    def stats(self) -> dict[str, Any]:
        """Blocks of each tenant now, and its share of the tier in blocks."""
        return {
            part.name or "others": {"blocks": part.resident, "share": part.quota, **part.policy.stats()}
            for part in self._parts
        }
