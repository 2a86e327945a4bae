"""What mutation testing found that nobody said: each test fails for a small change that all others accept."""

from __future__ import annotations

from typing import Any

import pytest
from test_cache_machine import CacheMachine, Held, small_machine

from pagedlab import events as ev
from pagedlab.cache.kv_cache import KVCache
from pagedlab.cache.pool import BlockPool
from pagedlab.cache.prefetched import Children, Prefetched
from pagedlab.cache.table import BlockTable
from pagedlab.policies.block import DEVICE, HOST, Block
from pagedlab.policies.lookup import ChainedHash, Match, Prefix
from pagedlab.registry import make


def machine_with(**changes: Any) -> CacheMachine:
    machine = CacheMachine()
    values: dict[str, Any] = {
        "block_size": 2,
        "num_blocks": 8,
        "host_blocks": 8,
        "disk_blocks": 0,
        "null_block": False,
        "allocator": make("allocator", "fifo"),
        "eviction": make("eviction", "lru"),
        "lookup": "chained-hash",
        "host_eviction": make("eviction", "lru"),
        "disk_eviction": make("eviction", "lru"),
        "swap": make("swap", "host"),
        "prompts": [],
    }
    machine.start(**values | changes)
    return machine


def cache_with(num_blocks: int, **changes: Any) -> KVCache:
    values: dict[str, Any] = {
        "block_size": 1,
        "allocator": make("allocator", "fifo"),
        "lookup": make("lookup", "chained-hash"),
        "eviction": make("eviction", "lru"),
        "swap": make("swap", "drop"),
    }
    return KVCache(num_blocks=num_blocks, **values | changes)


def computed(machine: CacheMachine, tokens: list[int], claim: int | None = None) -> Held:
    held = machine.hold(tokens, claim=len(tokens) if claim is None else claim)
    machine.step([(held, len(held.tokens) - held.table.num_tokens)])
    return held


def last(machine: CacheMachine, kind: str) -> Any:
    return [e for e in machine.cache.events if e.kind == kind][-1]


def test_stores_are_numbered_in_their_order() -> None:
    machine = machine_with()
    first = machine.hold([1, 2, 3, 4, 5, 6], claim=6)
    machine.step([(first, 4)])
    machine.step([(first, 2)])
    second = computed(machine, [7, 8])
    born = [b.born for b in (*first.table.blocks, *second.table.blocks)]
    at = born[0]
    assert born == [at, at, at + 1, at + 2]


def test_a_block_knows_what_it_continues() -> None:
    machine = machine_with()
    held = machine.hold([1, 2, 3, 4, 5, 6], claim=6)
    machine.step([(held, 2)])
    machine.step([(held, 4)])
    blocks = held.table.blocks
    assert [b.parent_key for b in blocks] == [None, *(b.key for b in blocks[:-1])]


def test_hits_are_admissions_that_found_the_block() -> None:
    machine = machine_with()
    block = computed(machine, [1, 2, 3]).table.blocks[0]
    for n in range(1, 4):
        machine.let_go(machine.hold([1, 2, 9], claim=3))
        assert block.hits == n


def test_a_loaded_block_was_stored_when_it_came_up() -> None:
    machine = small_machine()
    machine.let_go(computed(machine, [1, 2]))
    machine.let_go(machine.hold([3, 4, 5], claim=3))
    machine.cache.events.time = 77
    again = machine.hold([1, 2, 6], claim=3)
    loaded = again.table.blocks[:2]
    assert again.table.num_tokens == 2
    assert [b.created for b in loaded] == [77, 77]
    assert loaded[1].born == loaded[0].born + 1
    event = last(machine, ev.BLOCKS_LOADED)
    assert (event.seq_id, event.medium, event.detail) == (again.table.seq_id, "host", "")
    assert (list(event.blocks), list(event.keys)) == (
        [b.index for b in loaded],
        [b.key for b in loaded],
    )


