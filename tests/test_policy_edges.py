"""Policies of every slot at their edges: full, empty, asked twice, given what they cannot use."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples, policies, servable

import pagedlab as pl
from pagedlab.errors import ConfigError
from pagedlab.policies import Block, Eviction, kernel
from pagedlab.policies.base import Policy, param
from pagedlab.policies.fair import Fair
from pagedlab.policies.lookup import make_prefix
from pagedlab.policies.prefetch import Load
from pagedlab.policies.prefetchers.chains import Markov, NextBlock
from pagedlab.policies.prefetchers.sessions import AgentStep, Pauses, ThinkTime
from pagedlab.policies.prompt import HashedPrompt, HashedTokens, private_id
from pagedlab.policies.scheduler import UNTIL_EVENT
from pagedlab.policies.shelf.tinylfu import Sketch
from pagedlab.registry import make

KEYS = [(i * i + i // 7) % 23 for i in range(400)]
CAPACITY = 10


def block(index: int, key: Any = None, **known: Any) -> Block:
    """A block as a pool would show it."""
    made = Block(index)
    made.key = index if key is None else key
    for name, value in {"born": index + 1, "fill": 1, **known}.items():
        setattr(made, name, value)
    return made


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_a_parameter_describes_itself() -> None:
    class Edgy(Policy):
        slot: ClassVar[str] = "eviction"
        share: float = param(0.5, help="of something", low=0.25, high=0.75, unit="blocks")
        way: str = param("a", help="which", choices=("a", "b"))

    assert Edgy.name == "", "a class that nobody registered has no name"
    share, way = Edgy.params()
    assert share.describe() == {
        "name": "share", "type": "float", "default": 0.5, "help": "of something", "low": 0.25, "high": 0.75,
        "unit": "blocks",
    }  # fmt: skip
    assert way.describe()["choices"] == ("a", "b")
    assert (Edgy().share, Edgy(share=0.25).share, Edgy(share=0.75).share) == (0.5, 0.25, 0.75)
    for value in (0.24, 0.76):
        with pytest.raises(ConfigError, match=r"allowed: 0.25 to 0.75"):
            Edgy(share=value)


# ---- kernel ----------------------------------------------------------------------------------------------------------


def test_auto_takes_the_fastest_kernel_that_serves_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = make("kernel", "auto")
    assert auto.resolve("cpu", "float32") == make("kernel", "cpu-paged")
    monkeypatch.setattr(kernel, "find_spec", lambda name: object() if name == "triton" else None)
    assert auto.resolve("cuda:0", "bfloat16") == make("kernel", "triton-paged")
    assert auto.resolve("cuda", "float64") == make("kernel", "gather-sdpa")
    assert make("kernel", "triton-paged").resolve("cuda", "bfloat16") == make("kernel", "triton-paged")
    monkeypatch.setattr(kernel, "find_spec", lambda name: None)
    assert auto.resolve("cuda", "bfloat16") == make("kernel", "gather-sdpa")
    with pytest.raises(ConfigError, match="needs triton"):
        make("kernel", "triton-paged").resolve("cuda", "bfloat16")


# ---- eviction --------------------------------------------------------------------------------------------------------


def parts(*names: str) -> Callable[[dict[str, Any]], int]:
    return lambda shown: sum(shown[name] for name in names)


@pytest.mark.parametrize(
    ("name", "resident"),
    [
        ("arc", parts("T1", "T2")),
        ("clock", parts("marked", "unmarked")),
        ("sieve", parts("visited", "unvisited")),
        ("lirs", parts("LIR", "HIR")),
        ("2q", parts("A1in", "Am")),
        ("mq", lambda shown: sum(n for name, n in shown.items() if name.startswith("queue"))),
        ("s3-fifo", parts("small", "main")),
        ("slru", lambda shown: sum(shown.values())),
        ("w-tinylfu", parts("window", "main")),
    ],
)
def test_what_a_policy_shows_of_its_queues_adds_up(name: str, resident: Any) -> None:
    shown = pl.replay(KEYS, name, CAPACITY, semantics="plain", progress=False).stats
    assert resident(shown) == CAPACITY
    assert all(n >= 0 for n in shown.values())
    if name == "lirs":
        assert 0 < shown["gone"] <= shown["S"], "keys of blocks that are gone stand in S"


def test_arc_remembers_no_more_than_two_caches() -> None:
    """Working sets that are used twice and then left fill T2 and B2; those used once fill T1 and B1."""
    for times in (1, 2, 3):
        stream = [7 * r + i for r in range(40) for _ in range(times) for i in range(9)]
        for length in range(20, len(stream), 37):
            shown = pl.replay(stream[:length], "arc", CAPACITY, semantics="plain", progress=False).stats
            assert shown["T1"] + shown["B1"] <= CAPACITY
            assert sum(shown[queue] for queue in ("T1", "T2", "B1", "B2")) <= 2 * CAPACITY
            assert 0 <= shown["p"] <= CAPACITY
        assert shown["B1" if times == 1 else "B2"] > 0


@pytest.mark.parametrize("name", ["hyperbolic", "lhd"])
def test_what_a_policy_shows_of_its_counts(name: str) -> None:
    shown = pl.replay(KEYS * 5, name, CAPACITY, semantics="plain", progress=False).stats
    assert shown["accesses"] == 5 * len(KEYS)
    for density in shown.get("density", ()):
        assert density == round(density, 6) >= 0
    assert name != "lhd" or any(0 < density < 1 for density in shown["density"])


def test_hit_density_is_hits_to_come_over_time_in_the_cache() -> None:
    """Of the blocks of a class that reach an age: how many are hit after it, per access that they stay."""
    policy: Any = make("eviction", "lhd")
    policy.reset(capacity=CAPACITY)
    hits, evictions = {2: 3.0, 5: 1.0}, {3: 2.0, 9: 4.0}
    for age, n in hits.items():
        policy._hits[0][age] = n
    for age, n in evictions.items():
        policy._evictions[0][age] = n
    policy._learn()
    for age in range(10):
        later = sum(n for at, n in hits.items() if at >= age)
        stay = sum(n * (at - age + 1) for at, n in [*hits.items(), *evictions.items()] if at >= age)
        assert policy._density[0][age] == pytest.approx(later / stay)
    assert 0 < sum(policy._hits[0]) < 4, "what was seen fades"


def test_a_class_keeps_the_short_cuts_that_it_defines_itself() -> None:
    class Plain(Eviction):
        def priority(self, block: Block) -> float:
            return 0.0

        def hit(self, block: Block) -> None:
            super().hit(block)

        def hit_all(self, blocks: Any) -> None:
            super().hit_all(blocks)

    class Later(Plain):
        def hit(self, block: Block) -> None:
            super().hit(block)

    assert Plain.hit_all is not Eviction.hit_all
    assert Later.hit_all is Eviction.hit_all, "Plain's knows nothing of Later's hit"


class Cache:
    """Blocks of one key each, given up one by one in one of several ways."""

    def __init__(self, policy: Any, way: str) -> None:
        self.policy, self.way = policy.clone(), way
        self.policy.reset(capacity=CAPACITY)
        self.spare = [block(i) for i in range(CAPACITY)]
        self.cached: dict[int, Block] = {}
        self.gone: list[int] = []
        self.time = 0

    def access(self, key: int) -> None:
        self.time += 1
        found = self.cached.get(key)
        if self.way == "a look ahead" and self.time % 4 == 0:
            assert len(self.policy.victims(len(self.cached) // 2)) == len(self.cached) // 2
        if found is not None:
            found.hits += 1
            self.policy.hit(found)
        else:
            self.policy.miss(key)
            if not self.spare:
                self.give_up()
            self.cached[key] = found = self.spare.pop()
            found.key, found.hits, found.born, found.created = key, 0, self.time, self.time
            self.policy.insert(found)
        found.last_released = self.time
        self.policy.release(found)

    def give_up(self) -> None:
        if self.way in ("evict", "a look ahead"):
            victim = self.policy.evict()
        else:
            (victim,) = self.policy.victims(1, [Block(99)] if self.way == "others protected" else [])
            self.policy.remove(victim)
        self.gone.append(victim.key)
        self.spare.append(self.cached.pop(victim.key))

    def forget(self, key: int) -> None:
        if key in self.cached:
            self.policy.remove(self.cached[key])
            self.spare.append(self.cached.pop(key))


@pytest.mark.parametrize("name", servable("eviction"))
@settings(max_examples=examples(0.4))
@given(data=st.data(), keys=st.lists(st.integers(0, 15), min_size=15, max_size=70))
def test_it_does_not_matter_how_a_victim_is_asked_for(
    name: str, data: st.DataObject, keys: list[int]
) -> None:
    """In one call or in two, whoever else is protected, after looks ahead; others are forgotten meanwhile."""
    policy = data.draw(policies("eviction", (name,)))
    forgotten = set(data.draw(st.lists(st.integers(0, len(keys) - 1), max_size=6)))
    gone = []
    for way in ("evict", "victims", "others protected", "a look ahead"):
        cache = Cache(policy, way)
        for i, key in enumerate(keys):
            if i in forgotten:
                cache.forget(keys[i - 3])
            cache.access(key)
        while cache.cached:
            cache.give_up()
        gone.append(cache.gone)
    assert all(other == gone[0] for other in gone)


@pytest.mark.parametrize("name", ["clock", "sieve", "slru", "mq", "lfu", "arc", "gdsf", "lru-k"])
def test_what_a_second_request_shares_while_it_is_in_use_was_used_twice(name: str) -> None:
    policy: Any = make("eviction", name)
    policy.reset(capacity=CAPACITY)
    shared, alone = block(0), block(1)
    for b in (shared, alone):
        policy.miss(b.key)
        policy.insert(b)
    shared.hits += 1
    policy.hit(shared)
    for b in (shared, alone):
        policy.release(b)
    assert policy.victims(1) == [alone]
    assert policy.victims(2) == [alone, shared]


@pytest.mark.parametrize("name", servable("eviction"))
def test_requests_that_overlap_share_their_blocks(name: str) -> None:
    """A block is in use until the last of three requests has ended, and nobody names it before."""
    policy: Any = make("eviction", name)
    policy.reset(capacity=CAPACITY)
    spare, cached, running = [block(i) for i in range(CAPACITY)], {}, []
    for key in [(i * i + i // 5) % 13 for i in range(300)]:
        found = cached.get(key)
        if found is not None:
            found.hits += found.ref_count == 0
            policy.hit(found)
        else:
            policy.miss(key)
            if not spare:
                (victim,) = policy.victims(1)
                assert victim.ref_count == 0
                policy.remove(victim)
                spare.append(cached.pop(victim.key))
            cached[key] = found = spare.pop()
            found.key, found.hits = key, 0
            policy.insert(found)
        found.ref_count += 1
        running.append(found)
        if len(running) > 3:
            ended = running.pop(0)
            ended.ref_count -= 1
            if not ended.ref_count:
                policy.release(ended)
        idle = sum(b.ref_count == 0 for b in cached.values())
        assert len(policy.victims(idle)) == idle
        assert policy.victims(idle + 1) == []


@pytest.mark.parametrize("name", servable("eviction"))
def test_victims_are_unprotected_however_few_are_left(name: str) -> None:
    """Whichever blocks are protected: those used once, those used twice, the first to go, the last."""
    policy: Any = make("eviction", name)
    policy.reset(capacity=12)
    held = [block(i) for i in range(12)]
    for b in held:
        policy.miss(b.key)
        policy.insert(b)
    for b in held:
        policy.release(b)
    for b in held[::2]:
        b.hits += 1
        policy.hit(b)
        policy.release(b)
    order = policy.victims(12)
    for queue in (held, held[::2] + held[1::2], held[1::2] + held[::2], order, order[::-1]):
        for spared in range(1, 12):
            protected = queue[spared:]
            assert set(policy.victims(spared, protected)) == set(queue[:spared])
            assert policy.victims(spared + 1, protected) == []
    assert policy.victims(12) == order, "asking changes nothing"


@pytest.mark.parametrize("small", [0.1, 0.3, 0.5])
def test_s3_fifo_names_several_as_it_would_give_them_up(small: float) -> None:
    for length in range(20, 200, 9):
        cache = Cache(make("eviction", "s3-fifo", small=small), "evict")
        for key in KEYS[:length]:
            cache.access(key)
        named = [b.key for b in cache.policy.victims(len(cache.cached))]
        cache.gone.clear()
        while cache.cached:
            cache.give_up()
        assert cache.gone == named


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("s3-fifo", {"small": 0.5}),
        ("2q", {"a1in": 0.5}),
        ("w-tinylfu", {"window": 0.5}),
        ("lirs", {"hir": 0.5}),
    ],
)
def test_a_cache_that_is_emptied_gives_up_block_after_block(name: str, params: dict[str, float]) -> None:
    """Also below what a queue has as its share."""
    gone = []
    for way in ("evict", "victims"):
        cache = Cache(make("eviction", name, **params), way)  # type: ignore[arg-type]
        for key in KEYS[:100]:
            cache.access(key)
        while cache.cached:
            cache.give_up()
        gone.append(cache.gone)
    assert gone[0] == gone[1]


def test_a_tree_that_runs_out_of_leaves_gives_up_what_is_left() -> None:
    """A protected child guards its parent until nothing else is left, and a ring has no leaf."""
    policy: Any = make("eviction", "belady-tree")
    policy.reset(capacity=4, future=[1, 2, 3, 4])
    chain = [block(i, key=i + 1, parent_key=i or None) for i in range(3)]
    ring = block(3, key=4, parent_key=4)
    for b in (*chain, ring):
        policy.miss(b.key)
        policy.insert(b)
    for b in (*reversed(chain), ring):
        policy.release(b)
    assert policy.victims(1) == [chain[2]]
    assert policy.victims(3) == [chain[2], chain[1], chain[0]]
    assert policy.victims(4) == [chain[2], chain[1], chain[0], ring]
    assert policy.victims(2, [chain[2]]) == [chain[1], chain[0]]
    assert policy.victims(3, [chain[2]]) == [chain[1], chain[0], ring]
    assert policy.victims(4, [chain[2]]) == []


def test_ttl_takes_priorities_from_0_to_100() -> None:
    assert make("eviction", "ttl", classes="chat=100, batch=0:5")
    for classes in ("chat=101", "chat=-1", "=50", "chat=50:-1"):
        with pytest.raises(ConfigError, match=r"TimeToLive\.classes"):
            make("eviction", "ttl", classes=classes)


# ---- swap ------------------------------------------------------------------------------------------------------------


def test_what_was_used_once_is_stored_at_the_second_time_alone() -> None:
    second, back = (
        make("swap", "disk", admission=how, min_hits=0) for how in ("on-second-use", "write-back")
    )
    for policy in (second, back):
        policy.reset(capacities=(4, 2, 2))  # type: ignore[attr-defined]
    once, hit = block(0), block(1, hits=1)
    assert [back.store(b, 0) for b in (once, hit)] == [True, True]  # type: ignore[attr-defined]
    assert [second.store(b, 0) for b in (once, hit, once, once)] == [False, True, True, False]  # type: ignore[attr-defined]


# ---- the sketch of W-TinyLFU -----------------------------------------------------------------------------------------


def test_a_sketch_tells_keys_apart() -> None:
    sketch = Sketch(64, 4, 10**6, conservative=True)
    places = {key: sketch.cells(key) for key in range(500)}
    assert all(
        row * 64 <= cell < (row + 1) * 64 for cells in places.values() for row, cell in enumerate(cells)
    )
    for row in range(4):
        assert len({cells[row] for cells in places.values()}) == 64, "every counter of a row has its keys"
    assert len({tuple(cells) for cells in places.values()}) > 440, "of 4096 pairs of start and stride"
    shifts = {tuple((cell - cells[0]) % 64 for cell in cells) for cells in places.values()}
    assert len(shifts) > 40, "keys that meet in one row part in the next"


@pytest.mark.parametrize("conservative", [True, False])
def test_a_sketch_counts_up_to_15_and_halves_when_its_period_is_over(conservative: bool) -> None:
    sketch = Sketch(64, 4, 40, conservative=conservative)
    one, other = sketch.cells("one"), sketch.cells("other")
    for n in range(1, 40):
        sketch.add(one)
        assert sketch.count(one) == min(n, 15)
    sketch.add(other)
    assert sketch.count(one) == 7
    assert sketch.count(other) == 0
    for _ in range(19):
        sketch.add(one)
    assert sketch.count(one) == 15
    sketch.add(one)
    assert sketch.count(one) == (7 if conservative else 15), "half of the additions were kept, or none"


# ---- prompts of hashes -----------------------------------------------------------------------------------------------


def test_a_hashed_prompt_is_a_sequence() -> None:
    prompt = HashedPrompt([7, 9, 4], 10, 4)
    shown = list(prompt)
    assert len(shown) == len(prompt) == 10
    assert shown == [prompt[i] for i in range(10)] == prompt[:]
    assert [prompt[-i] for i in range(1, 11)] == shown[::-1]
    assert prompt[2:9:3] == shown[2:9:3]
    for at in (10, -11):
        with pytest.raises(IndexError):
            prompt[at]


def test_what_is_generated_after_a_hashed_prompt_is_nobody_elses() -> None:
    prompt = HashedPrompt([7, 9], 8, 4)
    one, other = HashedTokens(prompt, 1), HashedTokens(prompt, 2)
    assert len(one) == 8
    for tokens in (one, other):
        tokens.append(3)
        tokens.append(3)
    assert one[0:10][:8] == other[0:10][:8] == list(prompt)
    made = {*one[8:10], *other[8:10]}
    assert len(made) == 4
    assert max(made) < 0
    assert len({private_id(sequence, i) for sequence in range(20) for i in range(20)}) == 400


@pytest.mark.parametrize("salt", [None, "tenant"])
def test_hashes_of_any_size_name_the_blocks_of_the_cache(salt: str | None) -> None:
    """Equal beginnings have equal keys, whatever the hashes are cut into; what no whole hash covers is private."""

    def keys(ids: list[int], tokens: int, hash_block: int, unique: int) -> list[int]:
        made = HashedTokens(HashedPrompt(ids, tokens, hash_block), unique)
        return make_prefix(made, 4, salt).keys(6)[:6]

    for hash_block, ids, whole in ((4, [7, 9, 4, 5], 3), (8, [7, 9], 2), (2, [1, 2, 3, 4, 5, 6, 7], 3)):
        tokens = hash_block * len(ids) - 1
        one, other = keys(ids, tokens, hash_block, 1), keys(ids, tokens, hash_block, 2)
        assert one[:whole] == other[:whole]
        assert not set(one[whole:]) & set(other[whole:])
        assert len({*one, *other}) == 12 - whole
        assert keys([*ids[:-1], 99], tokens, hash_block, 1)[:whole] == one[:whole], (
            "a partial hash is no name"
        )
        assert not {*keys([i + 50 for i in ids], tokens, hash_block, 1)[:whole]} & {*one}


@pytest.mark.parametrize("name", ["chained-hash", "radix"])
def test_what_was_never_published_has_no_copy(name: str) -> None:
    lookup: Any = make("lookup", name)
    lookup.reset(block_size=2, num_tiers=2)
    stored, other = (block(i, key=i, parent=(None,), content=(i, i)) for i in range(2))
    assert lookup.copy_in(other, 1) is None
    stored.serial = lookup.publish(stored).serial
    assert lookup.copy_in(other, 0) is None
    assert lookup.copy_in(stored, 0) is stored
    assert lookup.copy_in(stored, 1) is None


def test_contents_that_collide_keep_an_identity_each() -> None:
    """One has the place in the index; what is stored behind the others must not be taken for one another's."""
    lookup: Any = make("lookup", "chained-hash")
    lookup.reset(block_size=2, num_tiers=1)
    published = []
    for i, content in enumerate([(1, 2), (3, 4), (6, 7), (1, 2)]):
        stored = block(i, key=5, parent=(None,), content=content)
        published.append(lookup.publish(stored))
        stored.serial = published[-1].serial
    assert [answer.indexed for answer in published] == [True, False, False, False]
    serials = [answer.serial for answer in published]
    assert all(isinstance(serial, int) for serial in serials)
    assert serials[3] == serials[0], "the same content"
    assert len(set(serials)) == 3


