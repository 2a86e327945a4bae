"""Eviction policies that know they cache prefixes: each does what its paper says, where LRU does not."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from math import inf, log
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Spy, examples

import pagedlab as pl
from pagedlab import events as ev
from pagedlab.cache.replay import ReplayView, Wanted, prefix
from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.errors import ConfigError
from pagedlab.policies.block import Block, Origin
from pagedlab.policies.eviction import Eviction
from pagedlab.registry import lookup_class, make

SECOND = 10**12
NAMES = (
    "leaf-first",
    "t-lru",
    "marconi",
    "pensieve",
    "asym-cache",
    "workload-aware",
    "ttl",
    "queue-aware",
    "kvflow",
    "returning",
)


class World(ReplayView):
    """A view whose clock and queue the test sets."""

    def __init__(self, flops_per_pair: float = 0.0) -> None:
        super().__init__(1.0, flops_per_pair)
        self.queue: list[list[int]] = []
        self.looks = 0

    @property
    def queue_state(self) -> Any:
        return tuple(map(tuple, self.queue)) or None

    def coming(self, n: int) -> Iterator[Sequence[int]]:
        self.looks += 1
        return iter(self.queue[:n])


class Tier:
    """A pool that holds prefixes: a request is a path of keys, in use from `begin` to `end`."""

    def __init__(self, policy: Any, capacity: int, *, block_size: int = 10, pair: float = 0.0) -> None:
        self.view = World(pair)
        policy.attach(self.view)
        self.policy = policy
        self.spy = Spy(inner=policy)
        self.spy.reset(capacity=capacity)
        self.cached: dict[int, Block] = {}
        self.spare = [Block(i, size=block_size) for i in reversed(range(capacity))]
        self.size = block_size
        self.born = self.clock = 0
        self.numbers: dict[Block, int] = {}
        """Number of the release of each released block."""
        self.steps: dict[str | None, int] = {}
        """The latest step of each session that has cached blocks of any step."""

    def begin(self, keys: Sequence[int], *, at: float | None = None, **origin: Any) -> list[Block] | None:
        """Admit a request; None if there is no room."""
        if at is not None:
            self.view.time = round(at * SECOND)
        held = []
        for key in keys:
            if key not in self.cached:
                break
            held.append(self.cached[key])
        if len(keys) - len(held) > len(self.spare) + len(self.numbers.keys() - set(held)):
            return None
        self.found = len(held)
        for block in held:
            block.hits += block.ref_count == 0
            self.spy.hit(block)
            block.ref_count += 1
            self.numbers.pop(block, None)
        for key in keys[self.found :]:
            self.spy.miss(key)
        short = len(keys) - self.found - len(self.spare)
        if short > 0:
            self.evict(short)
        for i, key in enumerate(keys[self.found :], self.found):
            if key in self.cached:
                self.forget(self.cached[key])
            block = self.spare.pop()
            self.born += 1
            block.key, block.parent_key = key, keys[i - 1] if i else None
            block.depth, block.origin = i * self.size, Origin(**origin)
            block.born, block.hits, block.ref_count, block.created = self.born, 0, 1, self.view.now
            self.cached[key] = block
            step = block.origin.agent_step
            if step is not None:
                self.steps[block.session] = max(step, self.steps.get(block.session, step))
            self.spy.insert(block)
            held.append(block)
        return held

    def end(self, held: list[Block]) -> None:
        for block in reversed(held):
            block.ref_count -= 1
            if not block.ref_count:
                self.clock += 1
                self.numbers[block] = self.clock
                block.last_released = self.view.now
                self.spy.release(block)

    def copy(self, parent: Block, turn: int) -> None:
        """Store one block behind a released one, as copies reach the host tier."""
        key = parent.key * 3 + turn
        if key in self.cached or parent not in self.numbers:
            return
        block = self.spare.pop()
        self.born += 1
        block.key, block.parent_key, block.depth = key, parent.key, parent.depth + self.size
        block.origin, block.born, block.hits, block.ref_count = Origin(), self.born, 0, 1
        self.cached[key] = block
        self.spy.insert(block)
        self.end([block])

    def ask(self, *keys: int, at: float | None = None, **origin: Any) -> int:
        """A whole request; returns how many blocks it found."""
        held = self.begin(keys, at=at, **origin)
        assert held is not None
        self.end(held)
        return self.found

    def forget(self, block: Block) -> None:
        self.spy.remove(block)
        self.numbers.pop(block, None)
        del self.cached[block.key]
        block.key = None
        self.spare.append(block)
        if all(b.session != block.session or b.origin.agent_step is None for b in self.cached.values()):
            self.steps.pop(block.session, None)

    def evict(self, n: int) -> list[int]:
        victims = self.spy.victims(n)
        keys = [block.key for block in victims]
        for block in victims:
            self.forget(block)
        return keys

    def order(self, n: int | None = None, protected: Sequence[int] = ()) -> list[int]:
        """Keys in the order in which the blocks would go."""
        chosen = self.spy.victims(n or len(self.numbers), [self.cached[key] for key in protected])
        self.spy.due.clear()
        return [block.key for block in chosen]


# ---- what each is for ----------------------------------------------------------------------------------------------


def test_leaf_first_keeps_parents_that_the_inner_policy_would_give_up() -> None:
    inner, tier = Tier(make("eviction", "fifo"), 6), Tier(make("eviction", "leaf-first", inner="fifo"), 6)
    for t in (inner, tier):
        t.ask(1, 2, 3)
        t.ask(1, 4)
    assert inner.order() == [1, 2, 3, 4]
    assert tier.order() == [3, 2, 4, 1]
    assert tier.order(2, protected=[3]) == [4, 1], "a protected child guards 2"


def test_leaf_first_gives_way_where_a_protected_child_guards_all() -> None:
    tier = Tier(make("eviction", "leaf-first"), 3)
    tier.ask(1, 2, 3)
    assert tier.order(2, protected=[3]) == [2, 1]


@pytest.mark.parametrize("inner", ["slru", "s3-fifo", "lirs", "w-tinylfu", "lhd"])
def test_leaf_first_tells_the_inner_policy_all(inner: str) -> None:
    tier = Tier(make("eviction", "leaf-first", inner=inner), 6)
    for i in range(40):
        tier.ask(*[(1, 2, 3), (1, 4), (5, 6, 7), (1, 2, 8)][i * i % 7 % 4])
        kept = list(tier.cached)
        for n, key in enumerate(order := tier.order()):
            assert not {k for k in kept if tier.cached[k].parent_key == key} - {*order[:n]}


def test_leaf_first_refuses_what_cannot_serve() -> None:
    with pytest.raises(ConfigError, match="needs the future"):
        make("eviction", "leaf-first", inner="belady")
    with pytest.raises(ConfigError, match="lru"):
        make("eviction", "leaf-first", inner="lrux")


def test_t_lru_takes_the_tail_that_the_next_turn_can_afford() -> None:
    """Two conversations of 60 tokens; 30 may be computed in time, 10 of them are new: 20 of each are free to go."""
    tier = Tier(make("eviction", "t-lru", threshold=30, next_prompt=10), 12)
    tier.ask(1, 2, 3, 4, 5, 6)
    tier.ask(11, 12, 13, 14, 15, 16)
    assert tier.order() == [6, 5, 16, 15, 4, 3, 2, 1, 14, 13, 12, 11]
    assert tier.order(5) == [6, 5, 16, 15, 4]


def test_t_lru_knows_that_a_shared_beginning_serves_a_longer_conversation() -> None:
    tier = Tier(make("eviction", "t-lru", threshold=30, next_prompt=10), 12)
    tier.ask(1, 2)
    assert tier.order() == [2, 1]
    tier.ask(1, 2, 3, 4, 5)
    tier.ask(21, 22)
    assert tier.order() == [5, 4, 22, 21, 3, 2, 1]


def test_pensieve_keeps_what_is_dear_to_compute() -> None:
    tier = Tier(make("eviction", "pensieve"), 12, pair=1.0)
    tier.ask(1, 2, 3, 4, 5, 6, at=0)
    tier.ask(11, at=1)
    tier.view.time = 2 * SECOND
    assert tier.order(1) == [11], "half the wait, a tenth of the work"
    assert tier.order(7)[-1] == 1
    tier.view.time = 10**4 * SECOND
    tier.ask(21, at=10**4 - 1)
    assert tier.order(1) == [11]


def test_a_leaf_that_had_a_child_for_a_while_counts_once() -> None:
    """As copies come and go in the host tier, behind blocks that nobody uses."""
    tier = Tier(make("eviction", "pensieve"), 8)
    tier.ask(1, at=0)
    for time, turn in enumerate((1, 2), 1):
        tier.view.time = time * SECOND
        tier.copy(tier.cached[1], turn)
    tier.copy(tier.cached[4], 1)
    tier.forget(tier.cached[13])
    tier.view.time = 9 * SECOND
    assert tier.order() == [4, 5, 1]


def test_asym_cache_weighs_cost_by_the_chance_of_reuse() -> None:
    for decay in ("exponential", "hyperbolic"):
        tier = Tier(make("eviction", "asym-cache", decay=decay, lifetime=10.0), 12, pair=1.0)
        tier.ask(1, 2, 3, 4, 5, 6, at=0)
        tier.ask(11, at=5)
        assert tier.order(1) == [11], "cheap, though young"
        tier.view.time = 200 * SECOND
        tier.ask(11, at=200)
        assert tier.order(1) == [6], "by now nobody will come back for it"


def test_asym_cache_forgets_by_the_decay_that_was_asked_for() -> None:
    """Six lifetimes ago somebody used what costs much more: a hyperbola still keeps it, an exponential does not."""
    first = {}
    for decay in ("exponential", "hyperbolic"):
        tier = Tier(make("eviction", "asym-cache", decay=decay, lifetime=1.0), 12, pair=1.0)
        tier.ask(*range(1, 11), at=0)
        tier.ask(21, at=6)
        first[decay] = tier.order(1)
    assert first == {"exponential": [10], "hyperbolic": [21]}


def test_pgdsf_counts_uses_and_context_and_ages_by_what_went() -> None:
    tier = Tier(make("eviction", "pgdsf", attention=100.0), 12)
    tier.ask(1, 2, 3, 4)
    tier.ask(11)
    tier.ask(11)
    # A token costs 1 + 0.1 for each before it: 4.5 deep in the first prompt, 1.5 in the second, which was used twice.
    assert tier.order() == [11, 4, 3, 2, 1]
    assert tier.policy.stats() == {"age": 0.0}
    tier.forget(tier.cached[1])
    assert tier.policy.stats() == {"age": 0.0}, "nobody gave up 1, which is no leaf"
    tier.evict(1)
    assert tier.policy.stats() == {"age": 3.0}
    tier.ask(31)
    tier.evict(1)
    assert tier.policy.stats() == {"age": 4.5}, (
        "the new one's age counts on top: 3 + 1.5, released before the deep one"
    )


def test_marconi_weighs_recency_against_flops_per_byte() -> None:
    def tier(alpha: float, pair: float = 1.0) -> Tier:
        t = Tier(make("eviction", "marconi", alpha=alpha), 12, pair=pair)
        t.ask(1, 2, 3, 4, 5, 6, at=0)
        t.ask(11, at=1)
        t.ask(21, 22, at=2)
        t.view.time = 4 * SECOND
        return t

    assert tier(0.0).order() == [6, 5, 4, 3, 2, 1, 11, 22, 21], "LRU"
    assert tier(1.0).order(1) == [11]
    assert tier(1.0).order(3) == [11, 22, 21]
    assert tier(1.0, 0.001).order(3) == [11, 22, 21], "efficiency counts by its range, however narrow that is"


def test_workload_aware_gives_up_the_class_that_does_not_return() -> None:
    tier = Tier(make("eviction", "workload-aware"), 40)
    for turn in range(10):
        tier.ask(1, 2, at=10 * turn, request_class="chat")
        tier.ask(100 + turn, at=10 * turn + 1, request_class="api")
    tier.view.time = 99 * SECOND
    assert tier.order(10) == list(range(100, 110)), "though chat was released before the last of them"


def test_workload_aware_compares_how_fast_classes_return() -> None:
    """One class returns after a second or never, the other after a minute."""
    tier = Tier(make("eviction", "workload-aware"), 40)
    for i in range(20):
        tier.ask(1, at=60 * i, request_class="slow")
        tier.ask(2, at=60 * i + 1, request_class="fast")
        tier.ask(2, at=60 * i + 2, request_class="fast")
        if i % 2:
            tier.ask(200 + i, at=60 * i + 3, request_class="fast")
    tier.view.time += 30 * SECOND
    assert tier.order(11) == [201, 203, 205, 207, 209, 211, 213, 215, 217, 2, 219]


def test_workload_aware_compares_how_often_classes_return() -> None:
    """Both return after ten seconds; of one class each block does, of the other one in five."""
    tier = Tier(make("eviction", "workload-aware"), 80)
    for i in range(40):
        tier.ask(1000 + i // 2, at=10 * i, request_class="often")
        tier.ask(2000 + (i if i % 5 else i - 1), at=10 * i + 1, request_class="seldom")
    tier.ask(3000, at=405, request_class="often")
    tier.ask(3001, at=408, request_class="seldom")
    order = tier.order()
    assert order.index(3001) < order.index(3000)


def test_workload_aware_counts_time_from_the_last_use() -> None:
    """Half of one class returns after a second, a sixth of the other after a minute: at first the one is dearer."""
    tier = Tier(make("eviction", "workload-aware"), 400)
    for i in range(40):
        tier.ask(1000 + i, at=60 * i, request_class="fast")
        tier.ask(1000 + i, at=60 * i + 1, request_class="fast")
        tier.ask(2000 + (i if i % 6 else max(0, i - 1)), at=60 * i + 2, request_class="slow")
    tier.ask(3000, at=3000.0, request_class="fast")
    tier.ask(3001, at=3000.1, request_class="slow")
    order = tier.order()
    assert order.index(3001) < order.index(3000)
    tier.view.time = 3010 * SECOND
    order = tier.order()
    assert order.index(3000) < order.index(3001)


def test_workload_aware_lets_observations_fade_alike() -> None:
    """Halved together, they say the same of waits and of shares as before."""
    tier = Tier(make("eviction", "workload-aware", window=8), 12)
    for i in range(8):
        tier.ask(1, at=3 * i, request_class="loop")
    reuse = tier.policy.stats()["reuse of loop"]
    assert reuse["mean wait (s)"] == pytest.approx(3.0)
    assert reuse["share"] == pytest.approx(7 / 8)


def test_workload_aware_tells_so_many_classes_apart() -> None:
    tier = Tier(make("eviction", "workload-aware", max_classes=2), 40)
    for i, name in enumerate(("a", "b", "c", "d", None)):
        tier.ask(i, request_class=name)
    assert set(tier.policy.stats()) == {f"reuse of {name}" for name in ("a", "b", "all others")}


def test_workload_aware_learns_from_what_it_gave_up_too_early() -> None:
    tier = Tier(make("eviction", "workload-aware"), 2)
    for i in range(30):
        tier.ask(1 + i % 3, at=i, request_class="loop")
    reuse = tier.policy.stats()["reuse of loop"]
    assert reuse["mean wait (s)"] == 3.0
    assert reuse["share"] > 0.8


def test_ttl_keeps_what_somebody_asked_to_keep_as_long_as_asked() -> None:
    tier = Tier(make("eviction", "ttl", classes="system=90, agent=60:30"), 12)
    tier.ask(1, at=0, request_class="agent")
    tier.ask(2, at=1, request_class="system")
    tier.ask(3, at=2)
    tier.ask(4, at=3, retention_priority=10, retention_seconds=5.0)
    tier.ask(5, at=4, request_class="agent", retention_priority=100, retention_seconds=60.0)
    assert tier.order() == [4, 3, 1, 2, 5]
    tier.view.time = 30 * SECOND
    assert tier.order() == [4, 1, 3, 2, 5]
    tier.ask(1, at=40)
    assert tier.order() == [4, 3, 1, 2, 5]
    tier.view.time = 200 * SECOND
    assert tier.order() == [4, 3, 5, 1, 2]


@pytest.mark.parametrize(
    "classes", ["chat", "chat=200", "chat=-1", "=3", "chat=30:x", "chat=3:-1", "chat=nan"]
)
def test_ttl_says_what_is_wrong_with_a_table(classes: str) -> None:
    with pytest.raises(ConfigError, match="class=priority"):
        make("eviction", "ttl", classes=classes)


def test_queue_aware_keeps_what_waiting_requests_will_use() -> None:
    tier = Tier(make("eviction", "queue-aware", window=2), 12)
    for key in (10, 20, 30, 40):
        tier.ask(key, key + 1)
    tier.view.queue = [[10, 11, 99], [30, 31], [40, 41]]
    assert tier.order(6, protected=[21]) == [20, 41, 40, 31, 30, 11]
    assert tier.order() == [21, 20, 41, 40, 31, 30, 11, 10]
    looks = tier.view.looks
    tier.order(3), tier.order(2)
    assert tier.view.looks == looks == 1, "once for each state of the queue"
    tier.view.queue = []
    assert tier.order() == [11, 10, 21, 20, 31, 30, 41, 40]


def test_kvflow_gives_up_the_agent_that_runs_last() -> None:
    """Three agents take turns; at step 3 the first has just run, the second is next."""
    tier = Tier(make("eviction", "kvflow", cycle=3), 12)
    for step, key in enumerate((10, 20, 30)):
        tier.ask(key, session="w", agent_step=step)
    tier.ask(10, 11, session="w", agent_step=3)
    tier.ask(90, session="no workflow")
    assert tier.order() == [90, 11, 10, 30, 20]
    tier.ask(20, 21, session="w", agent_step=4)
    assert tier.order() == [90, 21, 20, 11, 10, 30]


def test_kvflow_believes_what_the_request_says() -> None:
    tier = Tier(make("eviction", "kvflow"), 12)
    tier.ask(10, session="w", agent_step=0, next_step=9)
    tier.ask(20, session="w", agent_step=1, next_step=3)
    tier.ask(30, session="w", agent_step=2, next_step=5)
    assert tier.order() == [10, 30, 20]
    tier.ask(40, session="w", agent_step=4, next_step=6)
    assert tier.order() == [20, 10, 40, 30], "step 3 has passed"
    while tier.numbers:
        tier.evict(1)
    assert not tier.policy._steps


def test_returning_learns_who_comes_back() -> None:
    """Chats come back again and again while single questions pass by; LRU would drown in the questions."""
    found = {}
    for policy in (make("eviction", "lru"), make("eviction", "returning", every=1)):
        tier = Tier(policy, 40)
        for i in range(3000):
            chat = i // 10 % 30
            if i % 10 == 0:
                tier.ask(2 * chat, at=i, request_class="chat")
                found[policy.name] = found.get(policy.name, 0) + tier.found
            tier.ask(1000 + i, at=i, request_class="question")
    assert found["lru"] == 0
    assert found["returning"] > 100
    learned = tier.policy.stats()
    assert learned["returned"] > 10
    assert learned["not returned"] > 100


def test_returning_counts_turns_and_gaps_of_sessions() -> None:
    tier = Tier(make("eviction", "returning"), 12)
    tier.ask(1, 2, at=0, session="s")
    tier.ask(1, 2, 3, at=10, session="s")
    tier.ask(1, at=11, session="t")
    tier.ask(1, 2, 3, 4, at=30, session="s")
    session = tier.policy._sessions["s"]
    assert (session.turns, session.mean_gap) == (3, 15 * SECOND)
    kind = tier.policy.group(tier.cached[4])
    assert (kind.turns, kind.gap, kind.depth) == (2, 4, 5), (
        "logarithms of 1 + 3 turns, 15 seconds and 30 tokens"
    )
    tier.ask(91, at=40)
    assert tier.policy.group(tier.cached[91]).gap is None


def test_returning_tells_so_many_classes_apart() -> None:
    tier = Tier(make("eviction", "returning"), 60)
    numbers = {}
    for i in range(40):
        tier.ask(i, request_class=f"class {i}")
        numbers[i] = tier.policy.group(tier.cached[i]).request_class
    assert [numbers[i] for i in range(32)] == list(range(32))
    assert {numbers[i] for i in range(32, 40)} == {31}, "further ones share the last"
    assert tier.policy.group(tier.cached[3]).request_class == 3


def test_belady_cost_saves_work_where_belady_saves_accesses() -> None:
    """One block has to go: a shallow one that is wanted at once, or a deep one that is wanted a little later."""
    shallow, deep = [1], [11, 12, 13, 14]
    requests = [deep, shallow, [31], shallow, deep]
    hits, saved = {}, {}
    for name in ("belady-tree", "belady-cost"):
        policy, view = make("eviction", name), World(flops_per_pair=5.0)
        policy.attach(view)  # type: ignore[attr-defined]
        policy.reset(capacity=5, future=[key for request in requests for key in request])  # type: ignore[attr-defined]
        (found,) = prefix([Wanted(keys) for keys in requests], policy, 5, block_size=10)  # type: ignore[arg-type]
        hits[name] = found
        saved[name] = sum(view.recompute_flops(_at(i)) for n in found for i in range(n))
    assert hits == {"belady-tree": [0, 0, 0, 1, 3], "belady-cost": [0, 0, 0, 0, 4]}
    assert saved["belady-cost"] > 1.5 * saved["belady-tree"]


def test_belady_cost_is_a_bound() -> None:
    workload = pl.workloads.conversations(hash_block=16)
    assert pl.replay(workload, "belady-cost", 60).is_bound
    with pytest.raises(ConfigError, match="needs the future"):
        pl.simulate(pl.Config(eviction="belady-cost"), workload)


def _at(i: int) -> Block:
    block = Block(0, size=10)
    block.depth = 10 * i
    return block


# ---- against the rule, stated naively --------------------------------------------------------------------------------

Rule = Callable[[Tier], Callable[[Block], Any]]


def _idle(tier: Tier, block: Block) -> int:
    return max(1, tier.view.now - block.last_released)


def _pensieve(tier: Tier) -> Callable[[Block], Any]:
    return lambda b: tier.view.recompute_flops(b) / _idle(tier, b)


def _exponential(tier: Tier) -> Callable[[Block], Any]:
    return lambda b: log(tier.view.recompute_flops(b)) - _idle(tier, b) / (10.0 * SECOND)


def _hyperbolic(tier: Tier) -> Callable[[Block], Any]:
    return lambda b: log(tier.view.recompute_flops(b)) - log(1 + _idle(tier, b) / (10.0 * SECOND))


def _leaves(tier: Tier) -> list[Block]:
    parents = {b.parent_key for b in tier.cached.values()}
    return [b for b in tier.numbers if b.key not in parents]


def _marconi(tier: Tier) -> Callable[[Block], Any]:
    def efficiency(b: Block) -> float:
        return tier.view.recompute_flops(b) / (b.fill * tier.view.bytes_per_token)

    candidates = _leaves(tier)
    low = min(map(efficiency, candidates), default=0)
    high = max(map(efficiency, candidates), default=0)
    oldest = min((b.last_released for b in candidates), default=0)

    def score(b: Block) -> float:
        span = tier.view.now - oldest
        recency = (b.last_released - oldest) / span if span > 0 else 0.0
        return recency + 1.0 * ((efficiency(b) - low) / (high - low) if high > low else 0.0)

    return score


def _ttl(tier: Tier) -> Callable[[Block], Any]:
    def score(b: Block) -> float:
        priority, lasts = {"a": (80, 3.0), "b": (20, 3.0)}.get(b.request_class or "", (35, inf))
        return min(priority, 35) if tier.view.now - b.last_released >= lasts * SECOND else priority

    return score


def _kvflow(tier: Tier) -> Callable[[Block], Any]:
    def score(b: Block) -> float:
        if b.origin.agent_step is None:
            return -inf
        now = tier.steps[b.session]
        steps = b.origin.agent_step + 3
        while steps <= now:
            steps += 3
        return now - steps

    return score


def _t_lru(tier: Tier) -> Callable[[Block], Any]:
    reach = tier.policy._reach
    return lambda b: reach[b.key] - b.depth + 10 > 30


RULES: dict[str, tuple[dict[str, Any], Rule, bool]] = {
    "pensieve": ({}, _pensieve, True),
    "asym-cache": ({"lifetime": 10.0}, _exponential, True),
    "asym-cache hyperbolic": ({"lifetime": 10.0, "decay": "hyperbolic"}, _hyperbolic, True),
    "marconi": ({}, _marconi, True),
    "ttl": ({"classes": "a=80:3, b=20:3"}, _ttl, False),
    "kvflow": ({"cycle": 3}, _kvflow, False),
    "t-lru": ({"threshold": 30, "next_prompt": 10}, _t_lru, False),
    "workload-aware": ({}, lambda tier: lambda b: tier.policy.worth(tier.policy.group(b), b), False),
    "returning": (
        {"every": 1},
        lambda tier: lambda b: tier.policy.worth(tier.policy.group(b), b),
        True,
    ),
    "leaf-first lru": ({"inner": "lru"}, lambda tier: lambda b: 0, True),
    "leaf-first fifo": ({"inner": "fifo"}, lambda tier: lambda b: b.born, True),
    "leaf-first lfu": ({"inner": "lfu"}, lambda tier: lambda b: (b.hits, b.born), True),
}


def naive_victims(tier: Tier, n: int, protected: set[Block], rule: Rule, leaves: bool) -> list[int]:
    """One after the other, the least by score and release among all that may go."""
    score = rule(tier)
    free = [b for b in tier.numbers if b not in protected]
    if len(free) < n:
        return []

    def worth(b: Block) -> Any:
        return score(b), tier.numbers[b]

    chosen: list[Block] = []
    while len(chosen) < n:
        left = [b for b in tier.cached.values() if b not in chosen]
        parents = {b.parent_key for b in left} if leaves else set()
        may = [b for b in free if b not in chosen and b.key not in parents]
        if not may:
            chosen += sorted((b for b in free if b not in chosen), key=worth)[: n - len(chosen)]
            break
        chosen.append(min(may, key=worth))
    return [b.key for b in chosen]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.lists(st.integers(1, 2), min_size=1, max_size=5), st.integers(0, 3)),
        st.tuples(st.just("end"), st.integers(0, 3), st.none()),
        st.tuples(st.just("wait"), st.integers(0, 4000), st.none()),
        st.tuples(st.just("forget"), st.integers(0, 9), st.none()),
        st.tuples(st.just("copy"), st.integers(0, 9), st.integers(1, 2)),
        st.tuples(st.just("victims"), st.integers(1, 6), st.lists(st.integers(0, 9), max_size=3)),
    ),
    max_size=40,
)


def _keys(path: list[int]) -> list[int]:
    keys = [path[0]]
    for turn in path[1:]:
        keys.append(keys[-1] * 3 + turn)
    return keys


ORIGINS: list[dict[str, Any]] = [
    {},
    {"session": "s", "request_class": "a", "agent_step": 1},
    {"session": "s", "request_class": "b", "agent_step": 5},
    {"session": "t", "request_class": "a", "agent_step": 3},
]


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=examples(2.0))
@given(steps=steps, capacity=st.integers(5, 12))
def test_victims_are_those_of_the_rule(name: str, steps: list[Any], capacity: int) -> None:
    """Requests overlap, share beginnings, and wait; blocks are protected, and forgotten by others."""
    params, rule, leaves = RULES[name]
    tier = Tier(make("eviction", name.split()[0], **params), capacity, pair=1.0)
    held: list[list[Block]] = []
    checks = 0
    # What it knows of a session is read when a block becomes a candidate, so it is no function of the present alone.
    nameless = name == "returning"
    for what, a, b in [*steps, ("victims", 3, []), ("victims", 1, [])]:
        if what == "begin":
            origin = {**ORIGINS[b], "session": None} if nameless else ORIGINS[b]
            if (blocks := tier.begin(_keys(a), **origin)) is not None:
                held.append(blocks)
        elif what == "end" and held:
            tier.end(held.pop(a % len(held)))
        elif what == "wait":
            tier.view.time += a * SECOND // 1000
        elif what == "forget" and tier.numbers:
            tier.forget(list(tier.numbers)[a % len(tier.numbers)])
        elif (
            what == "copy" and tier.numbers and tier.spare and name != "t-lru"
        ):  # judges a block at its release
            tier.copy(list(tier.numbers)[a % len(tier.numbers)], b)
        elif what == "victims":
            blocks = list(tier.cached.values())
            protected = {blocks[i % len(blocks)] for i in b} if blocks else set()
            want = naive_victims(tier, a, protected, rule, leaves)
            got = tier.spy.victims(a, protected)
            tier.spy.due.clear()
            assert [block.key for block in got] == want
            checks += 1
    assert checks >= 2


@settings(max_examples=examples(2.0))
@given(steps=steps, queue=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=5), max_size=4))
def test_queue_aware_is_lru_around_the_queue(steps: list[Any], queue: list[list[int]]) -> None:
    tier = Tier(make("eviction", "queue-aware", window=3), 9)
    tier.view.queue = [_keys(path) for path in queue]
    held: list[list[Block]] = []
    wanted: dict[int, tuple[int, int]] = {}
    for place, keys in reversed(list(enumerate(tier.view.queue[:3]))):
        wanted.update({key: (place, i) for i, key in enumerate(keys)})
    for what, a, b in [*steps, ("victims", 2, [])]:
        if what == "begin":
            if (blocks := tier.begin(_keys(a))) is not None:
                held.append(blocks)
        elif what == "end" and held:
            tier.end(held.pop(a % len(held)))
        elif what == "victims":
            blocks = list(tier.cached.values())
            protected = {blocks[i % len(blocks)] for i in b} if blocks else set()
            free = [block for block in tier.numbers if block not in protected]
            first = [block.key for block in free if block.key not in wanted]
            last = sorted((b.key for b in free if b.key in wanted), key=lambda k: wanted[k], reverse=True)
            got = [block.key for block in tier.spy.victims(a, protected)]
            tier.spy.due.clear()
            assert got == ((first + last)[:a] if len(free) >= a else [])


# ---- what holds for all ----------------------------------------------------------------------------------------------


def _drive(tier: Tier, first: int, last: int) -> list[list[int]]:
    evicted = []
    for i in range(first, last):
        path = [1 + (i * i // 3 + j * (i % 7)) % 2 for j in range(1 + i % 5)]
        keys = [100 * (i % 11) + key for key in _keys(path)]
        tier.ask(*keys, at=i * 0.7, **ORIGINS[i % 4])
        if i % 3 == 0:
            evicted.append(tier.order(2))
    return evicted


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_policy_goes_on_where_it_was(name: str) -> None:
    tier = Tier(make("eviction", name), 30)
    _drive(tier, 0, 150)
    again = pickle.loads(pickle.dumps(tier))
    assert _drive(tier, 150, 300) == _drive(again, 150, 300)


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_victims_leaves_no_trace(name: str) -> None:
    asked, left = (Tier(make("eviction", name), 30) for _ in range(2))
    for i in range(200):
        for n in (1, 3, 17):
            asked.order(n)
        assert _drive(asked, i, i + 1) == _drive(left, i, i + 1)


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_stream(name: str) -> None:
    tier = Tier(make("eviction", name), 20)
    sizes = []
    for i in range(4000):
        keys = [10 * i, 10 * i + 1, 10 * i + 2] if i % 3 else [1, 2, 3]
        tier.ask(
            *keys,
            at=float(i),
            session=f"s{i}",
            request_class=f"class {i}",
            agent_step=i % 5,
            retention_priority=i % 101,
            retention_seconds=float(i),
        )
        if i in (1500, 3999):
            sizes.append(len(pickle.dumps(tier.policy)))
    assert sizes[1] < 1.3 * sizes[0]


@pytest.mark.parametrize("name", NAMES)
def test_serves_in_an_engine_that_is_short_of_memory(name: str) -> None:
    workload = pl.workloads.conversations(sessions=12, think_time=2.0)
    longest = max(len(r.prompt) + r.sampling.max_tokens for r in workload) // 16 + 1
    config = pl.Config(
        num_blocks=longest + 20, eviction=name, swap=make("swap", "host", eviction=name), host_blocks=40
    )
    run = pl.simulate(config, workload, model="llama-3.1-8b", check=True)
    assert run.summary()["finished"] == len(workload)
    removed = run.events[run.events["kind"] == ev.BLOCK_REMOVED]
    assert set(removed["medium"]) == {"device", "host"}
    again = pl.simulate(config, workload, model="llama-3.1-8b", skip_ahead=False)
    assert again.events.equals(run.events)


@pytest.mark.parametrize("name", NAMES)
def test_replays(name: str) -> None:
    workload = pl.workloads.conversations(sessions=20, hash_block=16)
    for semantics in ("prefix", "plain"):
        result = pl.replay(workload, name, 60, semantics=semantics)
        assert 0 < result.hits < result.accesses


def test_hints_reach_the_blocks_that_a_request_stores() -> None:
    hints = Hints(agent_step=2, next_step=5, retention_priority=80, retention_seconds=1.5)
    request = Request(
        request_id="r",
        prompt=list(range(40)),
        session="s",
        request_class="c",
        salt="t",
        hints=hints,
        sampling=SamplingParams(max_tokens=4),
    )
    seen = []

    class Looking(lookup_class("eviction", "lru")):  # type: ignore[misc]
        def insert(self, block: Block) -> None:
            seen.append(block.origin)

    pl.simulate(pl.Config(num_blocks=8, eviction=Looking()), [request])
    assert set(seen) == {Origin("s", "c", "t", 2, 5, 80, 1.5)} == {request.origin}


@pytest.mark.parametrize("name", [*NAMES, "belady-cost"])
def test_parameters_say_what_they_mean(name: str) -> None:
    cls = lookup_class("eviction", name)
    assert issubclass(cls, Eviction)
    assert len((cls.__doc__ or "").splitlines()) > 3
    for parameter in cls.params():
        assert parameter.help
