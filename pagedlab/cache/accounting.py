"""Where the memory is, and whether the books add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pagedlab.cache.table import BlockTable
from pagedlab.errors import InvariantBroken
from pagedlab.policies.block import Block

if TYPE_CHECKING:
    from pagedlab.cache.kv_cache import KVCache


class Memory(NamedTuple):
    """Where the device tier's token slots are; the first six add up to the whole pool.

    The kinds are those of Kwon et al. (SOSP 2023), figure 2, counted over sequences that hold blocks.
    """

    stored: int
    """Slots that hold a computed token of a running sequence; shared ones counted once."""
    reserved: int
    """Held by running sequences for tokens that they may still produce."""
    internal: int
    """Held by running sequences and beyond anything that they can produce."""
    external: int
    """Free, and useless to the head of the queue because no run of them is long enough."""
    cached: int
    """In blocks that nobody uses and that a prefix can still find."""
    free: int
    """Free."""
    saved: int
    """Slots that sharing has saved: what would be stored besides if nobody shared."""


def check_invariants(cache: KVCache, tables: list[BlockTable]) -> None:
    """Raise `InvariantBroken` unless every count of ``cache`` equals what ``tables`` and blocks say. O(pool)."""
    for pool in cache.pools:
        pool.check()
        held: dict[Block, int] = {}
        for table in tables:
            for block in table.host_blocks if pool.tier else table.blocks:
                held[block] = held.get(block, 0) + 1
        for block in pool.blocks:
            if block.ref_count != held.get(block, 0):
                raise InvariantBroken(
                    f"{block!r}: count {block.ref_count}, held by {held.get(block, 0)} tables"
                )
    for table in tables:
        if table.blocks and table.num_tokens > len(table.blocks) * cache.block_size:
            raise InvariantBroken(
                f"sequence {table.seq_id}: {table.num_tokens} tokens in {len(table.blocks)} blocks"
            )
        if table.indices != [b.index for b in table.blocks]:
            raise InvariantBroken(f"sequence {table.seq_id}: table and indices differ")
    memory = cache.memory()
    stored = sum(t.num_tokens for t in tables if t.blocks) - cache.device.saved_tokens
    if memory.stored != stored:
        raise InvariantBroken(f"{stored} tokens are stored, {memory.stored} counted")
    if sum(memory[:6]) != cache.device.capacity * cache.block_size or min(memory) < 0:
        raise InvariantBroken(f"memory does not add up: {memory}")