def test_a_fork_is_recorded_and_makes_the_childs_table_anew() -> None:
    machine = machine_with()
    parent = computed(machine, [1, 2, 3])
    child = Held(9, parent.tokens, None, 2)
    before = child.table.version
    machine.cache.fork(parent.table, child.table)
    machine.held.append(child)
    assert child.table.version > before
    event = last(machine, ev.SEQUENCE_FORKED)
    assert (event.seq_id, list(event.blocks)) == (9, child.table.indices)
    assert event.detail == f"from {parent.table.seq_id}"
    shared, before = child.table.blocks[1].index, child.table.version
    assert machine.cache.grow(child.table, 3)
    assert child.table.indices[1] == shared, "nothing is to be written, so nothing is copied"
    child.tokens.append(4)
    machine.step([(child, 1)])
    event = last(machine, ev.BLOCKS_COPIED)
    assert (event.seq_id, tuple(event.blocks)) == (9, (shared, child.table.indices[1]))
    assert child.table.version > before, "a copy on write is no growing at the end"
    before = child.table.version
    child.tokens += [5, 6, 7]
    machine.step([(child, 3)])
    event = last(machine, ev.BLOCKS_ALLOCATED)
    assert (event.seq_id, list(event.blocks)) == (9, child.table.indices[2:])
    assert child.table.version == before


def test_swapping_is_recorded() -> None:
    machine = machine_with()
    machine.let_go(computed(machine, [9]))
    held = computed(machine, [1, 2, 3])
    indices = list(held.table.indices)
    assert machine.cache.swap_out(held.table)
    saved, released = last(machine, ev.BLOCKS_SAVED), last(machine, ev.BLOCKS_RELEASED)
    assert (saved.seq_id, saved.medium, saved.detail) == (held.table.seq_id, "host", "preempted")
    assert (released.seq_id, list(released.blocks)) == (held.table.seq_id, indices)
    assert list(saved.blocks) == [b.index for b in held.table.host_blocks]
    assert machine.cache.swap_in(held.table, 5)
    loaded, allocated = last(machine, ev.BLOCKS_LOADED), last(machine, ev.BLOCKS_ALLOCATED)
    assert (loaded.seq_id, loaded.medium, loaded.detail) == (held.table.seq_id, "host", "resumed")
    assert list(loaded.blocks) == held.table.indices[:2]
    assert (allocated.seq_id, list(allocated.blocks)) == (held.table.seq_id, held.table.indices)


def test_what_is_reserved_is_the_sum_over_those_who_run() -> None:
    """Through swapping out and in, with somebody else running."""
    machine = machine_with()
    one, two = computed(machine, [1, 2, 3], claim=6), computed(machine, [4, 5, 6], claim=4)
    want = machine.cache.memory()
    assert want.reserved == (6 - 3) + (4 - 3)
    assert machine.cache.swap_out(two.table)
    assert machine.cache.memory().reserved == 6 - 3
    assert machine.cache.swap_in(two.table, 4)
    assert machine.cache.memory().reserved == want.reserved
    machine.let_go(one)
    assert machine.cache.memory().reserved == 4 - 3


def test_a_released_table_starts_over() -> None:
    machine = machine_with()
    held = computed(machine, [1, 2, 3, 4])
    table, before = held.table, held.table.version
    assert (table.num_published, table.parent_key) == (2, table.blocks[1].key)
    indices = list(table.indices)
    machine.let_go(held)
    released = last(machine, ev.BLOCKS_RELEASED)
    assert (released.seq_id, list(released.blocks)) == (table.seq_id, indices)
    assert (table.num_tokens, table.num_published, table.blocks, table.indices) == (0, 0, [], [])
    assert (table.parent, table.parent_key) == ((None,), None)
    assert table.version > before


def test_a_table_that_was_swapped_out_starts_over_too() -> None:
    machine = machine_with()
    held = computed(machine, [1, 2, 3])
    table = held.table
    assert machine.cache.swap_out(table)
    assert machine.cache.pools[HOST].num_in_use == 2
    machine.let_go(held)
    assert machine.cache.pools[HOST].num_in_use == 0
    assert table.host_blocks == []
    assert machine.cache.admit(table, Match([], 0), 3)
    machine.held.append(held)
    machine.books_balance()


