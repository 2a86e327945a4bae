"""The tiers below the device: what goes down to them, and what in them is no longer believed.

The cache's half that deals in copies; the other half (`pagedlab.cache.kv_cache`) deals in tables. A copy goes down one
tier at a time and comes up at once, and copies of one content have one serial, whichever tier they lie in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from pagedlab import events as ev
from pagedlab.cache.moves import Move
from pagedlab.cache.pool import BlockPool
from pagedlab.cache.prefetched import Children, Prefetched
from pagedlab.cache.table import BlockTable
from pagedlab.events import EventLog
from pagedlab.policies.allocator import FreeList
from pagedlab.policies.block import TIER_NAMES, Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.lookup import Lookup
from pagedlab.policies.swap import Swap
from pagedlab.policies.view import View
from pagedlab.registry import make


class Tiers:
    """Pools of every tier, device first, and the copies that go between them."""

    lookup: Lookup
    swap: Swap
    events: EventLog
    moves: deque[Move]
    pools: list[BlockPool]
    _eager: bool
    prefetched: Prefetched
    _children: Children | None

    def _add_pools(self, sizes: Iterable[int], block_size: int, view: View) -> None:
        """Put pools of ``sizes`` blocks below the device, down to the first that is 0."""
        for tier, num_blocks in enumerate(sizes, 1):
            if not num_blocks:
                break
            eviction = make("eviction", self.swap.tier_eviction(tier))
            assert isinstance(eviction, Eviction)
            pool = BlockPool(
                num_blocks,
                FreeList(),
                eviction,
                self._lower_evicted,
                tier=tier,
                block_size=block_size,
                view=view,
            )
            self.pools.append(pool)
        self.swap.reset(capacities=[pool.capacity for pool in self.pools])
        self._eager = len(self.pools) > 1 and self.swap.eager

    def _below(self, blocks: list[Block]) -> Iterator[tuple[BlockPool, list[Block]]]:
        """Yield each lower tier that has some of ``blocks``, with those."""
        for pool in self.pools[1:]:
            here = [b for b in blocks if b.tier == pool.tier]
            if here:
                yield pool, here

    # ---- going down --------------------------------------------------------------------------------------------

    def _offer(self, block: Block) -> None:
        """Copy a block to the tier below its own, if there is one, if it is not there, and if the policy wants it."""
        tier = block.tier + 1
        if tier == len(self.pools) or self.lookup.copy_in(block, tier) is not None:
            return
        if self.swap.store(block, tier):
            self._keep(block, tier)

    def _keep(self, block: Block, tier: int) -> None:
        pool = self.pools[tier]
        taken = pool.take(1, origin=block.origin)
        if taken is None:
            return
        copy, now = taken[0], self.events.time
        copy.stand_for(block, pool.next_store(), now)
        published = self.lookup.publish(copy)
        if published.displaced is not None:
            self._displace(published.displaced)
        if published.indexed:
            self.moves.append(Move(block.tier, block.index, tier, copy.index))
            pool.store((copy,))
            if self._children is not None:
                self._children.add(copy)
            self.events.record(
                ev.BLOCK_STORED,
                -1,
                (copy.index,),
                (block.key or 0,),
                block.parent_key,
                medium=TIER_NAMES[tier],
            )
            if self._eager:
                self._offer(copy)
        else:
            copy.blank()
        pool.drop(taken, now)

    def _lower_evicted(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._offer(block)
        self.lookup.forget_all(blocks)
        self._record_removed(blocks, TIER_NAMES[blocks[0].tier])

    # ---- doubts ------------------------------------------------------------------------------------------------

    def distrust(self, table: BlockTable) -> None:
        """Forget every prefix that the table's blocks stand for, in every tier: their content may be wrong."""
        for block in table.blocks:
            if block.key is None:
                continue
            copies = [block, *(self.lookup.copy_in(block, pool.tier) for pool in self.pools[1:])]
            for copy in copies:
                if copy is not None:
                    self._forget(copy, "distrusted")

    def spoiled(self, places: Iterable[tuple[int, int]]) -> set[Block]:
        """Moves to these places (tier, block) failed: nobody finds what should lie there. Return the blocks."""
        blocks = [self.pools[tier].blocks[index] for tier, index in sorted(places)]
        for block in blocks:
            if block.key is not None:
                self._forget(block, "spoiled")
        return set(blocks)

    def _forget(self, block: Block, why: str) -> None:
        self.lookup.forget(block)
        self._record_removed([block], TIER_NAMES[block.tier], why)
        self.prefetched.end((block,), "useless")
        self.pools[block.tier].blank(block)

    def _displace(self, orphan: Block) -> None:
        """A block whose parent is gone makes way for its recomputed copy."""
        self._record_removed([orphan], TIER_NAMES[orphan.tier], "orphan")
        self.prefetched.end((orphan,), "useless")
        self.pools[orphan.tier].blank(orphan)

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
