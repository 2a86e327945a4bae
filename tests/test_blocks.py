"""What blocks have in common, and what policies note on them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import pytest
from test_gaps import cache_with

from pagedlab.cache.kv_cache import KVCache
from pagedlab.cache.table import BlockTable
from pagedlab.policies import LRU, Block, ChainedHash, Lookup, Recorded
from pagedlab.policies.block import FIELDS, GONE, HOST, NOBODY, NOWHERE, Origin, Stretch
from pagedlab.policies.lookup import NO_MATCH, Prefix, Published
from pagedlab.policies.wrappers import _REST
from pagedlab.registry import make


def table_of(cache: KVCache, tokens: list[int], *, origin: Origin | None = None) -> BlockTable:
    """Return a table whose tokens are all computed."""
    prefix = Prefix(tokens, cache.block_size)
    table = BlockTable(tokens[0], prefix, len(tokens) + 8, origin=origin)
    assert cache.admit(table, NO_MATCH, len(tokens))
    cache.commit(table, len(tokens))
    return table


@pytest.mark.parametrize("lookup", ["chained-hash", "radix"])
@pytest.mark.parametrize("blocks", [1, 63, 64, 65, 128, 200])
def test_a_chain_is_stored_in_stretches(lookup: str, blocks: int) -> None:
    """Whatever is derived from a stretch is what a block of its own would say."""
    cache = cache_with(num_blocks=blocks + 1, block_size=2, lookup=make("lookup", lookup))
    cache.events.time = 7
    origin = Origin(session="s", request_class="c")
    table = table_of(cache, list(range(2 * blocks + 1)), origin=origin)
    full = table.blocks[:blocks]
    parent, parent_key, serials = (None,), None, set()
    for i, block in enumerate(full):
        assert block.content == (2 * i, 2 * i + 1)
        assert (block.depth, block.born, block.created, block.hits) == (2 * i, 1, 7, 0)
        assert (block.parent, block.parent_key) == (parent, parent_key)
        assert (block.session, block.request_class, block.salt) == ("s", "c", None)
        assert block.stretch.keys[block.at] == block.key
        parent, parent_key = block.serial, block.key
        serials.add(block.serial)
    assert len(serials) == blocks
    assert (table.parent, table.parent_key) == (parent, parent_key)
    sizes = [sum(b.stretch is s for b in full) for s in {id(b.stretch): b.stretch for b in full}.values()]
    assert sum(sizes) == blocks
    assert max(sizes) == min(64, blocks), "what is cached alone keeps little else alive"
    assert cache.match(Prefix(list(range(2 * blocks)), 2), 2 * blocks).blocks == full
    cache.check([table])


@pytest.mark.parametrize("lookup", ["chained-hash", "radix"])
def test_a_sequence_that_decodes_fills_its_stretch(lookup: str) -> None:
    """Blocks of several steps share a stretch; when each was stored, it knows itself."""
    tokens = list(range(150))
    cache = cache_with(num_blocks=160, lookup=make("lookup", lookup))
    table = BlockTable(0, Prefix(tokens, 1), len(tokens))
    assert cache.admit(table, NO_MATCH, len(tokens))
    done = 0
    for step, n in enumerate((3, 1, 1, 70, 1, 74)):
        cache.events.time = 10 * step
        cache.commit(table, n)
        for block in table.blocks[done : done + n]:
            assert (block.born, block.created) == (step + 1, 10 * step)
        done += n
    stretches = {id(b.stretch): b.stretch for b in table.blocks}.values()
    assert [len(s.keys) for s in stretches] == [64, 64, 22]
    assert [b.content for b in table.blocks] == [(t,) for t in tokens]
    assert [b.parent for b in table.blocks] == [(None,), *(b.serial for b in table.blocks[:-1])]
    assert [b.parent_key for b in table.blocks] == [None, *(b.key for b in table.blocks[:-1])]
    assert cache.match(Prefix(tokens, 1), 150).blocks == table.blocks
    cache.check([table])
    cache.release(table)
    assert table.stretch is None
    again = BlockTable(1, Prefix(tokens[:5], 1), 9)
    assert cache.admit(again, cache.match(again.prefix, 4), 5)
    cache.commit(again, 1)
    assert again.blocks[4].stretch is not again.blocks[3].stretch, (
        "who found a beginning does not write into it"
    )


def test_a_lookup_that_fails_leaves_no_gap_in_the_chain() -> None:
    class Fails(ChainedHash):
        fails = False

        def publish_chain(self, blocks: Sequence[Block]) -> Sequence[tuple[int, Published]]:
            if self.fails:
                raise RuntimeError("no")
            return super().publish_chain(blocks)

    lookup = Fails()
    cache = cache_with(num_blocks=8, lookup=lookup)
    tokens = [1, 2, 3, 4, 5]
    table = BlockTable(0, Prefix(tokens, 1), 5)
    assert cache.admit(table, NO_MATCH, 5)
    cache.commit(table, 2)
    lookup.fails = True
    with pytest.raises(RuntimeError):
        cache.commit(table, 1)
    lookup.fails = False
    cache.commit(table, 2)
    assert [b.content for b in table.blocks] == [(t,) for t in tokens]
    assert [b.parent for b in table.blocks] == [(None,), *(b.serial for b in table.blocks[:-1])]
    assert cache.match(Prefix(tokens, 1), 5).blocks == table.blocks


def test_a_block_that_is_given_up_holds_nothing() -> None:
    cache = cache_with(num_blocks=2)
    table = table_of(cache, [1, 2])
    first, second = table.blocks
    serial = second.serial
    cache.release(table)
    assert (second.serial, second.parent) == (serial, first.serial)
    other = BlockTable(9, Prefix([9], 1), 1)
    assert cache.admit(other, NO_MATCH, 1)
    gone = other.blocks[0]
    assert gone is second
    assert gone.stretch is NOWHERE
    assert (gone.key, gone.serial, gone.content, gone.parent, gone.parent_key) == (
        None,
        GONE,
        None,
        None,
        None,
    )
    assert gone.origin is NOBODY


def test_copies_in_two_tiers_are_one_content() -> None:
    cache = cache_with(
        num_blocks=2, host_blocks=4, swap=make("swap", "disk", admission="write-through"), block_size=1
    )
    cache.events.time = 5
    table = table_of(cache, [1, 2])
    assert cache.host is not None
    copies = [b for b in cache.host.blocks if b.key is not None]
    assert {b.serial for b in copies} == {b.serial for b in table.blocks}
    for copied in copies:
        original = next(b for b in table.blocks if b.serial == copied.serial)
        assert copied.tier == HOST
        for name in ("key", "parent", "parent_key", "content", "depth", "origin", "hits"):
            assert getattr(copied, name) == getattr(original, name), name
        copied.created = 99
        assert original.created == 5, "what is changed in one tier stays there"


@pytest.mark.parametrize("name", ["chained-hash", "radix"])
def test_blocks_described_one_by_one_make_a_chain(name: str) -> None:
    """Whoever tries a lookup by hand need not know of stretches."""
    lookup = make("lookup", name)
    assert isinstance(lookup, Lookup)
    lookup.reset(block_size=2, num_tiers=1)
    prefix = Prefix([1, 2, 3, 4, 5, 6], 2)
    keys, contents = prefix.named(0, 3)
    blocks = [Block(i, size=2) for i in range(3)]
    for i, block in enumerate(blocks):
        block.key, block.content, block.depth, block.parent = keys[i], contents[i], 2 * i, (None,)
    assert list(lookup.publish_chain(blocks)) == []
    assert [b.parent for b in blocks] == [(None,), blocks[0].serial, blocks[1].serial]
    assert len({b.serial for b in blocks}) == 3
    assert lookup.match(prefix, 6).blocks == blocks
    again = [Block(3 + i, size=2) for i in range(2)]
    for i, block in enumerate(again):
        block.key, block.content, block.depth, block.parent = keys[i], contents[i], 2 * i, (None,)
    answers = dict(lookup.publish_chain(again))
    assert [answers[i].indexed for i in range(2)] == [False, False]
    assert [b.serial for b in again] == [b.serial for b in blocks[:2]]


def test_what_is_not_named_yet_is_not_known() -> None:
    """As a recording sees it, which looks at blocks before the lookup has."""
    cache = cache_with(num_blocks=8, lookup=Recorded(ChainedHash()))
    table = table_of(cache, [1, 2, 3])
    lookup = cache.lookup
    assert isinstance(lookup, Recorded)
    (asked,) = [call for call in lookup.book if call.method == "publish_chain"]
    assert [dict(zip(_REST, seen.state))["parent"] for seen in asked.args[0]] == [(None,), GONE, GONE]
    assert [b.parent for b in table.blocks] == [(None,), table.blocks[0].serial, table.blocks[1].serial]


def test_who_sets_a_part_gets_a_stretch_of_its_own() -> None:
    stretch = Stretch([5, 6, 7], ["a", "b", "c"], 3, 4, 8, 4, Origin(salt="t"), [30, 31, 32])
    blocks = [Block(i, size=4) for i in range(3)]
    for i, block in enumerate(blocks):
        block.key, block.stretch, block.depth = 5 + i, stretch, 8 + 4 * i
    before = [{name: getattr(b, name) for name in FIELDS} for b in blocks]
    assert [b["serial"] for b in before] == [30, 31, 32]
    assert [b["parent"] for b in before] == [3, 30, 31]
    assert [b["parent_key"] for b in before] == [4, 5, 6]
    for name, value in {
        "serial": 99,
        "parent": 98,
        "parent_key": 97,
        "content": "z",
        "origin": NOBODY,
    }.items():
        block = Block(1, size=4)
        block.key, block.stretch, block.depth = 6, stretch, 12
        setattr(block, name, value)
        assert {n: getattr(block, n) for n in FIELDS} == before[1] | {name: value}
    assert [{name: getattr(b, name) for name in FIELDS} for b in blocks] == before
    fresh, other = Block(0), Block(1)
    fresh.content = "x"
    assert (other.content, NOWHERE.contents) == (None, None)


def test_nowhere_is_one_place() -> None:
    assert pickle.loads(pickle.dumps(NOWHERE)) is NOWHERE
    assert copy.deepcopy(NOWHERE) is NOWHERE
    assert pickle.loads(pickle.dumps([Block(0)]))[0].stretch is NOWHERE


@pytest.mark.parametrize("contiguous", ["fifo", "first-fit"])
def test_room_for_several_that_grow_is_made_at_once_and_exactly(contiguous: str) -> None:
    cache = cache_with(num_blocks=6, allocator=make("allocator", contiguous))
    growing = [table_of(cache, [1]), table_of(cache, [2])]
    cached = [table_of(cache, [token]) for token in (3, 4, 5, 6)]
    for table in cached[:3]:
        cache.release(table)
    pool = cache.device
    cache.prepare_growth(growing[:1])
    assert (pool.num_free, pool.num_cached) == (0, 3), "one alone is served when it asks"
    roomy = BlockTable(7, Prefix([7], 1), 1)
    cache.prepare_growth([*growing, roomy])
    assert (pool.num_free, pool.num_cached) == (3, 0), "an empty table is full"
    for table in growing:
        assert cache.grow(table, 2)
    assert (pool.num_free, pool.num_cached) == (1, 0)
    cache.release(cached[3])
    cache.commit(growing[0], 1)
    cache.commit(growing[1], 1)
    third = BlockTable(8, Prefix([8], 1), 1)
    cache.prepare_growth([*growing, roomy])
    assert (pool.num_free, pool.num_cached) == (1, 1), "there is not enough for all: nothing is given up"
    cache.prepare_growth([growing[0], third])
    assert (pool.num_free, pool.num_cached) == (1, 1), (
        "one is free, and one is short: evicted when it is taken"
    )
    cache.check([*growing])


def released(policy: LRU, *blocks: Block) -> None:
    for block in blocks:
        policy.release(block)


def test_an_lru_list_stays_within_bounds() -> None:
    """Hits leave entries behind that do not count; a cache that is never short clears them out too."""
    policy, capacity = LRU(), 50
    policy.reset(capacity=capacity)
    blocks = [Block(i) for i in range(capacity)]
    for step in range(200):
        some = [blocks[(7 * step + 3 * i) % capacity] for i in range(13)]
        policy.hit_all(some)
        policy.release_all(some)
        policy.hit(blocks[step % capacity])
        policy.release(blocks[step % capacity])
        assert len(policy._blocks) == len(policy._marks) <= 3 * capacity + 200
        assert len(list(policy.order())) == len(set(policy.order())) <= capacity


def test_two_lists_can_hold_blocks_in_turn() -> None:
    """As a policy of segments made of two of them does."""
    low, high = LRU(), LRU()
    low.reset(capacity=4)
    high.reset(capacity=4)
    a, b, c = (Block(i) for i in range(3))
    released(low, a, b, c)
    low.remove(b)
    released(high, b)
    assert list(low.order()) == [a, c]
    assert high.victims(1) == [b]
    assert low.victims(2) == [a, c]
    assert low.victims(3) == []
    high.remove(b)
    released(low, b)
    assert high.evict() is None
    assert [low.evict() for _ in range(4)] == [a, c, b, None]


def test_what_was_named_may_be_used_before_it_is_gone() -> None:
    policy = LRU()
    policy.reset(capacity=4)
    a, b, c = (Block(i) for i in range(3))
    released(policy, a, b, c)
    named = policy.victims(2)
    assert named == [a, b]
    named.clear()
    assert policy.victims(2) == [a, b]
    policy.hit(a)
    assert policy.victims(2) == [b, c]
    policy.remove_all([b])
    released(policy, a)
    assert policy.victims(2) == [c, a]
    policy.remove_all([c, a])
    assert policy.victims(1) == []