def test_every_new_beginning_of_a_table_has_a_version_of_its_own() -> None:
    machine = machine_with()
    held = computed(machine, [1, 2, 3])
    table, seen = held.table, [held.table.version]
    for _ in range(3):
        machine.cache.release(table)
        assert machine.cache.admit(table, Match([], 0), 3)
        seen.append(table.version)
        machine.step([(held, 3)])
        assert machine.cache.swap_out(table)
        seen.append(table.version)
        assert machine.cache.swap_in(table, 3)
        seen.append(table.version)
    assert seen == sorted(set(seen))


def test_an_admission_records_what_it_found_and_what_it_took() -> None:
    machine = machine_with()
    machine.let_go(computed(machine, [1, 2, 3, 4, 5]))
    taken = [e for e in machine.cache.events if e.kind == ev.BLOCKS_ALLOCATED]
    again = machine.hold([1, 2, 3, 4, 6], claim=5)
    event = last(machine, ev.PREFIX_HIT)
    assert (event.seq_id, list(event.blocks)) == (again.table.seq_id, again.table.indices[:2])
    assert event.detail == "4 tokens"
    event = last(machine, ev.BLOCKS_ALLOCATED)
    assert (event.seq_id, list(event.blocks)) == (again.table.seq_id, again.table.indices[2:])
    machine.hold([1, 2, 3, 4, 7], claim=4)
    allocated = [e for e in machine.cache.events if e.kind == ev.BLOCKS_ALLOCATED]
    assert len(allocated) == len(taken) + 1, "who takes no block is not said to have taken some"


def test_what_is_stored_names_what_it_continues() -> None:
    machine = machine_with()
    held = machine.hold([1, 2, 3, 4, 5, 6], claim=6)
    machine.step([(held, 2)])
    assert last(machine, ev.BLOCK_STORED).parent_key is None
    machine.step([(held, 4)])
    event = last(machine, ev.BLOCK_STORED)
    first, second, third = held.table.blocks
    assert event.parent_key == first.key
    assert list(event.keys) == [second.key, third.key]
    assert list(event.token_ids) == [(3, 4), (5, 6)]


@pytest.mark.parametrize("disk_blocks", [0, 4])
def test_what_is_stored_through_lies_in_every_tier(disk_blocks: int) -> None:
    machine = machine_with(
        swap=make("swap", "disk", admission="write-through"), host_blocks=4, disk_blocks=disk_blocks
    )
    computed(machine, [1, 2, 3])
    assert [pool.num_cached for pool in machine.cache.pools[1:]] == ([1, 1] if disk_blocks else [1])
    media = [e.medium for e in machine.cache.events if e.kind == ev.BLOCK_STORED]
    assert media == (["host", "disk"] if disk_blocks else ["host"]) + ["device"]


def test_what_a_lower_tier_gives_up_is_recorded_as_its_own() -> None:
    machine = machine_with(num_blocks=2, host_blocks=1)
    for tokens in ([1, 2], [3, 4], [5, 6]):
        machine.let_go(computed(machine, tokens, claim=4))
    gone = [(e.medium, e.detail) for e in machine.cache.events if e.kind == ev.BLOCK_REMOVED]
    assert sorted(gone) == [("device", ""), ("device", ""), ("host", "")]


def test_what_is_stored_already_is_not_said_to_be_stored() -> None:
    machine = machine_with()
    one, two = machine.hold([1, 2, 3], claim=3), machine.hold([1, 2, 4], claim=3)
    machine.step([(one, 3), (two, 3)])
    assert [e.seq_id for e in machine.cache.events if e.kind == ev.BLOCK_STORED] == [one.table.seq_id]


