"""The paged cache: pools of every tier, block tables, prefix reuse, copy-on-write, swapping.

Every operation that can fail for lack of room is atomic: it succeeds, or returns False and nothing has changed,
neither in the cache nor in what a policy has observed. Data to be copied is asked for as `Move`s, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from pagedlab import events as ev
from pagedlab.cache.accounting import Memory, check_invariants
from pagedlab.cache.moves import Move
from pagedlab.cache.pool import BlockPool
from pagedlab.cache.prefetched import Children, Prefetched
from pagedlab.cache.publishing import Publishing
from pagedlab.cache.table import BlockTable
from pagedlab.errors import InvariantBroken
from pagedlab.events import EventLog
from pagedlab.policies.allocator import Allocator
from pagedlab.policies.block import DEVICE, DISK, HOST, TIER_NAMES, Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.lookup import NO_MATCH, Lookup, Match, Prefix
from pagedlab.policies.prefetch import Fate
from pagedlab.policies.swap import Swap
from pagedlab.policies.view import NOTHING_KNOWN, View


class KVCache(Publishing):
    """Blocks of a device tier, perhaps of a host tier and a disk tier below, and the tables that hold them."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        allocator: Allocator,
        lookup: Lookup,
        eviction: Eviction,
        swap: Swap,
        host_blocks: int = 0,
        disk_blocks: int = 0,
        null_block: bool = False,
        events: EventLog | None = None,
        on_prefetch_fate: Callable[[Block, Fate], None] | None = None,
        view: View = NOTHING_KNOWN,
        knows_children: bool = False,
    ) -> None:
        self.block_size = block_size
        self.lookup = lookup
        self.swap = swap
        self.events = EventLog() if events is None else events
        self.moves: deque[Move] = deque()
        """Copies asked for and not yet carried out; the executor pops them from the left."""
        self.device = BlockPool(
            num_blocks,
            allocator,
            eviction,
            self._device_evicted,
            block_size=block_size,
            reserved=int(null_block),
            view=view,
        )
        self.pools = [self.device]
        self._add_pools((host_blocks, disk_blocks), block_size, view)
        self.host = self.pools[HOST] if host_blocks else None
        self.disk = self.pools[DISK] if len(self.pools) > DISK else None
        lookup.reset(block_size=block_size, num_tiers=len(self.pools))
        self._shares = lookup.granularity != "none"
        self.prefetched = Prefetched(on_prefetch_fate)
        below = [block for pool in self.pools[1:] for block in pool.blocks]
        self._children = Children(below) if knows_children and below else None
        self._displaced: int | None = None
        """Key of what the device gave up last."""
        self.scattered = False
        """The last admission failed although enough blocks were free: no run was long enough."""
        self._starts: list[int] = []
        self._tokens = 0
        self._promised = 0
        self.better_match = False
        """What a refused sequence was told is out of date: something that it waits for was published, or there is less
        of the room that it could not use."""
        self._awaited: set[int] = set()
        self._await_any = False

    # ---- finding -----------------------------------------------------------------------------------------------

    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        """Return the longest cached prefix of at most ``max_tokens`` tokens. Changes nothing, counts as no use."""
        return self.lookup.match(prefix, max_tokens) if self._shares else NO_MATCH

    def await_better(self, prefix: Prefix, match: Match, max_tokens: int) -> None:
        """A sequence was refused with this match: note what would make it longer (`better_match`)."""
        if self.lookup.granularity == "token":
            self._await_any = True
        elif self._shares and (at := len(match.blocks)) < max_tokens // self.block_size:
            self._awaited.add(prefix.keys(at + 1)[at])

    def await_nothing(self) -> None:
        """Forget what was awaited."""
        self.better_match = self._await_any = False
        if self._awaited:
            self._awaited = set()

    # ---- admitting and growing ---------------------------------------------------------------------------------

    def admit(
        self, table: BlockTable, match: Match, claim: int, *, spare: int = 0, readmitted: bool = False
    ) -> bool:
        """Give an empty table its matched prefix and room for ``claim`` tokens in all; leave ``spare`` blocks.

        Matched blocks in lower tiers get a device block each and a move. A partial match is copied.
        """
        size = self.block_size
        hits, num_hits = match.blocks, len(match.blocks)
        fresh = max(-(-claim // size), num_hits + (match.partial is not None)) - num_hits
        low = [b for b in hits if b.tier] if self.host is not None else []
        guarded = hits if match.partial is None else [*hits, match.partial]
        protected = guarded if self.host is None else [b for b in guarded if b.tier == DEVICE]
        need = fresh + len(low)
        self.scattered = False
        device, origin = self.device, table.origin
        if not device.has_room(need + spare, protected, origin=origin) or (
            device.allocator.contiguous
            and not device.has_room(need, protected, contiguous=True, origin=origin)
        ):
            spare_blocks = self.device.num_free + self.device.num_cached
            self.scattered = self.device.allocator.contiguous and spare_blocks >= need + spare
            return False

        now = self.events.time
        self._observe(table, guarded, readmitted)
        pins = [] if self.host is None else [b for b in guarded if b.tier]
        for pool, here in self._below(pins) if pins else ():
            pool.share(here)
        device.share(protected)
        taken = self.device.take(need, contiguous=True, origin=origin)
        if taken is None:
            raise InvariantBroken(f"{need} blocks were promised to sequence {table.seq_id} and are not there")
        loads, rest = taken[: len(low)], taken[len(low) :]
        blocks = hits
        if low:
            incoming = iter(loads)
            blocks = [self._load(b, next(incoming), now) if b.tier else b for b in hits]
            self._record_loaded(table, low, loads)
        if self._eager:
            for block in guarded:
                if block.key is not None:
                    self._offer(block)
        if match.partial is not None:
            self.moves.append(Move(match.partial.tier, match.partial.index, DEVICE, rest[0].index))
            self.events.record(ev.BLOCKS_COPIED, table.seq_id, (match.partial.index, rest[0].index))
            self.pools[match.partial.tier].drop([match.partial], now)
        for pool, here in self._below(pins) if pins else ():
            pool.drop([b for b in here if b is not match.partial], now)

        table.hold([*blocks, *rest])
        table.num_tokens = match.num_tokens
        table.num_published = num_hits
        logged = self.events.enabled
        if hits:
            table.parent, table.parent_key = hits[-1].serial, hits[-1].key
            if logged:
                self.events.record(
                    ev.PREFIX_HIT,
                    table.seq_id,
                    [b.index for b in blocks],
                    detail=f"{match.num_tokens} tokens",
                )
        if rest and logged:
            self.events.record(ev.BLOCKS_ALLOCATED, table.seq_id, [b.index for b in rest])
        self._tokens += match.num_tokens
        self._promised += self._within(table)
        return True

    def _observe(self, table: BlockTable, found: list[Block], readmitted: bool) -> None:
        """Tell the eviction policies what this admission found and missed."""
        if not self._shares:
            return
        for pool in self.pools:
            pool.eviction.begin(table.origin)
        for block in found:
            block.hits += 1
        here = found
        if self.host is not None:
            here = [b for b in found if not b.tier]
            for pool, low in self._below(found) if len(here) < len(found) else ():
                pool.eviction.hit_all(low)
        self.device.eviction.hit_all(here)
        listens = type(self.device.eviction).miss is not Eviction.miss
        if not listens and not len(self.prefetched):
            return
        num_full = len(table.prefix) // self.block_size
        missed = table.prefix.keys(num_full)[len(found) : num_full]
        if len(self.prefetched):
            self.prefetched.end(here, "useful")
            lower = [b.key for b in found if b.tier and b.key is not None]
            self.prefetched.missed(lower + missed)
        if listens:
            miss = self.device.eviction.miss
            for key in missed:
                miss(key, readmitted)

    def _load(self, source: Block, target: Block, now: int) -> Block:
        """Make ``target`` (taken, in use) the device copy of a pinned block of a lower tier."""
        self.moves.append(Move(source.tier, source.index, DEVICE, target.index))
        if source.key is None:
            # While room was made, an evicted orphan took its place in the index: usable, but not findable any more.
            return target
        target.stand_for(source, self.device.next_store(), now)
        published = self.lookup.publish(target)
        if not published.indexed:
            target.blank()
            return target
        if published.displaced is not None:
            self._displace(published.displaced)
        self.device.store((target,))
        return target

    def _record_loaded(self, table: BlockTable, low: list[Block], loads: list[Block]) -> None:
        for pool, here in self._below(low):
            to = [new.index for old, new in zip(low, loads) if old.tier == pool.tier]
            self.events.record(
                ev.BLOCKS_LOADED, table.seq_id, to, [b.key or 0 for b in here], medium=TIER_NAMES[pool.tier]
            )

    def prepare_growth(self, tables: Sequence[BlockTable]) -> None:
        """One more token of each table is about to be asked for: evict for all of them at once."""
        size = self.block_size
        full = [t for t in tables if t.num_tokens == len(t.blocks) * size]
        self.device.make_free(len(full))

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens in all, and make the block to be written next the table's own."""
        blocks, size = table.blocks, self.block_size
        extra = -(-num_tokens // size) - len(blocks)
        at, offset = divmod(table.num_tokens, size)
        copy = offset != 0 and num_tokens > table.num_tokens and blocks[at].ref_count > 1
        if extra <= 0 and not copy:
            return True
        extra = max(extra, 0)
        after = blocks[-1].index if blocks else None
        taken = self.device.take(extra + copy, after=after, origin=table.origin)
        if taken is None:
            return False
        if self.scattered:
            self.better_match = True
        if copy:
            new, old = taken.pop(), blocks[at]
            self.moves.append(Move(DEVICE, old.index, DEVICE, new.index))
            self.device.drop([old], self.events.time)
            table.replace(at, new)
            self.events.record(ev.BLOCKS_COPIED, table.seq_id, (old.index, new.index))
        if taken:
            unfilled = table.final_len - len(blocks) * size
            if unfilled > 0:
                self._promised += min(extra * size, unfilled)
            blocks += taken
            if self.events.enabled:
                self.events.record(ev.BLOCKS_ALLOCATED, table.seq_id, [b.index for b in taken])
        return True

    def fork(self, parent: BlockTable, child: BlockTable) -> None:
        """Let ``child`` (empty) hold the same blocks as ``parent``, as far as they are filled. Never fails."""
        size = self.block_size
        held = -(-parent.num_tokens // size)
        for i, block in enumerate(parent.blocks[:held]):
            if block.ref_count == 1:
                block.fill = min(size, parent.num_tokens - i * size)
        self.device.share(parent.blocks[:held])
        child.hold(parent.blocks[:held])
        child.num_tokens = parent.num_tokens
        child.num_published = parent.num_published
        child.parent, child.parent_key = parent.parent, parent.parent_key
        self._tokens += child.num_tokens
        self._promised += self._within(child)
        self.events.record(
            ev.SEQUENCE_FORKED, child.seq_id, list(child.indices), detail=f"from {parent.seq_id}"
        )

    # ---- after a step ------------------------------------------------------------------------------------------

    def commit(self, table: BlockTable, num_tokens: int) -> None:
        """The next ``num_tokens`` tokens of the table are computed: publish the blocks that they complete."""
        table.num_tokens += num_tokens
        self._tokens += num_tokens
        full = table.num_tokens // self.block_size
        if full > table.num_published and self._shares:
            self._publish(table, full)

    # ---- giving up ---------------------------------------------------------------------------------------------

    def release(self, table: BlockTable, *, returns: bool = False) -> None:
        """Let go of everything that the table holds, tail first; published blocks stay cached.

        ``returns``: the sequence will be back for them.
        """
        if returns and self._shares:
            self.lookup.expect(table.prefix, table.blocks[: table.num_published])
        if table.host_blocks:
            self.host.drop(table.host_blocks[::-1], self.events.time)  # type: ignore[union-attr]
            table.host_blocks = []
        if table.blocks:
            self._tokens -= table.num_tokens
            self._promised -= self._within(table)
            self.device.drop(table.blocks[::-1], self.events.time)
            if self.events.enabled:
                self.events.record(ev.BLOCKS_RELEASED, table.seq_id, table.indices)
        table.blank()

    def swap_out(self, table: BlockTable) -> bool:
        """Copy the table's computed blocks to the host tier and give up the device's; False if there is no room."""
        used = -(-table.num_tokens // self.block_size)
        if self.host is None or used == 0:
            return False
        targets = self.host.take(used, origin=table.origin)
        if targets is None:
            return False
        for block, target in zip(table.blocks, targets):
            self.moves.append(Move(DEVICE, block.index, HOST, target.index))
        self.events.record(
            ev.BLOCKS_SAVED, table.seq_id, [b.index for b in targets], medium="host", detail="preempted"
        )
        self._tokens -= table.num_tokens
        self._promised -= self._within(table)
        self.device.drop(table.blocks[::-1], self.events.time)
        self.events.record(ev.BLOCKS_RELEASED, table.seq_id, table.indices)
        table.hold([])
        table.host_blocks = targets
        return True

    def swap_in(self, table: BlockTable, claim: int, *, spare: int = 0) -> bool:
        """Bring a swapped table back with room for ``claim`` tokens; False if there is no room."""
        used = len(table.host_blocks)
        need = max(-(-claim // self.block_size), used)
        if not self.device.has_room(need + spare, origin=table.origin):
            return False
        taken = self.device.take(need, origin=table.origin)
        if taken is None:
            return False
        for source, target in zip(table.host_blocks, taken):
            self.moves.append(Move(HOST, source.index, DEVICE, target.index))
        table.hold(taken)
        self.events.record(ev.BLOCKS_ALLOCATED, table.seq_id, list(table.indices))
        self.events.record(
            ev.BLOCKS_LOADED, table.seq_id, table.indices[:used], medium="host", detail="resumed"
        )
        self.host.drop(table.host_blocks[::-1], self.events.time)  # type: ignore[union-attr]
        table.host_blocks = []
        self._tokens += table.num_tokens
        self._promised += self._within(table)
        return True

    def prefetch(
        self, block: Block, *, evict: bool = False, protected: Collection[Block] = ()
    ) -> Block | None:
        """Bring a cached block of a lower tier up to the device and return where to; None if that is not to be.

        It takes a free block, or with ``evict`` a cached one that is not ``protected``. It is refused if there is
        neither, or if the content is on the device or no longer in that tier.
        """
        pool = self.device
        if (
            block.tier == DEVICE
            or block.key is None
            or self.lookup.copy_in(block, DEVICE) is not None
            or not (pool.num_free or (evict and pool.has_room(1, protected)))
        ):
            return None
        now, below = self.events.time, self.pools[block.tier]
        # What is given up may want a place in the tier below: not this one.
        below.eviction.hit_all([block])
        below.share((block,))
        self._displaced = None
        taken = pool.take(1, protected)
        if taken is None:
            raise InvariantBroken(f"a block was promised to the prefetch of {block!r} and is not there")
        key, displaced = block.key, self._displaced
        target = self._load(block, taken[0], now)
        below.drop((block,), now)
        pool.drop(taken, now)
        self.prefetched.begin(target, displaced)
        if target.key is None:
            self.prefetched.end((target,), "useless")
        else:
            self.events.record(
                ev.BLOCKS_PREFETCHED, blocks=(target.index,), keys=(key,), medium=TIER_NAMES[block.tier]
            )
        return target

    def children(self, block: Block) -> list[Block]:
        """Return the blocks that continue ``block`` in lower tiers alone, each in its highest one, latest first."""
        if self._children is None or block.key is None:
            return []
        found: dict[int, Block] = {}
        for child in self._children.of(block.serial):
            if self.lookup.copy_in(child, DEVICE) is None:
                known = found.setdefault(child.serial, child)
                if child.tier < known.tier:
                    found[child.serial] = child
        return list(found.values())

    def clear(self) -> None:
        """Forget every cached prefix in every tier. Running sequences keep their blocks, which nobody else finds."""
        self.prefetched.end_all("useless")
        for pool in self.pools:
            for block in pool.blocks:
                if block.key is not None:
                    self.lookup.forget(block)
                    pool.blank(block)
        self.events.record(ev.ALL_BLOCKS_CLEARED)

    # ---- evicting ----------------------------------------------------------------------------------------------

    def _device_evicted(self, blocks: list[Block]) -> None:
        if self.host is not None:
            if len(self.prefetched):
                self.prefetched.end(blocks, "useless")
            self._displaced = blocks[-1].key
            for block in blocks:
                self._offer(block)
                self.lookup.forget(block)
        else:
            self.lookup.forget_all(blocks)
        if self.events.enabled:
            self._record_removed(blocks)

    # ---- accounting --------------------------------------------------------------------------------------------

    def _within(self, table: BlockTable) -> int:
        """Token slots of the table that its sequence can come to fill."""
        return min(len(table.blocks) * self.block_size, table.final_len)

    def memory(self, behind: int = 0) -> Memory:
        """Return where the device tier's token slots are now, ``behind`` tokens more than tables count. O(1)."""
        size, pool = self.block_size, self.device
        free, cached, saved = pool.num_free * size, pool.num_cached * size, pool.saved_tokens
        tokens = self._tokens + behind
        stored = tokens - saved
        unwritten = pool.capacity * size - free - cached - stored
        promised = self._promised - tokens
        reserved = 0 if promised < 0 else promised if promised < unwritten else unwritten
        external = free if self.scattered else 0
        kinds = (stored, reserved, unwritten - reserved, external, cached, free - external, saved)
        return tuple.__new__(Memory, kinds)  # asked every step; half the time of Memory(...)

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Raise `InvariantBroken` unless law 1 holds for ``tables``, which must be all that hold blocks. O(pool)."""
        check_invariants(self, list(tables))
