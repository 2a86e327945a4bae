"""Slot `allocator`: every block is handed out once at a time, and a refusal changes nothing."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scenario, examples, servable, serve

from pagedlab.config import Config
from pagedlab.engine.request import Request, SamplingParams
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


def room(name: str, pool: range, free: set[int], n: int) -> bool:
    """Whether an allocator of this name can give ``n`` of the ``free`` blocks of the pool, by its definition."""
    if name != "buddy":
        return run_of(free, n) if name in ("first-fit", "best-fit") else n <= len(free)
    length = 1 << (n - 1).bit_length()
    if length > len(pool):
        return n <= len(pool) and all(b in free for b in pool[:n])
    return any(
        all(b in free for b in pool[at : at + length]) for at in range(0, len(pool) - length + 1, length)
    )


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
    pool = range(first, first + size)
    free = set(pool)
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
            assert fits == room(name, pool, free, n)
            if taken is None:
                assert vars(policy) == before, "a refusal changed something"
                assert n > len(free) or policy.contiguous
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


@pytest.mark.parametrize("name", ["first-fit", "best-fit", "buddy"])
def test_contiguous_allocators_continue_a_table_where_they_can(name: str) -> None:
    policy = allocator(name, range(12))
    first = policy.allocate(2)
    policy.allocate(2)
    third = policy.allocate(2)
    assert first is not None
    assert third is not None
    policy.free(first)
    assert policy.allocate(1, after=third[-1]) == [third[-1] + 1]


def holes(name: str) -> Allocator:
    """A pool of 32 in which runs of 8, 2 and 4 are free."""
    policy = allocator(name, range(32))
    assert policy.allocate(32) is not None
    policy.free([*range(8), 10, 11, *range(16, 20)])
    return policy


def test_first_fit_takes_the_lowest_run_and_best_fit_the_shortest() -> None:
    assert holes("first-fit").allocate(2) == [0, 1]
    assert holes("best-fit").allocate(2) == [10, 11]
    assert holes("best-fit").allocate(3) == [16, 17, 18]
    assert holes("best-fit").allocate(5) == [0, 1, 2, 3, 4]


def test_best_fit_keeps_long_runs_whole() -> None:
    """First-fit cuts the run of 8 for small requests and then has no run of 8; best-fit has."""
    for name, left in (("first-fit", None), ("best-fit", list(range(8)))):
        policy = holes(name)
        assert policy.allocate(2) is not None
        assert policy.allocate(4) is not None
        assert policy.allocate(8) == left


def test_buddies_split_and_merge() -> None:
    policy = allocator("buddy", range(1, 17))
    assert policy.allocate(3) == [1, 2, 3]
    assert policy.allocate(1) == [4], "what rounding up had left over serves a smaller request"
    assert policy.allocate(3) == [5, 6, 7]
    assert policy.allocate(8) == list(range(9, 17))
    assert policy.allocate(2) is None
    policy.free([7])
    assert policy.num_free == 2
    assert policy.allocate(2) == [7, 8], "merged with the piece that was left over"
    policy.free([2, 3])
    assert policy.allocate(2) is None, "neighbours, but halves of different runs"
    policy.free([1, 4])
    assert policy.allocate(4) == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 5, 8, 11, 24])
def test_buddy_gives_more_than_its_largest_run_from_the_beginning(size: int) -> None:
    for n in range(1, size + 1):
        policy = allocator("buddy", range(size))
        taken = policy.allocate(n)
        assert taken is not None
        assert taken == list(range(taken[0], taken[0] + n))
        assert taken[0] == 0 or (1 << (n - 1).bit_length()) <= size
        assert policy.num_free == size - n
        policy.free(taken)
        assert policy.allocate(size) == list(range(size))


@pytest.mark.parametrize("name", ["first-fit", "best-fit", "buddy"])
def test_memory_accounting_sees_external_fragmentation(name: str) -> None:
    """Four requests fill the pool, two that are no neighbours end, and what they leave is no run for the fifth."""
    requests = [
        Request(request_id=str(i), prompt=[i] * n, sampling=SamplingParams(max_tokens=tokens))
        for i, (n, tokens) in enumerate(((8, 2), (8, 30), (8, 2), (8, 30), (14, 6)))
    ]
    config = Config(
        allocator=name,
        lookup="none",
        reservation="oracle",
        scheduler="iteration-level",
        num_blocks=28,
        block_size=4,
        max_num_seqs=5,
        max_num_batched_tokens=64,
        max_model_len=64,
    )
    engine = serve(Scenario(config, requests, vocab=40))
    external = [record.memory.external for record in engine.steps]
    assert max(external) >= 4 * 5, "the fifth has to wait although enough blocks are free"
    assert external[-1] == 0
    paged = serve(Scenario(config.replace(allocator="free-list"), requests, vocab=40))
    assert not any(record.memory.external for record in paged.steps)
    assert paged.groups["4"].sequences[0].admitted_at < engine.groups["4"].sequences[0].admitted_at