def test_a_part_of_a_block_is_copied_on_record() -> None:
    machine = machine_with(lookup="radix", block_size=4)
    source = computed(machine, [1, 2, 3, 4, 5]).table.indices[0]
    held = machine.hold([1, 2, 3, 9], claim=4)
    event = last(machine, ev.BLOCKS_COPIED)
    assert (event.seq_id, tuple(event.blocks)) == (held.table.seq_id, (source, held.table.indices[0]))


def an_orphan() -> tuple[CacheMachine, Held]:
    """Somebody runs whose second block continues what was forgotten; the same two tokens lie in the host tier."""
    machine = machine_with(block_size=1, num_blocks=4)
    old = machine.hold([1, 2], claim=1)
    machine.step([(old, 1)])
    machine.cache.clear()
    machine.let_go(computed(machine, [1, 2]))
    machine.let_go(machine.hold([3], claim=3))
    machine.step([(old, 1)])
    return machine, old


def test_a_load_displaces_an_orphan() -> None:
    machine, old = an_orphan()
    orphan = old.table.blocks[1]
    assert orphan.key is not None
    again = machine.hold([1, 2, 3], claim=2)
    assert again.table.num_tokens == 2
    event = next(e for e in machine.cache.events if e.detail == "orphan")
    assert (event.medium, list(event.blocks)) == ("device", [orphan.index])
    assert orphan.key is None
    machine.books_balance()
    machine.nothing_stands_twice()


def test_a_prefetched_orphan_that_makes_way_was_useless() -> None:
    """It was pushed out and brought up again before its content was computed anew."""
    machine, old = an_orphan()
    valid = [b for b in machine.cache.pools[HOST].blocks if b.key is not None]
    for block in valid:
        machine.cache.spoiled({(HOST, block.index)})
    machine.let_go(old)
    machine.let_go(machine.hold([7], claim=4))
    (orphan,) = (b for b in machine.cache.pools[HOST].blocks if b.key is not None)
    assert machine.cache.prefetch(orphan) is not None
    machine.hold([9], claim=1)
    computed(machine, [1, 2])
    assert machine.fates == {"done": 1, "useless": 1}
    gone = [(e.medium, e.detail) for e in machine.cache.events if e.detail == "orphan"]
    assert ("device", "orphan") in gone


def test_a_prefetch_whose_source_makes_way_is_useless() -> None:
    """Making room for it evicts an orphan to the host tier, where that takes its very place."""
    machine, old = an_orphan()
    machine.hold([8], claim=2)
    machine.let_go(old)
    second = max((b for b in machine.cache.pools[HOST].blocks if b.key is not None), key=lambda b: b.depth)
    machine.hold([9], claim=machine.cache.device.num_free)
    assert machine.cache.device.num_free == 0
    assert machine.cache.prefetch(second, evict=True) is not None
    assert machine.fates == {"done": 1, "useless": 1}
    assert not len(machine.cache.prefetched)
    machine.books_balance()
    machine.content_is_right()


def test_a_prefetch_takes_the_one_block_that_may_go() -> None:
    machine = machine_with(block_size=1, num_blocks=3)
    machine.let_go(computed(machine, [1, 2]))
    for tokens in ([3], [4], [5]):
        machine.let_go(computed(machine, tokens))
    below = [b for b in machine.cache.pools[HOST].blocks if b.key is not None]
    assert below
    device = machine.cache.device.blocks
    oldest, *rest = sorted((b for b in device if b.key is not None), key=lambda b: b.born)
    assert len(rest) == 2
    assert machine.cache.prefetch(below[0], evict=True, protected=device) is None
    keys = [b.key for b in (oldest, *rest)]
    new = machine.cache.prefetch(below[0], evict=True, protected=[oldest, rest[0]])
    assert new is rest[1]
    assert [b.key for b in (oldest, rest[0])] == keys[:2]
    event = last(machine, ev.BLOCKS_PREFETCHED)
    assert (event.medium, list(event.blocks), list(event.keys)) == ("host", [new.index], [new.key])


