"""Slot `eviction`: legal victims, all or nothing, whatever the policy's taste (law 2)."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scenario, Spy, examples, policies, servable, serve

from pagedlab.config import Config
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.policies import Block, Eviction
from pagedlab.registry import lookup_class, make


class Tier:
    """A pool reduced to what an eviction policy can see of it."""

    def __init__(self, policy: Any, capacity: int) -> None:
        self.policy = policy
        self.spy = Spy(inner=policy)
        self.spy.reset(capacity=capacity)
        self.capacity = capacity
        self.cached: dict[int, Block] = {}
        self.spare = [Block(i) for i in reversed(range(capacity))]
        self.time = 0
        self.born = 0
        self.evicted: list[int] = []

    def access(self, key: int) -> bool:
        """One request of one block, in use no longer than the access; False if nothing could make way."""
        self.time += 1
        block = self.cached.get(key)
        if block is not None:
            block.hits += 1
            self.spy.hit(block)
            block.ref_count = 1
        else:
            self.spy.miss(key)
            if not self.spare and not self.evict(1):
                return False
            block = self.spare.pop()
            self.born += 1
            block.key, block.ref_count, block.hits = key, 1, 0
            block.born, block.created, block.fill = self.born, self.time, 1
            block.depth = key % 5
            self.cached[key] = block
            self.spy.insert(block)
        self.let_go(block)
        return True

    def let_go(self, block: Block) -> None:
        block.ref_count = 0
        block.last_released = self.time
        self.spy.release(block)

    def evict(self, n: int, protected: Any = ()) -> list[Block]:
        victims = self.spy.victims(n, protected)
        for block in victims:
            self.spy.remove(block)
            assert block.key is not None
            self.evicted.append(block.key)
            del self.cached[block.key]
            block.key = None
            self.spare.append(block)
        return victims


@pytest.mark.parametrize("name", servable("eviction"))
@settings(max_examples=examples(0.6))
@given(data=st.data(), capacity=st.integers(1, 8), keys=st.lists(st.integers(0, 12), max_size=80))
def test_any_policy_serves_any_stream(name: str, data: st.DataObject, capacity: int, keys: list[int]) -> None:
    tier = Tier(data.draw(policies("eviction", (name,))), capacity)
    for key in keys:
        assert tier.access(key), "a full tier of released blocks has a victim"
        assert len(tier.cached) <= capacity
    n = data.draw(st.integers(0, capacity + 2))
    protected = set(data.draw(st.lists(st.sampled_from(sorted(tier.cached) or [0]))))
    held = [tier.cached[k] for k in protected if k in tier.cached]
    if n:
        victims = tier.evict(n, held)
        assert len(victims) == (n if n <= len(tier.spy.released) + len(victims) - len(held) else 0)


@pytest.mark.parametrize("name", servable("eviction"))
def test_the_same_stream_makes_the_same_decisions(name: str) -> None:
    """In one process, with other addresses in memory; and from a clone, which starts empty."""
    runs = []
    policy = make("eviction", name)
    for round_ in range(3):
        tier = Tier(policy if round_ == 0 else policy.clone(), 5)
        ballast = [object() for _ in range(1000 * round_)]
        for i in range(400):
            tier.access((i * i + i // 7) % 17)
        runs.append(tier.evicted)
        del ballast
        gc.collect()
    assert runs[0]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("name", servable("eviction"))
def test_reset_forgets_the_last_run(name: str) -> None:
    policy = make("eviction", name)
    first, again = Tier(policy, 4), None
    for i in range(60):
        first.access((i * 7) % 11)
    again = Tier(policy, 4)
    assert again.spy.victims(1) == []
    for i in range(60):
        again.access((i * 7) % 11)
    assert again.evicted == first.evicted


@pytest.mark.parametrize("name", servable("eviction"))
def test_inner_state_is_bounded(name: str) -> None:
    """Ghost lists may remember what is gone, but not without end: memory grows with the tier, not with the stream."""

    def size(policy: Any) -> int:
        seen: set[int] = set()

        def count(value: Any) -> int:
            if id(value) in seen or isinstance(value, Block):
                return 0
            seen.add(id(value))
            if isinstance(value, dict):
                return len(value) + sum(count(v) for v in value.values())
            if hasattr(value, "__len__") and hasattr(value, "__iter__") and not isinstance(value, str):
                return len(value) + sum(count(v) for v in value)
            return count(vars(value)) if hasattr(value, "__dict__") else 0

        return count(vars(policy))

    policy = make("eviction", name)
    tier = Tier(policy, 8)
    sizes = []
    for i in range(6000):
        tier.access(i * 31 % 5000 if i % 3 else i % 4)
        if i in (1999, 5999):
            sizes.append(size(policy))
    assert sizes[1] <= 2 * sizes[0] + 512


@pytest.mark.parametrize("name", servable("eviction"))
def test_a_block_in_use_is_never_named(name: str) -> None:
    policy = make("eviction", name)
    tier = Tier(policy, 4)
    for key in range(4):
        tier.access(key)
    held = tier.cached[2]
    tier.spy.hit(held)
    held.ref_count = 1
    assert tier.spy.victims(4) == []
    assert held not in tier.spy.victims(3)
    tier.let_go(held)
    assert len(tier.spy.victims(4)) == 4


@pytest.mark.parametrize("name", servable("eviction"))
def test_a_block_may_be_removed_by_others(name: str) -> None:
    """A displaced or forgotten block goes without having been a victim, released or in use."""
    tier = Tier(make("eviction", name), 4)
    for key in range(4):
        tier.access(key)
    for key, used in ((1, False), (3, True)):
        block = tier.cached.pop(key)
        if used:
            tier.spy.hit(block)
            block.ref_count = 1
        tier.spy.remove(block)
        block.key = None
    assert len(tier.spy.victims(2)) == 2
    assert tier.spy.victims(3) == []


def misses(policy: Any, capacity: int, keys: list[int]) -> int:
    tier = Tier(policy, capacity)
    for key in keys:
        tier.access(key)
    return Counter(what for what, _ in tier.spy.log)["miss"]


@settings(max_examples=examples(1.0))
@given(capacity=st.integers(1, 8), keys=st.lists(st.integers(0, 12), max_size=80))
def test_lru_is_the_textbooks(capacity: int, keys: list[int]) -> None:
    stack: list[int] = []
    expected = 0
    for key in keys:
        if key in stack:
            stack.remove(key)
        else:
            expected += 1
            if len(stack) == capacity:
                stack.pop(0)
        stack.append(key)
    assert misses(make("eviction", "lru"), capacity, keys) == expected


@settings(max_examples=examples(1.0))
@given(capacity=st.integers(1, 8), keys=st.lists(st.integers(0, 12), max_size=80))
def test_fifo_is_the_textbooks(capacity: int, keys: list[int]) -> None:
    queue: list[int] = []
    expected = 0
    for key in keys:
        if key not in queue:
            expected += 1
            if len(queue) == capacity:
                queue.pop(0)
            queue.append(key)
    assert misses(make("eviction", "fifo"), capacity, keys) == expected


class OldestFirst(Eviction):
    """FIFO by a heap: slower, and nothing can go wrong."""

    def priority(self, block: Block) -> float:
        return block.born


@settings(max_examples=examples(2.0))
@given(data=st.data(), steps=st.lists(st.integers(0, 5), max_size=60))
def test_fifo_keeps_its_order_around_blocks_in_use(data: st.DataObject, steps: list[int]) -> None:
    """Blocks stay in use for long, several victims go at once, some are protected, some are removed by others."""
    tiers = [Tier(make("eviction", "fifo"), 6), Tier(OldestFirst(), 6)]
    held: set[int] = set()

    def on(tier: Tier, what: int, key: int, n: int, protected: list[int]) -> Any:
        block = tier.cached.get(key)
        if what == 0 and tier.spare and block is None:
            tier.access(key)
        elif what == 1 and block is not None and key not in held:
            tier.spy.hit(block)
            block.ref_count = 1
        elif what == 2 and key in held:
            tier.let_go(tier.cached[key])
        elif what == 3:
            return [b.key for b in tier.evict(n, [tier.cached[k] for k in protected if k in tier.cached])]
        elif what == 4 and tier.spy.released:
            gone = tier.policy.evict()
            assert gone.key is not None
            tier.spy.released.discard(gone)
            del tier.cached[gone.key]
            tier.spare.append(gone)
            return gone.key
        elif what == 5 and block is not None:
            tier.spy.remove(block)
            del tier.cached[key]
            tier.spare.append(block)
        return None

    for what in steps:
        key, n = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 4))
        protected = data.draw(st.lists(st.integers(0, 8), max_size=3))
        known = key in tiers[0].cached
        one, other = (on(tier, what, key, n, protected) for tier in tiers)
        assert one == other
        assert tiers[0].cached.keys() == tiers[1].cached.keys()
        if what == 1 and known:
            held.add(key)
        elif what in (2, 5):
            held.discard(key)


@settings(max_examples=examples(1.0))
@given(capacity=st.integers(1, 8), keys=st.lists(st.integers(0, 12), max_size=80))
def test_lfu_is_the_textbooks(capacity: int, keys: list[int]) -> None:
    """Hits count since the block was stored; among equals the one stored first goes."""
    cached: dict[int, list[int]] = {}
    expected = stored = 0
    for key in keys:
        if key in cached:
            cached[key][0] += 1
            continue
        expected += 1
        if len(cached) == capacity:
            del cached[min(cached, key=lambda k: cached[k])]
        stored += 1
        cached[key] = [0, stored]
    assert misses(make("eviction", "lfu"), capacity, keys) == expected


def test_lfu_keeps_what_is_used_often() -> None:
    """Hits must really count: a scan may not push out what is asked for all the time."""
    tier = Tier(make("eviction", "lfu"), 3)
    for _ in range(5):
        tier.access(0)
    for key in range(1, 20):
        tier.access(key)
    assert 0 in tier.cached


class ByAge(Eviction):
    """Dynamic: the score of everything changes with every access."""

    dynamic = True

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self.accesses = 0

    def miss(self, key: Any, readmitted: bool = False) -> None:
        self.accesses += 1

    def priority(self, block: Block) -> float:
        return (block.born * (self.accesses + 3)) % 7


class BackToFront(Eviction):
    """Simple, with ties: all blocks are worth the same, so the order of release decides."""

    def priority(self, block: Block) -> float:
        return 0.0


@settings(max_examples=examples(1.0))
@given(capacity=st.integers(1, 8), keys=st.lists(st.integers(0, 12), max_size=80))
def test_simple_policies_keep_the_protocol(capacity: int, keys: list[int]) -> None:
    for policy in (ByAge(), BackToFront()):
        tier = Tier(policy, capacity)
        for key in keys:
            assert tier.access(key)


def test_ties_go_in_the_order_of_release() -> None:
    tier = Tier(BackToFront(), 4)
    for key in (3, 1, 2, 0, 3):
        tier.access(key)
    assert [b.key for b in tier.spy.victims(4)] == [1, 2, 0, 3]


@pytest.mark.parametrize("name", servable("eviction"))
def test_evict_names_and_removes(name: str) -> None:
    """The short form does what the long one does."""
    policy = make("eviction", name)
    tier = Tier(policy, 5)
    assert policy.evict() is None  # type: ignore[attr-defined]
    for i in range(200):
        tier.access((i * i + i // 7) % 17)
    while tier.cached:
        (expected,) = tier.policy.victims(1)
        block = tier.policy.evict()
        assert block is expected
        assert block not in tier.policy.victims(len(tier.cached) - 1)
        del tier.cached[block.key]
    assert tier.policy.evict() is None


@pytest.mark.parametrize("name", servable("eviction"))
@settings(max_examples=examples(0.5))
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from((1, 1, 1, 2, 3, 6))), min_size=20, max_size=60
    )
)
def test_short_cuts_do_what_they_stand_for(name: str, steps: list[tuple[int, int]]) -> None:
    """The same requests, told to one policy block by block and to its clone many at once."""
    plain, quick = (Batches(make("eviction", name), 12, many) for many in (False, True))
    for kind, n in steps:
        assert plain.step(kind, n) == quick.step(kind, n)
    assert plain.drain() == quick.drain()


class Batches:
    """Blocks stored, used, let go and given up in batches; says by number which were given up."""

    def __init__(self, policy: Any, capacity: int, many: bool) -> None:
        self.policy, self.many = policy, many
        policy.reset(capacity=capacity)
        self.spare = [Block(i, size=1) for i in range(capacity)]
        self.idle: list[Block] = []
        self.used: list[Block] = []
        self.time = 0

    def step(self, kind: int, n: int) -> list[int]:
        self.time += 1
        if kind == 0:
            return [b.index for b in self.evict(min(n, len(self.idle)))]
        if kind == 1:
            for block in self.spare[:n]:
                block.key = block.born = self.time * 100 + block.index
                block.created, block.ref_count, block.hits = self.time, 1, 0
                self.policy.miss(block.key)
                self.policy.insert(block)
            self.used += self.spare[:n]
            del self.spare[:n]
        elif kind == 2:
            chosen = self.idle[::2][:n]
            for block in chosen:
                block.hits += 1
            self.tell("hit", chosen)
            for block in chosen:
                block.ref_count = 1
                self.idle.remove(block)
            self.used += chosen
        else:
            chosen = self.used[-n:]
            for block in chosen:
                block.ref_count, block.last_released = 0, self.time
            self.tell("release", chosen)
            self.used = self.used[:-n]
            self.idle += chosen
        return []

    def tell(self, what: str, blocks: list[Block]) -> None:
        if self.many:
            getattr(self.policy, f"{what}_all")(blocks)
        else:
            for block in blocks:
                getattr(self.policy, what)(block)

    def evict(self, n: int) -> list[Block]:
        if self.many and n == 1:
            victims = [self.policy.evict()]
        else:
            victims = self.policy.victims(n)
            self.tell("remove", victims)
        for block in victims:
            self.idle.remove(block)
            block.key = None
        self.spare += victims
        return victims

    def drain(self) -> list[int]:
        self.step(3, len(self.used) or 1)
        return [b.index for b in self.evict(len(self.idle))]


def test_evict_follows_from_what_a_subclass_changes() -> None:
    class Newest(make("eviction", "lru").__class__):  # type: ignore[misc]
        def victims(self, n: int, protected: Any = ()) -> list[Block]:
            order = [b for b in reversed([*self.order()]) if b not in protected]
            return order[:n] if len(order) >= n else []

    removed: list[Any] = []

    class Watching:
        def remove(self, block: Block) -> None:
            removed.append(block.key)
            super().remove(block)  # type: ignore[misc]

    class Both(Watching, lookup_class("eviction", "fifo")):  # type: ignore[misc]
        pass

    tier = Tier(Newest(), 3)
    for key in (1, 2, 3):
        tier.access(key)
    assert tier.policy.evict().key == 3
    assert tier.policy.evict().key == 2
    tier = Tier(Both(), 3)
    for key in (1, 2, 3):
        tier.access(key)
    assert tier.policy.evict().key == 1
    assert removed == [1]


def test_a_policy_without_a_rule_says_so() -> None:
    class Empty(Eviction):
        pass

    tier = Tier(Empty(), 2)
    with pytest.raises(NotImplementedError, match="Empty defines neither"):
        tier.access(1)


def test_hits_are_counted_where_policies_read_them() -> None:
    """Five requests of one prompt, one after the other: its blocks are hit by all but the first."""
    requests = [
        Request(
            request_id=str(i), prompt=[1, 2, 3, 4, 5], arrival=20.0 * i, sampling=SamplingParams(max_tokens=2)
        )
        for i in range(5)
    ]
    engine = serve(Scenario(Config(num_blocks=8, block_size=2, max_model_len=8), requests))
    cached = [b for b in engine.cache.device.blocks if b.key is not None and b.depth < 4]
    assert [b.hits for b in cached] == [4, 4]


def test_builtin_names_are_there() -> None:
    assert {"lru", "fifo", "lfu"} <= set(servable("eviction"))
    for name in servable("eviction"):
        assert (lookup_class("eviction", name).__doc__ or "").strip()
