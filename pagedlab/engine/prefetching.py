"""When a prefetcher is asked, what its loads cost, and how they end.

It is asked in a step in which requests wait, after something that it was told of, at the time that it named, and when
the link has room for what the last plan had to leave out. Of these only the times can come while sequences merely
decode, and they are known beforehand: so a leap that ends at `next_ask` is exact.

Where the clock counts what a cost model says, a load takes its time on the `Link`, beside the steps, and whoever needs
it before waits; saving what it displaces goes the other way and costs nothing. Elsewhere the executor carries it out
with the step that orders it, or at once while nothing runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as ReadOnly
from itertools import islice
from typing import TYPE_CHECKING

from pagedlab import events as ev
from pagedlab.cache.kv_cache import KVCache
from pagedlab.engine.clock import PS_PER_SECOND, to_seconds
from pagedlab.engine.link import Link
from pagedlab.engine.sequence import Group, Sequence, Status
from pagedlab.errors import PolicyError
from pagedlab.policies.block import DEVICE, DISK, Block
from pagedlab.policies.lookup import Prefix
from pagedlab.policies.prefetch import ENDS, Arrival, Fate, Load, Prefetch, Waiting

if TYPE_CHECKING:
    from pagedlab.cache.moves import Move
    from pagedlab.engine.records import Totals

_PAST = 1024
"""Finished sequences whose hashes are kept for prefetchers that look at them."""

_FRONT = 32
"""Waiting sequences whose blocks no prefetch takes the place of."""
_NEVER = 1e12
"""Seconds after which nobody will be there."""


class Prefetching:
    """The engine's dealings with a prefetcher that is switched on."""

    def __init__(self, policy: Prefetch, cache: KVCache, budget: int, totals: Totals) -> None:
        self.policy = policy
        self.link: Link | None = None
        """Where loads are under way; None if they are done with the step that orders them."""
        self._cache, self._budget, self._totals = cache, budget, totals
        self._stirred = False
        self._cut = False
        self._asked_at = -1
        self._wake: int | None = None
        self._ordered = 0
        """Moves at the end of the cache's list that nobody waits for."""
        self._late: list[Block] = []
        self._from_disk = 0
        """Of the loads of the last plan."""
        self._residency = CacheResidency(cache)

    # ---- what it is told ---------------------------------------------------------------------------------------

    def arrived(self, seq: Sequence) -> None:
        """A request has joined the queue."""
        self.policy.arrived(seq)
        self._stir()

    def used(self, seq: Sequence, num_blocks: int) -> None:
        """A sequence was admitted with its first ``num_blocks`` blocks found."""
        self.policy.used(seq, seq.table.blocks[:num_blocks])
        self._stir()

    def finished(self, seq: Sequence) -> None:
        """A request has ended."""
        self.policy.finished(seq)
        self._stir()

    def _stir(self) -> None:
        self._stirred = True
        self._wake = self._read_wake()

    def hear(self, block: Block, fate: Fate) -> None:
        """A load was carried out or refused, or has ended."""
        now = self._cache.events.time
        if fate == "useful" and self.link is not None:
            self.link.settle(now)
            if self.link.ready_at(block) is not None:
                fate = "late"
                self._late.append(block)
        if fate in ENDS:
            self._cache.events.record(
                ev.PREFETCH_ENDED, blocks=(block.index,), keys=(block.key or 0,), detail=fate
            )
        self._totals.prefetch[fate] += 1
        self.policy.feedback(block, fate)
        self._wake = self._read_wake()

    # ---- asking ------------------------------------------------------------------------------------------------

    def next_ask(self) -> int | None:
        """Return when it wants to be asked though nothing happens, in picoseconds; a time that has passed: at once."""
        if self._stirred:
            return self._asked_at
        at = self._wake
        if self._cut:
            ready = None if self.link is None else self.link.next_ready
            room = self._asked_at if ready is None else ready
            return room if at is None else min(room, at)
        return at

    def _read_wake(self) -> int | None:
        wake = self.policy.wake_at()
        if wake is None:
            return None
        if isinstance(wake, bool) or not isinstance(wake, int | float) or wake != wake:
            raise PolicyError(
                f"prefetch {type(self.policy).__name__} wants to be asked at {wake!r}; "
                "wake_at() returns seconds or None"
            )
        if not to_seconds(self._asked_at) < wake < _NEVER:
            return None
        return _on_the_clock(wake)

    def is_due(self, now: int) -> bool:
        """Whether it is to be asked at ``now``, though no request waits."""
        at = self.next_ask()
        return at is not None and at <= now

    def ask(self, waiting: ReadOnly[Sequence], now: int) -> None:
        """Ask for a plan and order what there is room for."""
        room = self._budget - (0 if self.link is None else self.link.under_way(now))
        residency = self._residency
        residency.shown = self._cache.prefetched.unused
        loads = self.policy.plan(waiting, residency, room)
        self._stirred = False
        self._asked_at = now
        self._wake = self._read_wake()
        self._check(loads)
        before = len(self._cache.moves)
        loaded = self._order(loads[:room], waiting)
        self._cut = len(loads) > room and (bool(loaded) or not room)
        self._ordered = len(self._cache.moves) - before
        if self.link is not None and loaded:
            self.link.send(loaded, now, self._from_disk)

    def _order(self, loads: list[Load], waiting: ReadOnly[Sequence]) -> list[Block]:
        """Carry out ``loads`` until there is no room, and return the device blocks that they fill."""
        cache, residency = self._cache, self._residency
        loaded: list[Block] = []
        self._from_disk = 0
        looked = False
        for load in loads:
            if load.evict and not looked and not cache.device.num_free:
                looked = True
                for seq in waiting[:_FRONT]:
                    residency.prefix(seq)
            block = cache.prefetch(load.block, evict=load.evict, protected=residency.shown)
            if block is not None:
                residency.shown[block] = None
                loaded.append(block)
                self._from_disk += load.block.tier == DISK
                continue
            self.hear(load.block, "refused")
            if load.evict and not cache.device.has_room(1, residency.shown):
                break
        return loaded

    def _check(self, loads: object) -> None:
        odd = loads
        if isinstance(loads, list):
            odd = next((x for x in loads if not isinstance(x, Load) or x.to_tier != DEVICE), None)
            if odd is None:
                return
        raise PolicyError(
            f"prefetch {type(self.policy).__name__} planned {odd!r}; a plan is a list of Load(block), each of a "
            "block in a lower tier that is to come to the device"
        )

    # ---- what it costs -----------------------------------------------------------------------------------------

    def take_own(self) -> list[Move]:
        """Take the moves that nobody waits for from the end of the cache's list, if the link carries them."""
        if self.link is None:
            return []
        moves = self._cache.moves
        own = [moves.pop() for _ in range(min(self._ordered, len(moves)))][::-1]
        self._ordered = 0
        self.link.serve(
            sum(m.src_tier != DEVICE and m.dst_tier == DEVICE for m in moves), self._cache.events.time
        )
        return own

    def wait_ps(self, now: int) -> int:
        """Return for how long a step that begins now waits for loads that its sequences need."""
        if not self._late:
            return 0
        assert self.link is not None
        ready = [at for block in self._late if (at := self.link.ready_at(block)) is not None]
        self._late = []
        return max(0, max(ready, default=now) - now)