@pytest.mark.parametrize("spare", [0, 1])
def test_who_comes_back_leaves_what_is_to_be_spared(spare: int) -> None:
    machine = machine_with(num_blocks=4)
    held = computed(machine, [1, 2, 3])
    assert machine.cache.swap_out(held.table)
    machine.hold([9], claim=4)
    assert machine.cache.swap_in(held.table, 3, spare=spare) is (not spare)
    assert machine.cache.device.num_free + machine.cache.device.num_cached == 2 * spare


def test_who_comes_back_takes_nothing_from_a_reserved_share() -> None:
    """Two of tenant b's blocks are kept for it; a has blocks of its own that can go."""
    cache = cache_with(
        num_blocks=4,
        eviction=make("eviction", "quota", shares="a=0.5,b=0.5", reserved=True),
        swap=make("swap", "host"),
        host_blocks=4,
    )

    def admitted(tokens: list[int], salt: str) -> BlockTable:
        table = BlockTable(tokens[0], Prefix(tokens, 1, salt), len(tokens))
        assert cache.admit(table, Match([], 0), len(tokens))
        cache.commit(table, len(tokens))
        return table

    kept = admitted([1, 2], "b")
    cache.release(kept)
    away = admitted([3], "a")
    assert cache.swap_out(away)
    other = admitted([4], "a")
    cache.release(other)
    assert cache.device.num_cached + cache.device.num_free == 4
    assert not cache.admit(BlockTable(5, Prefix([5, 6, 7], 1, "a"), 3), Match([], 0), 3)
    assert cache.swap_in(away, 2)
    found = cache.match(Prefix([1, 2, 0], 1, "b"), 2)
    assert [b.tier for b in found.blocks] == [DEVICE, DEVICE]
    cache.check([away])


def test_children_are_remembered_through_any_number_of_sweeps() -> None:
    """Entries are swept now and then: what is in its place is still known, and what is kept is bounded."""
    blocks = [Block(i, HOST) for i in range(4)]
    children = Children(blocks)
    for n in range(500):
        block = blocks[n % 3]
        block.key, block.parent, block.born = n, n % 2, n
        children.add(block)
        if n >= 3:
            stored = sorted(blocks[:3], key=lambda b: -b.born)
            assert [children.of(serial) for serial in (0, 1)] == [
                [b for b in stored if b.parent == serial] for serial in (0, 1)
            ]
        assert sum(map(len, children._of.values())) <= 2 * len(blocks) + 64
    blocks[0].key = None
    assert blocks[0] not in children.of(0) + children.of(1)


def test_a_new_table_holds_nothing() -> None:
    table = BlockTable(3, Prefix([1, 2], 2, "a"), 8)
    assert (table.num_tokens, table.num_published, table.version) == (0, 0, 0)
    assert (table.blocks, table.indices, table.host_blocks, table.swapped) == ([], [], [], False)
    assert (table.parent, table.parent_key) == (("a",), None)
    assert (table.seq_id, table.final_len, table.origin.salt) == (3, 8, "a")


class Colliding(Prefix):
    """All first blocks have one key, and so on."""

    def keys(self, num_blocks: int) -> list[int]:
        super().keys(num_blocks)
        return list(range(100, 100 + num_blocks))


def test_equal_keys_of_unequal_contents_cost_a_hit_and_mix_nothing() -> None:
    cache = cache_with(
        num_blocks=2,
        swap=make("swap", "host"),
        host_blocks=4,
    )
    host = cache.pools[HOST]

    def pushed_out(token: int) -> None:
        for content, claim in (([token], 1), ([9], 2)):
            table = BlockTable(token, Colliding(content, 1), 2)
            assert cache.admit(table, Match([], 0), claim)
            if claim == 1:
                cache.commit(table, 1)
            cache.release(table)

    pushed_out(1)
    pushed_out(2)
    assert (host.num_cached, host.num_free) == (1, 3), "the key's place is taken"
    assert cache.match(Colliding([2, 0], 1), 1).num_tokens == 0
    match = cache.match(Colliding([1, 0], 1), 1)
    assert [b.tier for b in match.blocks] == [HOST]
    other = BlockTable(3, Colliding([3], 1), 1)
    assert cache.admit(other, Match([], 0), 1)
    cache.commit(other, 1)
    loaded = BlockTable(4, Colliding([1, 0], 1), 2)
    assert cache.admit(loaded, match, 1)
    assert loaded.num_tokens == 1
    cache.check([other, loaded])
    cache.release(loaded)
    assert (cache.device.num_cached, cache.device.num_free) == (0, 1), "loaded for one, and found by nobody"
    cache.check([other])


