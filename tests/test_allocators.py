"""Slot `allocator`: every block is handed out once at a time, and a refusal changes nothing."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples, servable

from pagedlab.policies import Allocator
from pagedlab.registry import make


def allocator(name: str, blocks: range) -> Allocator:
    made = make("allocator", name)
    assert isinstance(made, Allocator)
    made.reset(blocks)
    return made


def run_of(free: set[int], n: int) -> bool:
    """Whether ``n`` adjacent numbers are free."""
    return any(all(b + i in free for i in range(n)) for b in free)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(("take", "take", "give", "shuffle")), st.integers(1, 6), st.integers(0, 99)),
    max_size=40,
)


@pytest.mark.parametrize("name", servable("allocator"))
@settings(max_examples=examples(0.6))
@given(first=st.integers(0, 2), size=st.integers(1, 24), operations=OPERATIONS)
def test_no_block_is_handed_out_twice(
    name: str, first: int, size: int, operations: list[tuple[str, int, int]]
) -> None:
    policy = allocator(name, range(first, first + size))
    free = set(range(first, first + size))
    used: list[list[int]] = []
    for what, n, choice in operations:
        assert policy.num_free == len(free)
        if what == "take":
            after = used[choice % len(used)][-1] if used and choice % 2 else None
            before = deepcopy(vars(policy))
            fits = policy.fits(n)
            assert vars(policy) == before, "asking whether it fits changed something"
            taken = policy.allocate(n, after)
            assert fits == (taken is not None), "fits() and allocate() disagree"
            if taken is None:
                assert vars(policy) == before, "a refusal changed something"
                assert n > len(free) or (policy.contiguous and not run_of(free, n))
                continue
            assert len(taken) == len(set(taken)) == n
            assert set(taken) <= free
            if policy.contiguous:
                assert taken == list(range(taken[0], taken[0] + n)), "not adjacent, or not in order"
            free -= set(taken)
            used.append(taken)
        elif used:
            back = used.pop(choice % len(used))
            back = back[::-1] if what == "give" else back
            policy.free(back)
            free |= set(back)
    for blocks in used:
        policy.free(blocks)
    assert policy.num_free == size
    everything = policy.allocate(size)
    assert everything is not None, "after all is given back, the whole pool is one piece again"
    assert sorted(everything) == list(range(first, first + size))
    assert policy.allocate(1) is None


@pytest.mark.parametrize("name", servable("allocator"))
@settings(max_examples=examples(0.6))
@given(size=st.integers(1, 20), n=st.integers(1, 8), data=st.data())
def test_fits_foresees_what_freeing_would_bring(name: str, size: int, n: int, data: st.DataObject) -> None:
    policy = allocator(name, range(size))
    used = set(policy.allocate(size) or ())
    back = data.draw(st.sets(st.sampled_from(sorted(used))))
    also = data.draw(st.sets(st.sampled_from(sorted(used - back)))) if used - back else set()
    policy.free(sorted(back))
    foreseen = policy.fits(n, also)
    policy.free(sorted(also))
    assert (policy.allocate(n) is not None) == foreseen


@pytest.mark.parametrize("name", servable("allocator"))
def test_a_clone_starts_anew_and_reset_forgets(name: str) -> None:
    policy = allocator(name, range(8))
    policy.allocate(5)
    clone = policy.clone()
    clone.reset(range(3))
    assert clone.num_free == 3
    assert policy.num_free == 3
    policy.reset(range(8))
    assert policy.num_free == 8


def test_free_list_hands_out_what_was_freed_last() -> None:
    policy = allocator("free-list", range(6))
    taken = policy.allocate(4)
    assert taken is not None
    policy.free([taken[1]])
    assert policy.allocate(1) == [taken[1]]


def test_fifo_lets_blocks_rest() -> None:
    policy = allocator("fifo", range(6))
    taken = policy.allocate(4)
    assert taken is not None
    policy.free([taken[1]])
    order = policy.allocate(3)
    assert order is not None
    assert order[-1] == taken[1]


def test_contiguous_memory_fragments_and_paged_memory_does_not() -> None:
    """Half of the pool is free in pieces of one: the paper's external fragmentation."""
    for name in servable("allocator"):
        policy = allocator(name, range(10))
        assert policy.allocate(10) is not None
        policy.free([0, 2, 4, 6, 8])
        assert policy.num_free == 5
        assert (policy.allocate(2) is None) == policy.contiguous


def test_first_fit_continues_a_table_where_it_can() -> None:
    policy = allocator("first-fit", range(12))
    first = policy.allocate(2)
    policy.allocate(2)
    third = policy.allocate(2)
    assert first is not None
    assert third is not None
    policy.free(first)
    assert policy.allocate(1, after=third[-1]) == [third[-1] + 1]
