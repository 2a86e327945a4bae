"""The blocks of one tier: free + in use + cached = total, and what fails changes nothing (law 1)."""

from __future__ import annotations

from collections.abc import Collection
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from strategies import Spy, examples, policies, servable

from pagedlab.cache.pool import BlockPool
from pagedlab.errors import InvariantBroken, PolicyError
from pagedlab.policies import Block
from pagedlab.policies.block import Origin
from pagedlab.policies.eviction import FIFO
from pagedlab.policies.quota import Quota
from pagedlab.registry import make

PICK = st.randoms(use_true_random=False)


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share and drop blocks, publish some, and others are forgotten."""

    @initialize(
        num_blocks=st.integers(1, 12),
        reserved=st.sampled_from((0, 0, 1)),
        allocator=policies("allocator"),
        eviction=policies("eviction"),
    )
    def start(self, num_blocks: int, reserved: int, allocator: Any, eviction: Any) -> None:
        self.spy = Spy(inner=eviction)
        self.evicted: list[Block] = []
        self.pool = BlockPool(
            num_blocks + reserved, allocator, self.spy, self.on_evict, block_size=2, reserved=reserved
        )
        self.holders: list[list[Block]] = []
        self.keys = 0
        self.time = 0

    def on_evict(self, victims: list[Block]) -> None:
        for block in victims:
            assert block.ref_count == 0, "evicted while in use"
            assert block.key is not None, "the victim's identity is gone before it could be kept elsewhere"
        self.evicted += victims

    def counted(self) -> tuple[int, int, int]:
        return self.pool.num_free, self.pool.num_in_use, self.pool.num_cached

    @rule(pick=PICK, n=st.integers(0, 6), contiguous=st.booleans(), protect=st.booleans())
    def take(self, pick: Random, n: int, contiguous: bool, protect: bool) -> None:
        findable = [b for b in self.pool.blocks if b.key is not None]
        protected = pick.sample(findable, pick.randint(0, len(findable))) if protect else []
        guarded = sum(not b.ref_count for b in protected)
        held = {b for blocks in self.holders for b in blocks}
        before, log = self.counted(), len(self.spy.log)
        room = self.pool.has_room(n, protected, contiguous=contiguous)
        assert (self.counted(), len(self.spy.log)) == (before, log), "asking for room changed something"
        taken = self.pool.take(n, protected, contiguous=contiguous)
        assert room == (taken is not None), "has_room() and take() disagree"
        if taken is None:
            assert (self.counted(), len(self.spy.log)) == (before, log), "a refusal left a trace"
            assert contiguous or n > before[0] + before[2] - guarded
            return
        assert len(taken) == len(set(taken)) == n
        assert not set(taken) & held, "handed out again while in use"
        assert not set(taken) & set(protected)
        assert all(b.ref_count == 1 and b.key is None for b in taken)
        if contiguous and self.pool.allocator.contiguous:
            assert [b.index for b in taken] == [taken[0].index + i for i in range(n)] if n else True
        if taken:
            self.holders.append(taken)

    @rule(pick=PICK)
    def share(self, pick: Random) -> None:
        findable = [b for b in self.pool.blocks if b.ref_count or b.key is not None]
        if findable and len(self.holders) < 8:
            chosen = pick.sample(findable, pick.randint(1, len(findable)))
            for block in chosen:
                if block.key is not None:
                    self.spy.hit(block)
                elif block.ref_count == 1:
                    block.fill = pick.randint(1, 2)
            self.pool.share(chosen)
            self.holders.append(chosen)

    @rule(pick=PICK)
    def publish(self, pick: Random) -> None:
        private = [b for blocks in self.holders for b in blocks if b.key is None and b.ref_count == 1]
        if private:
            block = pick.choice(private)
            self.keys += 1
            self.time += 1
            block.key, block.born = self.keys, self.pool.next_store()
            self.pool.store([block])

    @rule(pick=PICK)
    def drop(self, pick: Random) -> None:
        if self.holders:
            self.time += 1
            self.pool.drop(self.holders.pop(pick.randrange(len(self.holders)))[::-1], self.time)

    @rule(pick=PICK)
    def forget(self, pick: Random) -> None:
        findable = [b for b in self.pool.blocks if b.key is not None]
        if findable:
            self.pool.blank(pick.choice(findable))

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert sum(self.counted()) == self.pool.capacity
        holding: dict[Block, int] = {}
        for blocks in self.holders:
            for block in blocks:
                holding[block] = holding.get(block, 0) + 1
        assert all(b.ref_count == holding.get(b, 0) for b in self.pool.blocks)
        assert all(self.pool.blocks[i].ref_count == 0 for i in range(self.pool.reserved))
        self.spy.agrees_with(self.pool)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        while self.holders:
            self.pool.drop(self.holders.pop(), self.time)
        self.books_balance()
        assert self.pool.num_in_use == 0
        assert self.pool.saved_tokens == 0
        taken = self.pool.take(self.pool.capacity, contiguous=True)
        assert taken is not None, "an unused pool can be handed out whole"


def test_any_use_of_a_pool() -> None:
    run_state_machine_as_test(PoolMachine, settings=settings(max_examples=examples(1.5)))


def pool(num_blocks: int = 6, allocator: str = "free-list", eviction: str = "lru") -> BlockPool:
    return BlockPool(
        num_blocks,
        make("allocator", allocator),  # type: ignore[arg-type]
        make("eviction", eviction),  # type: ignore[arg-type]
        lambda victims: None,
        block_size=4,
    )


def publish(p: BlockPool, blocks: list[Block]) -> None:
    for block in blocks:
        block.key = block.index
        p.store([block])


@pytest.mark.parametrize("allocator", servable("allocator"))
@pytest.mark.parametrize("eviction", servable("eviction"))
def test_cached_blocks_make_way_one_by_one(allocator: str, eviction: str) -> None:
    p = pool(6, allocator, eviction)
    taken = p.take(6)
    assert taken is not None
    publish(p, taken)
    p.drop(taken[::-1], 1)
    assert (p.num_free, p.num_in_use, p.num_cached) == (0, 0, 6)
    for n in range(1, 4):
        assert p.take(1) is not None
        assert (p.num_free, p.num_in_use, p.num_cached) == (0, n, 6 - n)


def test_a_run_is_made_by_evicting_as_little_as_needed() -> None:
    """Three free blocks apart from each other: a contiguous allocator needs victims although enough are free."""
    p = pool(6, "first-fit")
    taken = p.take(6)
    assert taken is not None
    publish(p, [taken[1], taken[3], taken[5]])
    p.drop(taken, 1)
    assert (p.num_free, p.num_cached) == (3, 3)
    run = p.take(2, contiguous=True)
    assert run is not None
    assert run[1].index == run[0].index + 1
    assert p.num_cached == 2


def test_a_run_that_cannot_be_costs_nobody_a_block() -> None:
    """Enough blocks are free or cached, but none of them adjacent: a refusal evicts nobody."""
    p = pool(6, "first-fit")
    taken = p.take(6)
    assert taken is not None
    publish(p, [taken[1], taken[3]])
    p.drop([taken[1], taken[3], taken[5]], 1)
    assert p.take(2, contiguous=True) is None
    assert (p.num_free, p.num_cached) == (1, 2)
    assert p.take(2) is not None
    assert (p.num_free, p.num_cached) == (0, 1)


def test_a_run_is_not_made_of_what_is_protected() -> None:
    """Enough is free, in pieces; what was released first lies between them and is protected."""
    p = pool(6, "first-fit")
    taken = p.take(6)
    assert taken is not None
    publish(p, [taken[1], taken[4]])
    p.drop([taken[1]], 1)
    p.drop([taken[i] for i in (0, 2, 3, 4)], 2)
    assert p.take(2) is not None
    p.drop([taken[5]], 3)
    run = p.take(2, [taken[1]], contiguous=True)
    assert run == [taken[4], taken[5]]
    assert taken[1].key is not None
    assert p.take(3, [taken[1]], contiguous=True) is None


def test_protecting_what_is_in_use_costs_no_room() -> None:
    p = pool(6)
    taken = p.take(4)
    assert taken is not None
    publish(p, taken)
    p.drop(taken[2:], 1)
    assert p.has_room(3, taken[:2])
    assert p.has_room(3, taken[:3])
    assert not p.has_room(4, taken[:3])
    assert p.take(3, taken[:3]) is not None
    assert taken[2].key is not None


def test_pieces_continue_where_a_sequence_ends() -> None:
    """No run is long enough, and none is insisted on: the first piece is the block after the last."""
    p = pool(6, "first-fit")
    taken = p.take(6)
    assert taken is not None
    p.drop([taken[0], taken[2], taken[4]], 1)
    assert p.take(1, after=taken[3].index) == [taken[4]]
    p.drop([taken[4]], 1)
    pieces = p.take(2, after=taken[3].index)
    assert pieces is not None
    assert pieces[0] == taken[4]
    pieces = p.take(1, after=taken[1].index)
    assert pieces == [taken[2]]


class TakesWhatIsProtected(FIFO):
    """Looks away."""

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return super().victims(n)


class NamesOneTwice(FIFO):
    """Counts what it says, not what that is."""

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return n * super().victims(1, protected)


class PromisesMore(Quota):
    """Says that there is more to be had than it gives."""

    def obtainable(self, origin: Origin, protected: Collection[Block] = ()) -> int:
        return 9

    def victims_for(
        self, origin: Origin, n: int, free: int, protected: Collection[Block] = ()
    ) -> list[Block] | None:
        return None if self.shares else super().victims_for(origin, min(n, 1), free, protected)


@pytest.mark.parametrize(
    ("eviction", "says"),
    [
        (TakesWhatIsProtected(), "<block .* which it must not"),
        (NamesOneTwice(), "1 victims of 2, though 3 blocks are cached"),
        (PromisesMore(shares="a=0.5", reserved=True), "0 victims of 2"),
        (PromisesMore(), "1 victims of 2"),
    ],
)
def test_a_policy_that_gives_up_the_wrong_blocks_is_named(eviction: Any, says: str) -> None:
    p = BlockPool(3, make("allocator", "fifo"), eviction, lambda victims: None, block_size=4)  # type: ignore[arg-type]
    taken = p.take(3)
    assert taken is not None
    publish(p, taken)
    p.drop(taken, 1)
    with pytest.raises(PolicyError, match=f"{type(eviction).__name__} named {says}") as caught:
        p.take(2, taken[:1], origin=Origin(salt="a"))
    assert "\n" not in str(caught.value)


# ---- shares of a pool --------------------------------------------------------------------------------------------


def share_walk(seed: int, allocator: str) -> None:
    """Two tenants and others take, publish and drop blocks of a pool that is divided among them."""
    pick = Random(seed)
    quota = Quota(shares=pick.choice(("a=0.3,b=0.3", "a=0.5,b=0.5", "b=0.6")), reserved=pick.random() < 0.7)
    p = BlockPool(12, make("allocator", allocator), quota, lambda victims: None, block_size=1)  # type: ignore[arg-type]
    share = {tenant: quota.stats().get(tenant or "others", {}).get("share", 0) for tenant in ("a", "b", None)}
    holders: list[tuple[str | None, list[Block]]] = []
    keys = iter(range(10_000))

    def of(tenant: str | None) -> list[Block]:
        """Findable blocks that count for a tenant's share."""
        named = quota.stats()
        whose = [b.salt if b.salt in named else None for b in p.blocks]
        return [b for b, owner in zip(p.blocks, whose) if owner == tenant and b.key is not None]

    for _ in range(50):
        what = pick.choice(("take", "take", "take", "drop", "drop", "share"))
        if what == "drop" and holders:
            p.drop(holders.pop(pick.randrange(len(holders)))[1], 0)
        elif what == "share" and any(b.key is not None for b in p.blocks):
            block = pick.choice([b for b in p.blocks if b.key is not None])
            quota.hit(block)
            p.share([block])
            holders.append((None, [block]))
        if what != "take":
            continue
        tenant, n, contiguous = pick.choice(("a", "b", None)), pick.randint(1, 5), pick.random() < 0.5
        findable = [b for b in p.blocks if b.key is not None]
        protected = pick.sample(findable, pick.randint(0, min(2, len(findable))))
        before = {t: of(t) for t in share}
        counts = p.num_free, p.num_cached
        room = p.has_room(n, protected, contiguous=contiguous, origin=Origin(salt=tenant))
        taken = p.take(n, protected, contiguous=contiguous, origin=Origin(salt=tenant))
        assert room == (taken is not None), "has_room() and take() disagree"
        assert all(b.key is not None for b in protected), "what is protected was given up"
        if taken is None:
            assert ({t: of(t) for t in share}, p.num_free, p.num_cached) == (before, *counts), (
                "a refusal left a trace"
            )
            continue
        assert len(set(taken)) == n
        if contiguous and p.allocator.contiguous:
            assert [b.index for b in taken] == list(range(taken[0].index, taken[0].index + n))
        for other in before:
            lost = len(before[other]) - len(of(other))
            if quota.reserved and other != (tenant if tenant in quota.stats() else None):
                assert lost <= max(0, len(before[other]) - share[other]), "taken from a reserved share"
        for block in pick.sample(taken, pick.randint(0, n)):
            block.key, block.origin = next(keys), Origin(salt=tenant)
            p.store([block])
        holders.append((tenant, taken))
        p.check()
    for _, blocks in holders:
        p.drop(blocks, 0)
    assert p.num_in_use == 0


@pytest.mark.parametrize("allocator", servable("allocator"))
def test_any_use_of_a_pool_with_shares(allocator: str) -> None:
    for seed in range(60):
        share_walk(seed, allocator)


def test_a_count_that_is_wrong_is_noticed() -> None:
    p = pool()
    taken = p.take(2)
    assert taken is not None
    p.check()
    taken[0].ref_count = 0
    with pytest.raises(InvariantBroken, match="free"):
        p.check()
    taken[0].ref_count = 1
    taken[1].key = 5
    taken[1].ref_count = 0
    with pytest.raises(InvariantBroken, match="cached"):
        p.check()