class Hinted(ChainedHash):
    """Notes what it is told to expect."""

    def reset(self, *, block_size: int, num_tiers: int) -> None:
        super().reset(block_size=block_size, num_tiers=num_tiers)
        self.expected: list[tuple[Prefix, list[Block]]] = []

    def expect(self, prefix: Prefix, blocks: list[Block]) -> None:
        self.expected.append((prefix, list(blocks)))


def test_a_lookup_hears_of_those_who_will_be_back() -> None:
    """With what they give up, as far as it can be found again."""
    lookup = Hinted()
    cache = cache_with(
        num_blocks=8,
        block_size=2,
        lookup=lookup,
    )
    tables = [BlockTable(i, Prefix([1, 2, 3, 4, 5, 6, i], 2, None), 8) for i in range(2)]
    for table in tables:
        assert cache.admit(table, Match([], 0), 7)
    cache.commit(tables[0], 5)
    blocks = tables[0].blocks[:2]
    cache.release(tables[0])
    assert lookup.expected == []
    cache.commit(tables[1], 7)
    cache.release(tables[1], returns=True)
    ((prefix, given),) = lookup.expected
    assert prefix is tables[1].prefix
    assert [b.key is None for b in given] == [True, True, False], (
        "equal blocks already stand for the first two"
    )
    assert cache.admit(tables[0], Match(blocks, 4), 7)
    cache.commit(tables[0], 1)
    cache.release(tables[0], returns=True)
    assert lookup.expected[1:] == [(tables[0].prefix, blocks)]


def test_there_are_as_many_tiers_as_were_asked_for() -> None:
    def cache(**sizes: int) -> KVCache:
        return cache_with(
            num_blocks=2,
            swap=make("swap", "disk"),
            **sizes,
        )

    device, host, disk = cache(), cache(host_blocks=3), cache(host_blocks=3, disk_blocks=4)
    assert [pool.capacity for pool in device.pools] == [2]
    assert [pool.capacity for pool in host.pools] == [2, 3]
    assert [pool.capacity for pool in disk.pools] == [2, 3, 4]
    assert (device.host, device.disk, host.disk) == (None, None, None)
    assert [disk.device, disk.host, disk.disk] == disk.pools


def test_who_is_let_in_gets_a_run_even_if_somebody_has_to_go_for_it() -> None:
    machine = machine_with(allocator=make("allocator", "first-fit"), num_blocks=4, host_blocks=0)
    held = [machine.hold([i], claim=2) for i in range(4)]
    machine.step([(h, len(h.tokens)) for h in held])
    held[1].tokens.append(7)
    machine.step([(held[1], 1)])
    for h in held[:3]:
        machine.let_go(h)
    assert (machine.cache.device.num_free, machine.cache.device.num_cached) == (2, 1)
    first, second = machine.hold([8, 8, 8], claim=4).table.indices
    assert second == first + 1
    assert machine.cache.device.num_cached == 0


def test_a_cache_begins_without_anybody_kept_out() -> None:
    machine = machine_with(allocator=make("allocator", "first-fit"))
    assert machine.cache.scattered is False
    assert machine.cache.memory().external == 0