class CacheResidency:
    """Where prefixes lie (`pagedlab.policies.prefetch.Residency`)."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._past: OrderedDict[Prefix, None] = OrderedDict()
        self.shown: dict[Block, None] = {}
        """Device blocks that have been answers, and others that are not to be given up for this plan."""

    def prefix(self, sequence: Waiting) -> list[Block]:
        """Return the cached blocks of the sequence's prefix, each in its highest tier."""
        assert isinstance(sequence, Sequence)
        prefix = sequence.table.prefix
        blocks = self._cache.match(prefix, len(sequence.tokens) - 1).blocks
        if sequence.status is Status.FINISHED:
            self._remember(prefix)
        self.shown.update((b, None) for b in blocks if b.tier == DEVICE)
        return list(blocks)

    def _remember(self, prefix: Prefix) -> None:
        """Who looks at a finished sequence often looks again; its hashes are kept for a while."""
        self._past[prefix] = None
        self._past.move_to_end(prefix)
        if len(self._past) > _PAST:
            self._past.popitem(last=False)[0].forget()

    def below(self, sequence: Waiting) -> list[Block]:
        """Return those of `prefix` that lie in a lower tier."""
        return [b for b in self.prefix(sequence) if b.tier != DEVICE]

    def children(self, block: Block) -> list[Block]:
        """Return the blocks that continue ``block`` and have no copy on the device."""
        if block.tier == DEVICE:
            self.shown[block] = None
        return self._cache.children(block)


class KnownFuture:
    """The arrivals that an engine knows of (`pagedlab.policies.prefetch.Future`)."""

    def __init__(self, known: Iterable[Group]) -> None:
        self._known = known

    def coming(self, n: int) -> list[Arrival]:
        """Return the next ``n``. O(n log n)."""
        return [Arrival(to_seconds(g.arrival), g.sequences[0]) for g in islice(self._known, n)]


def _on_the_clock(seconds: float) -> int:
    """Return the first picosecond at which a policy sees that ``seconds`` have come."""
    at = round(seconds * PS_PER_SECOND)
    while at / PS_PER_SECOND < seconds:
        at += 1
    return at
