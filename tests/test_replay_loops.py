"""What a policy hears and sees while a stream is replayed, access by access, and which victims are illegal."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest

from pagedlab.cache.replay import ReplayView, Wanted, plain, prefix
from pagedlab.errors import PolicyError
from pagedlab.policies.block import Block, Origin
from pagedlab.policies.eviction import Eviction

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