@pytest.mark.parametrize("more", [0, 1])
def test_who_is_kept_out_by_pieces_and_who_by_lack_of_room(more: int) -> None:
    """Just enough is free, in pieces: that is fragmentation. With a block less it is not."""
    machine = machine_with(
        allocator=make("allocator", "first-fit"), num_blocks=5, lookup="none", host_blocks=0
    )
    held = [machine.hold([i], claim=2) for i in range(5)]
    for i in (0, 2, 4):
        machine.let_go(held[i])
    waiting = Held(9, [9] * 5, None, 2)
    assert not machine.cache.admit(waiting.table, Match([], 0), 6 + 2 * more)
    assert machine.cache.scattered is (not more)
    assert machine.cache.memory().external == (0 if more else 6)
    assert machine.cache.admit(waiting.table, Match([], 0), 2)
    assert machine.cache.scattered is False


def test_a_run_within_a_share_is_refused_where_others_have_theirs() -> None:
    """What is reserved for one tenant lies in the middle of the only run that another could have."""
    cache = cache_with(
        num_blocks=5,
        allocator=make("allocator", "first-fit"),
        eviction=make("eviction", "quota", shares="a=0.2,b=0.8", reserved=True),
    )
    tables = [BlockTable(i, Prefix([i], 1, "bbabb"[i]), 1) for i in range(5)]
    for table in tables:
        assert cache.admit(table, Match([], 0), 1)
        cache.commit(table, 1)
    for table in tables:
        cache.release(table)
    wide = BlockTable(9, Prefix([9, 9, 9], 1, "b"), 3)
    assert not cache.admit(wide, Match([], 0), 3)
    assert cache.scattered
    assert cache.device.num_cached == 5
    assert cache.admit(wide, Match([], 0), 2)
    assert cache.device.num_cached == 3


def test_why_a_block_went_is_recorded() -> None:
    machine = machine_with()
    held = computed(machine, [1, 2, 3])
    machine.cache.distrust(held.table)
    event = last(machine, ev.BLOCK_REMOVED)
    assert (event.detail, event.medium, list(event.blocks)) == (
        "distrusted",
        "device",
        held.table.indices[:1],
    )
    assert event.seq_id == -1, "a block that goes is nobody's"
    other = computed(machine, [5, 6, 7])
    assert machine.cache.spoiled({(DEVICE, other.table.indices[0])}) == {other.table.blocks[0]}
    event = last(machine, ev.BLOCK_REMOVED)
    assert (event.detail, list(event.blocks)) == ("spoiled", other.table.indices[:1])


def test_only_what_is_awaited_makes_a_better_match() -> None:
    machine = machine_with()
    cache = machine.cache
    waiting = Held(50, [1, 2, 3, 4, 5], None, 2)
    cache.await_better(waiting.table.prefix, Match([], 0), 4)
    computed(machine, [8, 9, 7])
    assert cache.better_match is False
    computed(machine, [1, 2, 3])
    assert cache.better_match is True
    cache.await_nothing()
    assert cache.better_match is False
    computed(machine, [1, 2, 3, 4, 6])
    assert cache.better_match is False


def test_where_parts_of_blocks_are_found_everything_may_make_a_better_match() -> None:
    machine = machine_with(lookup="radix", block_size=4)
    waiting = Held(50, [1, 2, 3, 4, 5], None, 4)
    machine.cache.await_better(waiting.table.prefix, Match([], 0), 4)
    assert machine.cache.better_match is False
    computed(machine, [1, 2, 8, 9])
    assert machine.cache.better_match is True
    assert machine.cache.match(waiting.table.prefix, 4).num_tokens == 2
    machine.cache.await_nothing()
    computed(machine, [1, 2, 3, 9])
    assert machine.cache.better_match is False


@pytest.mark.parametrize("most", [2, 3])
def test_a_match_that_cannot_be_longer_awaits_nothing(most: int) -> None:
    machine = machine_with()
    machine.let_go(computed(machine, [1, 2, 3]))
    waiting = Held(50, [1, 2, 3, 4], None, 2)
    match = machine.cache.match(waiting.table.prefix, most)
    assert match.num_tokens == 2
    machine.cache.await_better(waiting.table.prefix, match, most)
    computed(machine, [1, 2, 3, 4])
    assert machine.cache.better_match is False


