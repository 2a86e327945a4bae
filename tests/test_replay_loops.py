"""What a policy hears and sees while a stream is replayed, access by access, and which victims are illegal."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples

from pagedlab.cache.replay import ReplayView, Wanted, plain, prefix
from pagedlab.errors import PolicyError
from pagedlab.policies.block import Block, Origin
from pagedlab.policies.eviction import LRU, Eviction
from pagedlab.policies.quota import Quota
from pagedlab.policies.view import NOTHING_KNOWN, View

A, B = Origin(salt="a"), Origin(salt="b")


class Witness(Eviction):
    """Gives up what was released last, or first, and notes all that it hears, and what it sees of a block then."""

    last: bool = False

    def reset(self, *, capacity: int) -> None:
        self.order: list[Block] = []
        self.heard: list[tuple[Any, ...]] = []

    def see(self, what: str, block: Block) -> None:
        assert block.serial == block.key
        assert block.parent == block.parent_key
        self.heard.append((what, block.key, block.parent_key, block.depth, block.hits, block.ref_count))

    def begin(self, origin: Origin) -> None:
        self.heard.append(("begin", origin.salt, self.view.now))

    def miss(self, key: Any, readmitted: bool = False) -> None:
        assert readmitted is False
        self.heard.append(("miss", key))

    def insert(self, block: Block) -> None:
        assert block.created == self.view.now
        self.see("insert", block)

    def hit(self, block: Block) -> None:
        self.order.remove(block)
        self.see("hit", block)

    def release(self, block: Block) -> None:
        assert block.last_released == self.view.now
        self.order.append(block)
        self.see("release", block)

    def remove(self, block: Block) -> None:
        self.order.remove(block)
        self.heard.append(("remove", block.key, block.salt, block.born))

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        self.heard.append(("victims", n))
        return (self.order[::-1] if self.last else self.order)[:n]


def replayed(
    way: Callable[..., Any], policy: Eviction, capacity: int, requests: list[Wanted], **options: Any
) -> list[int]:
    policy.attach(ReplayView())
    policy.reset(capacity=capacity)
    return [n for some in way(requests, policy, capacity, block_size=4, **options) for n in some]


def test_what_is_heard_of_requests_that_hold_their_blocks() -> None:
    policy = Witness()
    requests = [
        Wanted([1, 2], time=10, origin=A),
        Wanted([1, 2, 3], time=20, origin=B),
        Wanted([7, 8], time=30),
    ]
    assert replayed(prefix, policy, 3, requests) == [0, 2, 0]
    assert policy.heard == [
        ("begin", "a", 10),
        ("miss", 1),
        ("miss", 2),
        ("insert", 1, None, 0, 0, 1),
        ("insert", 2, 1, 4, 0, 1),
        ("release", 2, 1, 4, 0, 0),
        ("release", 1, None, 0, 0, 0),
        ("begin", "b", 20),
        ("hit", 1, None, 0, 1, 0),
        ("hit", 2, 1, 4, 1, 0),
        ("miss", 3),
        ("insert", 3, 2, 8, 0, 1),
        ("release", 3, 2, 8, 0, 0),
        ("release", 2, 1, 4, 1, 0),
        ("release", 1, None, 0, 1, 0),
        ("begin", None, 30),
        ("miss", 7),
        ("miss", 8),
        ("victims", 2),
        ("remove", 3, "b", 3),
        ("remove", 2, "a", 2),
        ("insert", 7, None, 0, 0, 1),
        ("insert", 8, 7, 4, 0, 1),
        ("release", 8, 7, 4, 0, 0),
        ("release", 7, None, 0, 0, 0),
    ]


def test_a_block_that_lost_its_prefix_makes_way_for_its_content() -> None:
    """Parents go first here. The second of 1, 2, 3 is there and not found; its place is used for it once more."""
    policy = Witness(last=True)
    requests = [Wanted([1, 2, 3]), Wanted([9, 8]), Wanted([1, 2]), Wanted([5]), Wanted([1, 2])]
    assert replayed(prefix, policy, 4, requests) == [0, 0, 0, 0, 2]
    removed = [heard[1] for heard in policy.heard if heard[0] == "remove"]
    assert removed == [1, 9, 8, 2]
    asked = [heard for heard in policy.heard if heard[0] == "victims"]
    assert asked == [("victims", 1), ("victims", 2)], (
        "the place that was left over is used before anybody has to go"
    )
    at = policy.heard.index(("remove", 2, None, 2))
    assert policy.heard[at - 1 : at + 2] == [
        ("insert", 1, None, 0, 0, 1),
        ("remove", 2, None, 2),
        ("insert", 2, 1, 4, 0, 1),
    ]


@pytest.mark.parametrize("way", [plain, prefix])
def test_accesses_that_have_nothing_to_do_with_each_other_have_no_parents(way: Callable[..., Any]) -> None:
    policy = Witness()
    replayed(way, policy, 3, [Wanted([4, 5, 6], chained=False)])
    inserted = [heard for heard in policy.heard if heard[0] == "insert"]
    assert inserted == [("insert", key, None, 0, 0, 1) for key in (4, 5, 6)]


@pytest.mark.parametrize("way", [plain, prefix])
def test_every_hit_is_counted(way: Callable[..., Any]) -> None:
    policy = Witness()
    assert replayed(way, policy, 3, [Wanted([4])] * 4) == [0, 1, 1, 1]
    assert [heard[4] for heard in policy.heard if heard[0] == "hit"] == [1, 2, 3]


@pytest.mark.parametrize("tail_first", [False, True])
def test_what_is_heard_of_accesses_one_by_one(tail_first: bool) -> None:
    policy = Witness()
    requests = [Wanted([1, 2], time=10, origin=A), Wanted([2, 3], time=20, origin=B)]
    assert replayed(plain, policy, 2, requests, tail_first=tail_first) == [0, not tail_first]
    one, two = ("miss", 1), ("miss", 2)
    first = [one, ("insert", 1, None, 0, 0, 1), ("release", 1, None, 0, 0, 0)]
    second = [two, ("insert", 2, 1, 4, 0, 1), ("release", 2, 1, 4, 0, 0)]
    begun = [("begin", "a", 10), *(second + first if tail_first else first + second), ("begin", "b", 20)]
    third = ("insert", 3, 2, 4, 0, 1), ("release", 3, 2, 4, 0, 0)
    if tail_first:
        begun += [("miss", 3), ("victims", 1), ("remove", 2, "a", 1), *third]
        begun += [two, ("victims", 1), ("remove", 1, "a", 2)]
        begun += [("insert", 2, None, 0, 0, 1), ("release", 2, None, 0, 0, 0)]
    else:
        begun += [("hit", 2, 1, 4, 1, 0), ("release", 2, 1, 4, 1, 0)]
        begun += [("miss", 3), ("victims", 1), ("remove", 1, "a", 1), *third]
    assert policy.heard == begun


@given(st.integers(1, 9), st.booleans())
def test_tail_first_is_the_same_backwards(length: int, chained: bool) -> None:
    """Longer and shorter requests, of which nothing is found: the same blocks in the same places, last to first."""
    requests = [
        Wanted(list(range(at, at + n)), chained=chained)
        for at, n in ((10, length), (30, 1), (50, 2 * length), (70, 0), (90, length))
    ]
    stored = []
    for tail_first in (False, True):
        policy = Witness()
        assert sum(replayed(plain, policy, 50, requests, tail_first=tail_first)) == 0
        heard = iter([heard for heard in policy.heard if heard[0] == "insert"])
        stored.append([[next(heard) for _ in request.keys] for request in requests])
    assert stored[1] == [part[::-1] for part in stored[0]]
    assert [depth for _, _, parent, depth, _, _ in stored[0][2]] == [
        4 * i * chained for i in range(2 * length)
    ]


class NamesWhatIsUsed(Witness):
    """Forgets that what was hit is in use."""

    def hit(self, block: Block) -> None:
        pass


class NamesNobody(Witness):
    """Has nothing to give."""

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return []


class NamesStrangers(Witness):
    """Names blocks of another cache."""

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        strangers = [Block(i) for i in range(n)]
        self.order += strangers
        for key, block in enumerate(strangers):
            block.key = 100 + key
        return strangers


@pytest.mark.parametrize(
    ("way", "policy", "says"),
    [
        (prefix, NamesWhatIsUsed(last=True), "NamesWhatIsUsed named <block .*>, which it must not"),
        (prefix, NamesStrangers(), "NamesStrangers named <block .*>, which it must not"),
        (plain, NamesStrangers(), "NamesStrangers named <block .*>, which it must not"),
        (prefix, NamesNobody(), "NamesNobody named 0 victims of 1"),
        (plain, NamesNobody(), "NamesNobody named no victim, though all blocks are released"),
    ],
)
def test_an_illegal_victim_is_named(way: Callable[..., Any], policy: Eviction, says: str) -> None:
    with pytest.raises(PolicyError, match=says) as caught:
        replayed(way, policy, 2, [Wanted([1, 2]), Wanted([1, 3])])
    assert "\n" not in str(caught.value)


# ---- who listens, and what they see of the world ---------------------------------------------------------------------

REPEATED = [Wanted([1, 2], time=10), Wanted([1, 3], time=20), Wanted([1, 2], time=30)]


@pytest.mark.parametrize("way", [plain, prefix])
@pytest.mark.parametrize("observation", ["begin", "miss", "insert"])
def test_what_nobody_listens_to_is_not_told(
    way: Callable[..., Any], observation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*_: Any) -> None:
        raise AssertionError("a call for nothing")

    monkeypatch.setattr(Eviction, observation, told)
    assert replayed(way, LRU(), 3, REPEATED) == [0, 1, 2]


@pytest.mark.parametrize("way", [plain, prefix])
def test_a_policy_may_listen_with_any_function(way: Callable[..., Any]) -> None:
    """An observation need not be a method of the class."""

    class Notes(LRU):
        def reset(self, *, capacity: int) -> None:
            super().reset(capacity=capacity)
            self.begun: list[Origin] = []
            self.missed: list[Any] = []
            self.stored: list[Block] = []
            vars(self).update(begin=self.begun.append, miss=self.missed.append, insert=self.stored.append)

    policy = Notes()
    assert replayed(way, policy, 3, REPEATED) == [0, 1, 2]
    assert len(policy.begun) == 3
    assert policy.missed == [1, 2, 3]
    assert [block.key for block in policy.stored] == [1, 2, 3]


@pytest.mark.parametrize("way", [plain, prefix])
def test_a_view_that_is_not_of_replay_is_left_alone(way: Callable[..., Any]) -> None:
    mine, nobodys, known = LRU(), LRU(), dict(vars(NOTHING_KNOWN))
    view = View()
    mine.attach(view)
    for policy in (mine, nobodys):
        policy.reset(capacity=3)
        assert [n for some in way(REPEATED, policy, 3, block_size=4) for n in some] == [0, 1, 2]
    assert vars(view) == {}
    assert vars(NOTHING_KNOWN) == known
    assert nobodys.view is NOTHING_KNOWN


def test_without_a_model_the_view_knows_what_nobody_knows() -> None:
    """Costs are those of a world where nothing is known, and no time has passed before the first request."""
    view, block = ReplayView(), Block(0, size=16)
    block.depth = 48
    assert view.now == NOTHING_KNOWN.now
    assert view.recompute_flops(block) == NOTHING_KNOWN.recompute_flops(block) == 16
    assert view.bytes_per_token == NOTHING_KNOWN.bytes_per_token
    measured = ReplayView(3.0, 5.0, 7.0)
    assert measured.recompute_flops(block) == 16 * (3 + 5 * (48 + 17 / 2))
    assert measured.bytes_per_token == 7


# ---- places ----------------------------------------------------------------------------------------------------------


class Places(Eviction):
    """Put in front of a policy: every content has a place of its own, and a policy that divides is told the truth."""

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self.capacity = capacity
        self.lying: dict[int, Block] = {}
        self.gone: set[Block] = set()
        self.announced = 0

    def insert(self, block: Block) -> None:
        assert block.index in range(self.capacity)
        assert block.index not in self.lying, f"{block} lies where {self.lying[block.index]} lies"
        assert block.fill == 4
        self.lying[block.index] = block
        self.gone.discard(block)
        assert all(other.ref_count in (0, 1) for other in self.lying.values()), "one request runs at a time"
        self.announced -= self.partitioned
        super().insert(block)

    def remove(self, block: Block) -> None:
        assert self.lying.pop(block.index) is block
        self.gone.add(block)
        super().remove(block)

    def victims_for(self, origin: Origin, n: int, free: int, protected: Any = ()) -> list[Block] | None:
        assert free == self.capacity - len(self.lying)
        assert not self.announced, "what was announced was not stored"
        self.announced = n
        return super().victims_for(origin, n, free, protected)


class PlacesOfOne(Places, LRU):
    pass


class PlacesOfTenants(Places, Quota):
    pass


class Sweeping(LRU):
    """A tenant with two released blocks or more gives all of them up before it is given another."""

    partitioned = True

    def limit(self, origin: Origin) -> int:
        return self._capacity

    def victims_for(self, origin: Origin, n: int, free: int, protected: Any = ()) -> list[Block] | None:
        own = [block for block in self.order() if block.origin == origin]
        own = own if len(own) > 1 else []
        others = [block for block in self.order() if block not in own]
        short = n - free - len(own)
        return [*own, *others[: max(0, short)]] if short <= len(others) else None


class PlacesThatAreSwept(Places, Sweeping):
    pass


def wanted(draws: list[tuple[int, int, Origin]]) -> list[Wanted]:
    """Requests over few stems: the first blocks of one of three sequences, for one of two tenants."""
    return [
        Wanted([100 * stem + 10_000 * (origin is B) + i for i in range(length)], time=at, origin=origin)
        for at, (stem, length, origin) in enumerate(draws)
    ]


streams = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 6), st.sampled_from([A, B])), min_size=1, max_size=30
).map(wanted)


@pytest.mark.parametrize("way", [plain, prefix])
@settings(max_examples=examples(0.5))
@given(
    requests=streams,
    capacity=st.integers(1, 9),
    policy=st.sampled_from(
        [
            PlacesOfOne(),
            PlacesThatAreSwept(),
            PlacesOfTenants(shares="a=0.5"),
            PlacesOfTenants(shares="a=0.4,b=0.4", reserved=True),
        ]
    ),
)
def test_every_content_has_a_place_of_its_own(
    way: Callable[..., Any], requests: list[Wanted], capacity: int, policy: Places
) -> None:
    hits = replayed(way, policy, capacity, requests)
    assert all(n <= len(request.keys) for n, request in zip(hits, requests, strict=True))
    assert not policy.announced
    assert all(block.ref_count == 0 and block.key is not None for block in policy.lying.values())
    assert all(block.ref_count == 0 and block.key is None for block in policy.gone)


def test_what_was_given_up_in_advance_is_used_next() -> None:
    """A tenant that gives up two blocks for one leaves a place over, which is the next that is taken."""
    policy = PlacesThatAreSwept()
    requests = [Wanted([1, 2], origin=A), Wanted([3], origin=B), Wanted([4], origin=A), Wanted([5], origin=B)]
    assert replayed(plain, policy, 3, requests) == [0, 0, 0, 0]
    assert sorted(block.key or 0 for block in policy.lying.values()) == [3, 4, 5]
    assert sorted(policy.lying) == [0, 1, 2]


class KeepsOut(LRU):
    """Nothing is given up for tenant b: it has no share, or gets what is free."""

    partitioned = True
    share: int = 9

    def limit(self, origin: Origin) -> int:
        return self.share if origin is B else self._capacity

    def victims_for(self, origin: Origin, n: int, free: int, protected: Any = ()) -> list[Block] | None:
        assert self.limit(origin)
        return [] if n <= free else None if origin is B else self.victims(n - free)


@pytest.mark.parametrize("policy", [KeepsOut(), KeepsOut(share=0)], ids=["nothing given", "no share"])
def test_where_no_room_can_be_made_the_request_goes_on(policy: KeepsOut) -> None:
    """What finds no room is missed every time; the blocks after it are looked up all the same."""
    requests = [Wanted([1, 2], origin=A), *[Wanted([5, 2, 6, 1], origin=B)] * 2, Wanted([3, 2], origin=A)]
    assert replayed(plain, policy, 2, requests) == [0, 2, 2, 0]