# ---- prefetch --------------------------------------------------------------------------------------------------------


def test_think_times_are_averaged_and_fade() -> None:
    pauses = Pauses()
    pauses.take(10.0, 0.25)
    assert (pauses.mean, round(pauses.deviation, 3)) == (10.0, 7.358)
    pauses.take(20.0, 0.25)
    assert pauses.mean == 15.0, "one of two equals"
    assert pauses.deviation == pytest.approx((7.358 + 10) / 2, abs=1e-3)
    for _ in range(60):
        pauses.take(40.0, 0.25)
    assert pauses.mean == pytest.approx(40, abs=0.01)
    assert pauses.deviation < 0.1


class Clock:
    """A view of nothing but the time, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @property
    def now(self) -> int:
        return round(self.seconds * 10**12)


def at(policy: Any, seconds: float) -> None:
    policy.view.seconds = seconds


def timed(policy: Any) -> Any:
    policy.attach(Clock())
    policy.reset()
    return policy


def turn(session: str | None, **origin: Any) -> Any:
    return SimpleNamespace(session=session, origin=SimpleNamespace(agent_step=None, next_step=None, **origin))


def test_a_session_is_expected_between_its_own_think_time_and_everybodys() -> None:
    policy = timed(ThinkTime())
    for session, thought in (("slow", 100.0), ("fast", 10.0)):
        at(policy, 0.0)
        policy.finished(turn(session))
        at(policy, thought)
        policy.arrived(turn(session))
    overall, deviation = policy.expected("new")
    assert overall == 55.0
    for session, own in (("slow", 100.0), ("fast", 10.0)):
        mean, spread = policy.expected(session)
        assert mean == pytest.approx(own / 3 + 2 * overall / 3), "one turn counts for one third"
        assert spread == pytest.approx(0.7358 * own / 3 + 2 * deviation / 3, rel=1e-3)


def test_think_time_forgets_sessions_that_never_come_back() -> None:
    policy = timed(ThinkTime(capacity=3))
    policy.finished(turn("first"))
    at(policy, 10.0)
    policy.arrived(turn("first"))
    for i in range(300):
        at(policy, 20.0 + i)
        policy.finished(turn(f"s{i}"))
    assert len(policy._pauses) == 3
    assert len(policy._order) <= 2 * 3 + 65
    due = [policy._pauses[f"s{i}"].due for i in (297, 298, 299)]
    assert policy.wake_at() == min(due)


def chain_of(n: int, first: int = 0) -> list[Block]:
    return [block(first + i, serial=first + i, tier=1) for i in range(n)]


class Residency:
    """What of each sequence lies in lower tiers, and what continues each block."""

    def __init__(self, **sequences: list[Block]) -> None:
        self.sequences = sequences

    def prefix(self, sequence: Any) -> list[Block]:
        return list(self.sequences.get(sequence.session, []))

    below = prefix

    def children(self, parent: Block) -> list[Block]:
        chains = self.sequences.values()
        return [b for line in chains for a, b in pairwise(line) if a is parent]


@pytest.mark.parametrize("evict", [True, False])
def test_loads_take_the_place_of_cached_blocks_if_they_may(evict: bool) -> None:
    a, b = chain_of(3), chain_of(2, first=10)
    residency = Residency(a=a, b=b)
    markov, following = timed(Markov(evict=evict, support=1, confidence=0.0)), timed(NextBlock(evict=evict))
    for _ in range(2):
        markov.used(turn("a"), a)
        markov.used(turn("b"), b[:1])
    markov.used(turn("a"), a)
    following.used(turn("a"), a[:1])
    think = timed(ThinkTime(evict=evict))
    think.finished(turn("a"))
    at(think, 5.0)
    think.arrived(turn("a"))
    think.finished(turn("a"))
    at(think, 9.9)
    agents = timed(AgentStep(evict=evict))
    step = turn("a")
    step.origin.agent_step = 1
    agents.arrived(step)
    agents.finished(step)
    for policy, blocks in ((markov, b[:1]), (following, a[1:]), (think, a), (agents, a)):
        assert policy.plan([], residency, 99) == [Load(x, evict=evict) for x in blocks], policy


def test_markov_remembers_as_many_prefixes_as_it_may() -> None:
    lines = {name: chain_of(1, first=10 * i) for i, name in enumerate("abcd")}
    residency = Residency(**lines)
    policy = timed(Markov(capacity=4, support=1, confidence=0.0))
    for name in "abcda":
        policy.used(turn(name), lines[name])
    assert [x.block for x in policy.plan([], residency, 99)] == lines["b"]
    small = timed(Markov(capacity=3, support=1, confidence=0.0))
    for name in "abcda":
        small.used(turn(name), lines[name])
    assert small.plan([], residency, 99) == [], "a was forgotten, and what came after it"


def test_markov_of_sessions_forgets_the_session_that_was_silent_longest() -> None:
    lines = {name: chain_of(1, first=10 * i) for i, name in enumerate("abc")}
    for capacity, knows in ((3, True), (2, False)):
        policy = timed(Markov(capacity=capacity, support=1, confidence=0.0, within="session"))
        for name in "abc":
            policy.used(turn(name), lines[name])
        policy.used(turn("a"), lines["b"])
        policy.used(turn("c"), lines["a"])
        planned = policy.plan([], Residency(**lines), 99)
        assert bool(planned) == knows, "whether b is known to have followed a, in the first session"


def test_the_agents_whose_turn_is_nearest_come_first() -> None:
    """Among equals the one whose session moved last; and nobody compares what cannot be compared."""
    policy = timed(AgentStep(horizon=3))
    lines = {name: chain_of(1, first=10 * i) for i, name in enumerate("abc")}
    for name, step, next_step in (("a", 1, 3), ("b", 5, 6), ("c", 1, 2), ("a", 1, 2)):
        sequence = turn(name)
        sequence.origin.agent_step, sequence.origin.next_step = step, next_step
        policy.arrived(sequence)
        policy.finished(sequence)
    planned = [x.block.index for x in policy.plan([], Residency(**lines), 99)]
    assert planned == [0, 20, 10]
    for name, again in (("b", 8), ("c", 9)):
        sequence = turn(name)
        sequence.origin.agent_step, sequence.origin.next_step = again - 2, again
        policy.arrived(sequence)
        policy.finished(sequence)
    assert [x.block.index for x in policy.plan([], Residency(**lines), 99)] == [0, 20, 10]


# ---- schedulers ------------------------------------------------------------------------------------------------------


class Step:
    """A step that seats whoever asks while it has seats, and room in the cache."""

    def __init__(self, waiting: list[Any], seats: int, room: int = 99) -> None:
        self.running: list[Any] = []
        self.waiting, self.seats, self.room, self.granted = waiting, seats, room, []

    def cached(self, sequence: Any) -> int:
        return self.waiting.index(sequence)

    def grant(self, sequence: Any, tokens: int, *, whole: bool = False) -> int:
        if self.seats == 0 or self.room == 0:
            return 0
        self.seats -= 1
        self.room -= 1
        self.granted.append(sequence.request_id)
        return tokens


def asking(name: str, tenant: str, prompt: int = 10) -> Any:
    return SimpleNamespace(
        request_id=name, salt=tenant, session=None, prompt_len=prompt, request_output=0, request_ended=False
    )


def test_a_decision_of_fair_stands_while_there_is_no_seat() -> None:
    policy = Fair()
    policy.reset()
    rivals = [asking("a1", "a"), asking("b1", "b"), asking("a2", "a"), asking("b2", "b")]
    full = Step(rivals, seats=2)
    assert policy.plan(full) == UNTIL_EVENT, "who is next does not matter before somebody leaves"
    assert full.granted == ["a1", "b1"]


def test_a_decision_of_longest_prefix_stands_while_there_is_no_seat() -> None:
    """Where there is one, what is cached decides, and that changes from step to step."""
    policy: Any = make("scheduler", "longest-prefix")
    rivals = [asking(name, "a") for name in ("a1", "a2", "a3")]
    full = Step(rivals, seats=2)
    assert policy.plan(full) == UNTIL_EVENT
    assert full.granted == ["a3", "a2"], "most of the last one is cached"
    assert policy.plan(Step(rivals, seats=2, room=1)) is None, "a seat is free, only blocks are short"
    alone = Step(rivals[:1], seats=2, room=0)
    assert policy.plan(alone) == UNTIL_EVENT, "nobody to be compared with"


def test_prefill_first_goes_on_with_prompts_that_run() -> None:
    policy: Any = make("scheduler", "prefill-first")
    begun, decoding = asking("a1", "a"), asking("a2", "a")
    begun.remaining, decoding.remaining = 7, 1
    step = Step([], seats=9)
    step.running = [decoding, begun]
    assert policy.plan(step) is None
    assert step.granted == ["a1"], "who decodes waits"
    begun.remaining = 1
    assert policy.plan(step) == UNTIL_EVENT
    assert step.granted == ["a1", "a2", "a1"]


def test_who_comes_to_an_empty_queue_is_lifted_to_who_left_it_last() -> None:
    policy = Fair()
    policy.reset()
    policy.plan(Step([asking("a1", "a", 100)], seats=5))
    policy.plan(Step([asking("b1", "b", 7)], seats=5))
    assert policy.counter("a") == 100
    assert policy.counter("b") == 107, "being away earns nothing"


@given(st.floats(0, 9), st.floats(0, 9), st.integers(1, 50), st.integers(0, 50))
def test_a_counter_is_what_was_had(inputs: float, outputs: float, prompt: int, said: int) -> None:
    policy = Fair(input_weight=inputs, output_weight=outputs)
    policy.reset()
    one = asking("a1", "a", prompt)
    policy.plan(Step([one], seats=1))
    one.request_output = said
    policy.plan(Step([], seats=1))
    assert policy.counter("a") == pytest.approx(inputs * prompt + outputs * said)
