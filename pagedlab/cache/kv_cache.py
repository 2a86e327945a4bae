"""The paged cache: pools of every tier, block tables, prefix reuse, copy-on-write, swapping.

Every operation that can fail for lack of room is atomic: it succeeds, or returns False and nothing has changed,
neither in the cache nor in what a policy has observed. Data to be copied is asked for as `Move`s, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from pagedlab import events as ev
from pagedlab.cache.accounting import Memory, check_invariants
from pagedlab.cache.moves import Move
from pagedlab.cache.pool import BlockPool
from pagedlab.cache.table import BlockTable
from pagedlab.errors import InvariantBroken
from pagedlab.events import EventLog
from pagedlab.policies.allocator import Allocator, FreeList
from pagedlab.policies.block import DEVICE, HOST, TIER_NAMES, Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.lookup import NO_MATCH, Lookup, Match, Prefix
from pagedlab.policies.swap import Swap
from pagedlab.policies.view import NOTHING_KNOWN, View
from pagedlab.registry import make


class KVCache:
    """Blocks of a device tier and perhaps a host tier, and the tables that hold them."""

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
        null_block: bool = False,
        events: EventLog | None = None,
        on_prefetch_fate: Callable[[Block, str], None] | None = None,
        view: View = NOTHING_KNOWN,
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
        self.host: BlockPool | None = None
        if host_blocks:
            host_eviction = make("eviction", swap.host_eviction())
            assert isinstance(host_eviction, Eviction)
            self.host = BlockPool(
                host_blocks,
                FreeList(),
                host_eviction,
                self._host_evicted,
                tier=HOST,
                block_size=block_size,
                view=view,
            )
        self.pools = [self.device] if self.host is None else [self.device, self.host]
        lookup.reset(block_size=block_size, num_tiers=2 if host_blocks else 1)
        self._shares = lookup.granularity != "none"
        self._evicting: list[Block] = []
        self._prefetched: set[Block] = set()
        self._on_prefetch_fate = on_prefetch_fate or (lambda block, fate: None)
        self.hit_tokens = 0
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

        Matched blocks in the host tier get a device block each and a move. A partial match is copied.
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
        host_pins = [] if self.host is None else [b for b in guarded if b.tier]
        if host_pins:
            self.host.share(host_pins)  # type: ignore[union-attr]
        device.share(protected)
        taken = self.device.take(need, contiguous=True, origin=origin)
        if taken is None:
            raise InvariantBroken(f"{need} blocks were promised to sequence {table.seq_id} and are not there")
        loads, rest = taken[: len(low)], taken[len(low) :]
        blocks = hits
        if low:
            incoming = iter(loads)
            blocks = [self._load(b, next(incoming), now) if b.tier else b for b in hits]
            self.events.record(
                ev.BLOCKS_LOADED,
                table.seq_id,
                [b.index for b in loads],
                [b.key or 0 for b in low],
                medium="host",
            )
        if match.partial is not None:
            self.moves.append(Move(match.partial.tier, match.partial.index, DEVICE, rest[0].index))
            self.events.record(ev.BLOCKS_COPIED, table.seq_id, (match.partial.index, rest[0].index))
            (self.host if match.partial.tier else self.device).drop([match.partial], now)  # type: ignore[union-attr]
        if host_pins:
            self.host.drop([b for b in host_pins if b is not match.partial], now)  # type: ignore[union-attr]

        table.blocks = [*blocks, *rest]
        table.indices = [b.index for b in table.blocks]
        table.num_tokens = match.num_tokens
        table.num_published = num_hits
        table.version += 1
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
        self.hit_tokens += match.num_tokens
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
            self.host.eviction.hit_all([b for b in found if b.tier])
        self.device.eviction.hit_all(here)
        if self._prefetched:
            for block in here:
                if block in self._prefetched:
                    self._prefetched.discard(block)
                    self._on_prefetch_fate(block, "useful")
        if type(self.device.eviction).miss is Eviction.miss:  # it does not care
            return
        prefix = table.prefix
        num_full = len(prefix) // self.block_size
        miss = self.device.eviction.miss
        keys = prefix.keys(num_full)
        num_whole = len(found)
        for i in range(num_whole, num_full):
            miss(keys[i], readmitted)

    def _load(self, source: Block, target: Block, now: int) -> Block:
        """Make ``target`` (taken, in use) the device copy of a pinned host block."""
        self.moves.append(Move(HOST, source.index, DEVICE, target.index))
        if source.key is None:
            # While room was made, an evicted orphan took its place in the index: usable, but not findable any more.
            return target
        target.stand_for(source, self.device.births(1), now)
        published = self.lookup.publish(target)
        target.serial = source.serial
        if not published.indexed:
            target.key = None
            return target
        if published.displaced is not None:
            self._displace(published.displaced)
        self.device.store((target,))
        return target

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
        before = self._within(table)
        if copy:
            new, old = taken.pop(), blocks[at]
            self.moves.append(Move(DEVICE, old.index, DEVICE, new.index))
            self.device.drop([old], self.events.time)
            blocks[at] = new
            table.indices[at] = new.index
            table.version += 1
            self.events.record(ev.BLOCKS_COPIED, table.seq_id, (old.index, new.index))
        if taken:
            blocks += taken
            table.indices += [b.index for b in taken]
            self.events.record(ev.BLOCKS_ALLOCATED, table.seq_id, [b.index for b in taken])
        self._promised += self._within(table) - before
        return True

    def fork(self, parent: BlockTable, child: BlockTable) -> None:
        """Let ``child`` (empty) hold the same blocks as ``parent``, as far as they are filled. Never fails."""
        size = self.block_size
        held = -(-parent.num_tokens // size)
        for i, block in enumerate(parent.blocks[:held]):
            if block.ref_count == 1:
                block.fill = min(size, parent.num_tokens - i * size)
        self.device.share(parent.blocks[:held])
        child.blocks = parent.blocks[:held]
        child.indices = parent.indices[:held]
        child.num_tokens = parent.num_tokens
        child.num_published = parent.num_published
        child.parent, child.parent_key = parent.parent, parent.parent_key
        child.version += 1
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

    def _publish(self, table: BlockTable, full: int) -> None:
        first, prefix = table.num_published, table.prefix
        keys = prefix.keys(full)[first:full]
        origin, now, device = table.origin, self.events.time, self.device
        blocks = table.blocks[first:full]
        parent_key = first_parent = table.parent_key
        born = device.births(full - first)
        contents = prefix.contents(full)[first:full]
        for block, key, content, depth in zip(blocks, keys, contents, self._depths(first, full)):
            block.parent_key = parent_key
            block.key = parent_key = key
            block.content = content
            block.origin = origin
            block.depth = depth
            block.born = born
            block.created = now
            block.hits = 0
            born += 1
        special = self.lookup.publish_chain(blocks, table.parent)
        table.num_published = full
        table.parent, table.parent_key = blocks[-1].serial, parent_key
        stored, done = blocks, 0
        if special:
            for i, answer in special:
                # What makes way may be one of these very blocks, so all before it are in first.
                device.store(blocks[done:i])
                if answer.displaced is not None:
                    self._displace(answer.displaced)
                done = i
                if not answer.indexed:
                    blocks[i].key, done = None, i + 1
            stored = [b for b in blocks if b.key is not None]
        device.store(blocks[done:] if done else blocks)
        if self._await_any or (self._awaited and not self._awaited.isdisjoint(keys)):
            self.better_match = True
        if stored and self.events.enabled:
            self.events.record(
                ev.BLOCK_STORED,
                table.seq_id,
                [b.index for b in stored],
                [b.key for b in stored],  # type: ignore[misc]
                first_parent,
                token_ids=[b.content for b in stored],
            )

    def _depths(self, first: int, full: int) -> list[int]:
        """Return the tokens before each of the blocks ``first`` to ``full`` of any sequence."""
        if full > len(self._starts):
            size = self.block_size
            self._starts += range(len(self._starts) * size, 2 * full * size, size)
        return self._starts[first:full]

    def _displace(self, orphan: Block) -> None:
        """A block whose parent is gone makes way for its recomputed copy."""
        self._record_removed([orphan], TIER_NAMES[orphan.tier], "orphan")
        self._prefetched.discard(orphan)
        pool = self.host if orphan.tier else self.device
        pool.blank(orphan)  # type: ignore[union-attr]

    # ---- giving up ---------------------------------------------------------------------------------------------

    def release(self, table: BlockTable, *, returns: bool = False) -> None:
        """Let go of everything that the table holds, tail first; published blocks stay cached.

        ``returns``: the sequence will be back for them.
        """
        if returns and self._shares:
            known = table.blocks[: table.num_published]
            keys = [b.key for b in known]
            self.lookup.expect(table.prefix, known[: keys.index(None)] if None in keys else known)
        if table.host_blocks:
            self.host.drop(table.host_blocks[::-1], self.events.time)  # type: ignore[union-attr]
            table.host_blocks = []
        if table.blocks:
            self._tokens -= table.num_tokens
            self._promised -= self._within(table)
            self.device.drop(table.blocks[::-1], self.events.time)
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
        table.blocks, table.indices = [], []
        table.host_blocks = targets
        table.version += 1
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
        table.blocks, table.indices = taken, [b.index for b in taken]
        self.events.record(ev.BLOCKS_ALLOCATED, table.seq_id, list(table.indices))
        self.events.record(
            ev.BLOCKS_LOADED, table.seq_id, table.indices[:used], medium="host", detail="resumed"
        )
        self.host.drop(table.host_blocks[::-1], self.events.time)  # type: ignore[union-attr]
        table.host_blocks = []
        table.version += 1
        self._tokens += table.num_tokens
        self._promised += self._within(table)
        return True

    def prefetch(self, block: Block) -> bool:
        """Bring a cached host block up into a free device block; False if none is free or it is there already."""
        if self.host is None or block.tier != HOST or block.key is None or not self.device.num_free:
            return False
        if self.lookup.copy_in(block, DEVICE) is not None:
            return False
        taken = self.device.take(1)
        if taken is None:
            return False
        now = self.events.time
        self._load(block, taken[0], now)
        if taken[0].key is not None:
            self._prefetched.add(taken[0])
            self.events.record(
                ev.BLOCKS_PREFETCHED, blocks=(taken[0].index,), keys=(block.key,), medium="host"
            )
        self.device.drop(taken, now)
        return True

    def distrust(self, table: BlockTable) -> None:
        """Forget every prefix that the table's blocks stand for, in every tier: their content may be wrong."""
        for block in table.blocks:
            if block.key is None:
                continue
            copies = [block] if self.host is None else [block, self.lookup.copy_in(block, HOST)]
            for copy in copies:
                if copy is not None:
                    self.lookup.forget(copy)
                    self._record_removed([copy], TIER_NAMES[copy.tier], "distrusted")
                    (self.host if copy.tier else self.device).blank(copy)  # type: ignore[union-attr]

    def clear(self) -> None:
        """Forget every cached prefix in every tier. Running sequences keep their blocks, which nobody else finds."""
        for pool in self.pools:
            for block in pool.blocks:
                if block.key is not None:
                    self.lookup.forget(block)
                    pool.blank(block)
        self._prefetched.clear()
        self.events.record(ev.ALL_BLOCKS_CLEARED)

    # ---- evicting ----------------------------------------------------------------------------------------------

    def _device_evicted(self, blocks: list[Block]) -> None:
        if self._prefetched or self.host is not None:
            for block in blocks:
                if block in self._prefetched:
                    self._prefetched.discard(block)
                    self._on_prefetch_fate(block, "useless")
                if self.host is not None and self.swap.store(block):
                    self._keep_on_host(block)
                self.lookup.forget(block)
        else:
            self.lookup.forget_all(blocks)
        if self.events.enabled:
            self._record_removed(blocks)

    def _record_removed(self, blocks: list[Block], medium: str = "device", detail: str = "") -> None:
        if not self.events.enabled:
            return
        self.events.record(
            ev.BLOCK_REMOVED,
            -1,
            [b.index for b in blocks],
            [b.key for b in blocks],  # type: ignore[misc]
            None,
            medium,
            detail,
        )

    def _keep_on_host(self, block: Block) -> None:
        """Copy a victim's content to the host tier, unless it is there."""
        host, lookup = self.host, self.lookup
        assert host is not None
        if lookup.copy_in(block, HOST) is not None:
            return
        taken = host.take(1, origin=block.origin)
        if taken is None:
            return
        copy, now = taken[0], self.events.time
        copy.stand_for(block, host.births(1), now)
        published = lookup.publish(copy)
        if published.displaced is not None:
            self._displace(published.displaced)
        copy.serial = block.serial
        if published.indexed:
            self.moves.append(Move(DEVICE, block.index, HOST, copy.index))
            host.store((copy,))
            self.events.record(
                ev.BLOCK_STORED, -1, (copy.index,), (block.key or 0,), block.parent_key, medium="host"
            )
        else:
            copy.key = None
        host.drop(taken, now)

    def _host_evicted(self, blocks: list[Block]) -> None:
        self.lookup.forget_all(blocks)
        self._record_removed(blocks, "host")

    # ---- accounting --------------------------------------------------------------------------------------------

    def _within(self, table: BlockTable) -> int:
        """Token slots of the table that its sequence can come to fill."""
        return min(len(table.blocks) * self.block_size, table.final_len)

    def memory(self, behind: int = 0) -> Memory:
        """Return where the device tier's token slots are now, ``behind`` tokens more than tables count. O(1)."""
        size, pool = self.block_size, self.device
        held = pool.num_in_use * size
        tokens = self._tokens + behind
        stored = tokens - pool.saved_tokens
        reserved = max(0, min(self._promised - tokens, held - stored))
        free = pool.num_free * size
        external = free if self.scattered else 0
        return Memory(
            stored,
            reserved,
            held - stored - reserved,
            external,
            pool.num_cached * size,
            free - external,
            pool.saved_tokens,
        )

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Raise `InvariantBroken` unless law 1 holds for ``tables``, which must be all that hold blocks. O(pool)."""
        check_invariants(self, list(tables))