def brought_up(num_blocks: int = 3) -> CacheMachine:
    """The content of tokens 1, 2 lies in the host tier; its first block was brought up to where another's was."""
    machine = machine_with(block_size=1, num_blocks=num_blocks)
    machine.let_go(computed(machine, [1, 2]))
    machine.let_go(computed(machine, list(range(3, 3 + num_blocks))))
    below = [b for b in machine.cache.pools[HOST].blocks if b.key is not None]
    first = min(below, key=lambda b: b.depth)
    assert machine.cache.prefetch(first) is None, "no block is free, and nobody said that one may be evicted"
    assert machine.cache.prefetch(first, evict=True) is not None
    return machine


def test_the_fate_of_what_was_brought_up() -> None:
    """Used, cleared away, spoiled, or in the way of what was asked for, which lies in the host tier or nowhere."""
    machine = brought_up()
    machine.hold([1, 9], claim=2)
    assert machine.fates == {"done": 1, "useful": 1}
    machine = brought_up()
    machine.cache.clear()
    assert machine.fates == {"done": 1, "useless": 1}
    machine = brought_up()
    (block,) = machine.cache.prefetched.unused
    machine.cache.spoiled({(DEVICE, block.index)})
    assert machine.fates == {"done": 1, "useless": 1}
    machine = brought_up()
    machine.hold([3, 4, 5], claim=3)
    assert machine.fates == {"done": 1, "harmful": 1}
    machine = brought_up(num_blocks=4)
    held = machine.hold([3, 4, 5, 6, 7], claim=4)
    assert held.table.num_tokens == 4, "found, the last of it in the host tier"
    assert machine.fates == {"done": 1, "harmful": 1}


def test_a_place_that_was_taken_twice_is_the_last_ones() -> None:
    """Two loads took the place of one content, which had come back in between: the second is the one that harms."""
    told: list[tuple[Block, str]] = []
    books = Prefetched(lambda block, fate: told.append((block, fate)))
    first, second = Block(1), Block(2)
    books.begin(first, 7)
    books.begin(second, 7)
    books.end([first], "useful")
    books.missed([7, 8])
    assert told == [(first, "done"), (second, "done"), (first, "useful"), (second, "harmful")]
    assert len(books) == 0
    books.begin(second, 9)
    books.missed([7])
    assert len(books) == 1, "whose place it took before does not matter any more"
    books.missed([9])
    assert len(books) == 0


@pytest.mark.parametrize("known", [False, True])
def test_children_are_known_where_that_was_asked_for(known: bool) -> None:
    cache = cache_with(
        num_blocks=2,
        swap=make("swap", "host"),
        host_blocks=4,
        **({"knows_children": True} if known else {}),
    )
    for tokens in ([1, 2], [3, 4]):
        table = BlockTable(tokens[0], Prefix(tokens, 1, None), 2)
        assert cache.admit(table, Match([], 0), 2)
        cache.commit(table, 2)
        cache.release(table)
    first, second = sorted((b for b in cache.pools[HOST].blocks if b.key is not None), key=lambda b: b.depth)
    assert cache.children(first) == ([second] if known else [])
    assert cache.children(second) == []


@pytest.mark.parametrize("contiguous", [False, True])
def test_room_is_never_made_of_what_is_protected(contiguous: bool) -> None:
    pool = BlockPool(
        4, make("allocator", "first-fit"), make("eviction", "lru"), lambda blocks: None, block_size=1
    )
    blocks = pool.take(4)
    assert blocks is not None
    for key, block in enumerate(blocks):
        block.key = key
    pool.store(blocks)
    pool.drop(blocks, 0)
    protected = blocks[:2]
    assert pool.take(3, protected, contiguous=contiguous) is None
    assert pool.num_cached == 4
    taken = pool.take(2, protected, contiguous=contiguous)
    assert taken is not None
    assert set(taken) == set(blocks[2:])
    assert all(b.key is not None for b in protected)
