"""What mutation testing found that nobody said: each test fails for a small change that all others accept."""

from __future__ import annotations

from typing import Any

import pytest
from test_cache_machine import CacheMachine, Held, small_machine

from pagedlab import events as ev
from pagedlab.cache.kv_cache import KVCache
from pagedlab.cache.pool import BlockPool
from pagedlab.cache.table import BlockTable
from pagedlab.policies.block import DEVICE, HOST
from pagedlab.policies.lookup import Match, Prefix
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
    assert again.table.num_tokens == 2
    assert [b.created for b in again.table.blocks[:2]] == [77, 77]


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
    shared = child.table.blocks[1].index
    child.tokens.append(4)
    machine.step([(child, 1)])
    event = last(machine, ev.BLOCKS_COPIED)
    assert (event.seq_id, tuple(event.blocks)) == (9, (shared, child.table.indices[1]))


def test_swapping_is_recorded() -> None:
    machine = machine_with()
    held = computed(machine, [1, 2, 3])
    assert machine.cache.swap_out(held.table)
    saved = last(machine, ev.BLOCKS_SAVED)
    assert (saved.seq_id, saved.medium, saved.detail) == (held.table.seq_id, "host", "preempted")
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
    machine.let_go(held)
    assert (table.num_tokens, table.num_published, table.blocks, table.indices) == (0, 0, [], [])
    assert (table.parent, table.parent_key) == ((None,), None)
    assert table.version > before


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


def test_a_match_that_cannot_be_longer_awaits_nothing() -> None:
    machine = machine_with()
    machine.let_go(computed(machine, [1, 2, 3]))
    waiting = Held(50, [1, 2, 3], None, 2)
    match = machine.cache.match(waiting.table.prefix, 2)
    assert match.num_tokens == 2
    machine.cache.await_better(waiting.table.prefix, match, 2)
    computed(machine, [1, 2, 3, 4])
    assert machine.cache.better_match is False


def brought_up(told: list[tuple[int, str]]) -> CacheMachine:
    """The content of tokens 1, 2 lies in the host tier; bring its first block up to where another's was."""
    machine = small_machine()
    machine.cache.prefetched._tell = lambda block, fate: told.append((block.index, fate))
    machine.let_go(computed(machine, [1, 2]))
    machine.let_go(computed(machine, [3, 4, 5]))
    below = [b for b in machine.cache.pools[HOST].blocks if b.key is not None]
    first = min(below, key=lambda b: b.depth)
    assert machine.cache.prefetch(first, evict=True) is not None
    return machine


def test_the_fate_of_what_was_brought_up() -> None:
    """Used, cleared away, or in the way of what was asked for."""
    told: list[tuple[int, str]] = []
    brought_up(told).hold([1, 9], claim=2)
    assert [fate for _, fate in told] == ["done", "useful"]
    told.clear()
    brought_up(told).cache.clear()
    assert [fate for _, fate in told] == ["done", "useless"]
    told.clear()
    brought_up(told).hold([3, 4, 5], claim=3)
    assert [fate for _, fate in told] == ["done", "harmful"]


@pytest.mark.parametrize("known", [False, True])
def test_children_are_known_where_that_was_asked_for(known: bool) -> None:
    cache = KVCache(
        num_blocks=2,
        block_size=1,
        allocator=make("allocator", "fifo"),
        lookup=make("lookup", "chained-hash"),
        eviction=make("eviction", "lru"),
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
