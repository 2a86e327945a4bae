"""What a sequence has computed becomes findable: blocks are told what they hold, and the lookup hears of them.

The cache's part that deals in stretches; `pagedlab.cache.kv_cache` deals in tables, `pagedlab.cache.tiers` in copies.
"""

from __future__ import annotations

from collections.abc import Collection

from pagedlab import events as ev
from pagedlab.cache.pool import BlockPool
from pagedlab.cache.table import BlockTable
from pagedlab.cache.tiers import Tiers
from pagedlab.policies.block import Block, Stretch
from pagedlab.policies.lookup import Published

_LONGEST = 64
"""Blocks in a stretch at most: while one of them is cached, what all of them hold is remembered."""


class Publishing(Tiers):
    """Stores what tables have computed on the device."""

    block_size: int
    device: BlockPool
    better_match: bool
    _starts: list[int]
    _awaited: set[int]
    _await_any: bool

    def _publish(self, table: BlockTable, full: int) -> None:
        first, first_parent = table.num_published, table.parent_key
        blocks = table.blocks[first:full]
        born = self.device.next_store()
        room = _LONGEST if table.stretch is None else _LONGEST - len(table.stretch.keys) % _LONGEST
        special: list[tuple[int, Published]] = []
        if full - first <= room:
            special += self._identify(table, blocks, first, born)
        else:
            for start in (0, *range(room, len(blocks), _LONGEST)):
                some = blocks[start : start + (_LONGEST if start else room)]
                answers = self._identify(table, some, first + start, born)
                special += [(start + i, answer) for i, answer in answers]
        table.num_published = full
        stored, done = blocks, 0
        if special:
            for i, answer in special:
                # What makes way may be one of these very blocks, so all before it are in first.
                self.device.store(blocks[done:i])
                if answer.displaced is not None:
                    self._displace(answer.displaced)
                done = i
                if not answer.indexed:
                    blocks[i].blank()
                    done = i + 1
            stored = [b for b in blocks if b.key is not None]
        self.device.store(blocks[done:] if done else blocks)
        if self._eager:
            for block in stored:
                self._offer(block)
        if self._await_any:
            self.better_match = True
        if stored and self.events.enabled:
            named = table.prefix.named(first, full)
            self.events.record(
                ev.BLOCK_STORED,
                table.seq_id,
                [b.index for b in stored],
                named[0] if stored is blocks else [b.key for b in stored],  # type: ignore[misc]
                first_parent,
                token_ids=named[1] if stored is blocks else [b.content for b in stored],
            )

    def _identify(
        self, table: BlockTable, blocks: list[Block], first: int, born: int
    ) -> Collection[tuple[int, Published]]:
        """Say what ``blocks``, the next of the table and few enough for one stretch, hold, and have them found."""
        size, now = self.block_size, self.events.time
        last = first + len(blocks)
        keys, contents = table.prefix.named(first, last)
        stretch = table.stretch
        held = 0 if stretch is None else len(stretch.keys)
        # Not aligned: a lookup has failed at what was taken in last.
        if stretch is None or held == _LONGEST or stretch.depth + held * size != first * size:
            stretch = table.stretch = Stretch(
                keys, contents, table.parent, table.parent_key, first * size, size, table.origin, ()
            )
        else:
            stretch.grow(keys, contents)
        for block, key, depth in zip(blocks, keys, self._depths(first, last)):
            block.key = key
            block.stretch = stretch
            block.depth = depth
            block.born = born
            block.created = now
            block.hits = 0
        answers = self.lookup.publish_chain(blocks)
        table.parent, table.parent_key = stretch.serials[-1], keys[-1]  # type: ignore[index]
        if self._awaited and not self._awaited.isdisjoint(keys):
            self.better_match = True
        return answers

    def _depths(self, first: int, full: int) -> list[int]:
        """Return the tokens before each of the blocks ``first`` to ``full`` of any sequence."""
        if full > len(self._starts):
            size = self.block_size
            self._starts += range(len(self._starts) * size, 2 * full * size, size)
        return self._starts[first:full]
