"""Prefetchers: when they are asked, what their loads cost, how each ends, and what each of them brings up."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import e, inf, nan
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pagedlab as pl
from pagedlab import events as ev
from pagedlab.cache.prefetched import Prefetched
from pagedlab.config import Config
from pagedlab.costs import find_model
from pagedlab.costs.base import CostModel, StepWork
from pagedlab.engine.clock import PS_PER_SECOND, StepClock, VirtualClock
from pagedlab.engine.engine import Engine
from pagedlab.engine.link import Link
from pagedlab.engine.prefetching import KnownFuture, Prefetching
from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.errors import ConfigError, PolicyError
from pagedlab.executors.simulated import SimulatedExecutor
from pagedlab.executors.stub import StubExecutor
from pagedlab.lab.results import Run
from pagedlab.policies.block import Block
from pagedlab.policies.prefetch import ENDS, FATES, Load, Prefetch
from pagedlab.policies.prefetchers.chains import Markov
from pagedlab.policies.prefetchers.oracle import Oracle
from pagedlab.policies.prefetchers.sessions import ThinkTime
from pagedlab.policies.view import View

from .planted_bugs import Bug
from .strategies import (
    Scenario,
    blocks_for_longest,
    ended,
    event_rows,
    examples,
    says_the_truth,
    scenarios,
    servable,
    serve,
)
from .test_law6 import left_behind, scripts, simulated

SIZE = 4
"""Tokens a block."""


class Seconds(CostModel):
    """A step takes ``step`` seconds, a block over the link ``block``: sums that a person can do."""

    step: float = 0.1
    block: float = 0.0

    def step_ps(self, work: StepWork) -> int:
        return round(self.step * PS_PER_SECOND)

    def linear(self, work: StepWork) -> tuple[int, int] | None:
        return self.step_ps(work), 0

    def transfer_ps(self, num_bytes: int, link: str) -> int:
        return num_bytes * round(self.block * PS_PER_SECOND) // (SHAPE.kv_bytes_per_token * SIZE)


SHAPE = find_model("llama-3.1-8b")


def ask(name: str, tokens: Any, at: float, **more: Any) -> Request:
    """A request for ``tokens`` (a letter and a number of blocks, or a list) that answers one token."""
    prompt = text(tokens) if isinstance(tokens, str) else tokens
    return Request(request_id=name, prompt=prompt, arrival=at, sampling=SamplingParams(max_tokens=1), **more)


def text(words: str) -> list[int]:
    """``"a2 b1"``: two blocks of a's text, then one of b's."""
    out: list[int] = []
    for word in words.split():
        out += [100 * ord(word[0]) + i for i in range(int(word[1:]) * SIZE)]
    return out


def served(
    prefetch: Any,
    requests: list[Request],
    *,
    num_blocks: int = 5,
    cost: CostModel | None = None,
    skip: bool = True,
    **config: Any,
) -> Engine:
    """Serve ``requests`` on a virtual clock, with a host tier that has room for all."""
    described = Config(
        num_blocks=num_blocks, block_size=SIZE, host_blocks=64, swap="host", prefetch=prefetch, **config
    )
    return on_virtual_clock(described, requests, cost or Seconds(), skip=skip)


def on_virtual_clock(config: Config, requests: list[Request], cost: CostModel, *, skip: bool) -> Engine:
    """Serve ``requests`` as they are."""
    executor = SimulatedExecutor(cost, max_model_len=4096, shape=SHAPE)
    engine = Engine(config, executor, clock=VirtualClock(), skip_ahead=skip, knows_future=True)
    for request in requests:
        engine.add(request)
    engine.run(max_steps=20_000)
    ended(engine)
    return engine


def ttft(engine: Engine, name: str) -> float:
    """Seconds from a request's arrival to its first token."""
    group = engine.groups[name]
    first = group.sequences[0].first_token_at
    assert first is not None
    return (first - group.arrival) / PS_PER_SECOND


def fates(engine: Engine) -> dict[str, int]:
    """How loads ended, without what did not occur."""
    return {fate: n for fate, n in engine.prefetched.items() if n}


class Bring(Prefetch):
    """Bring up what request ``who`` left, at a given time: a prefetcher as somebody would write it in a notebook."""

    who: str = "a"
    at: float = 5.0
    evict: bool = True

    def reset(self) -> None:
        self.known: dict[str, Any] = {}
        self.heard: list[tuple[str, int]] = []
        self.asked: list[float] = []

    def finished(self, sequence: Any) -> None:
        self.known[sequence.request_id] = sequence

    def plan(self, waiting: Any, residency: Any, link_budget: int) -> list[Load]:
        self.asked.append(self.now)
        if self.now < self.at or self.who not in self.known:
            return []
        return [Load(b, evict=self.evict) for b in residency.below(self.known.pop(self.who))]

    def wake_at(self) -> float | None:
        return self.at

    def feedback(self, block: Block, fate: str) -> None:
        self.heard.append((fate, block.index))


# ---- how loads end -----------------------------------------------------------------------------------------------

PUSHED_OUT = [ask("a", "a2", 0), ask("b", "b5", 2)]
"""The pool has five blocks: a's two are in the host tier when b is there."""
AGAIN = ask("again", "a2 c1", 10)


def test_a_block_that_is_up_before_it_is_wanted_is_useful() -> None:
    none = served("none", [*PUSHED_OUT, AGAIN], cost=Seconds(block=0.5))
    engine = served(Bring(), [*PUSHED_OUT, AGAIN], cost=Seconds(block=0.5))
    assert fates(engine) == {"done": 2, "useful": 2}
    # Half a second for each block of b that is saved to make room, while a's two come up; then only one is left to do.
    assert (ttft(none, "again"), ttft(engine, "again")) == (1.5, 0.5)
    assert engine.policies.prefetch.asked[-2:] == [5.0, 10.0]  # when it said, and when somebody came


def test_a_block_that_is_wanted_on_its_way_is_late_and_waited_for() -> None:
    """Ordered at 9.4, three blocks of half a second are there at 9.9, 10.4 and 10.9; the request comes at 10."""
    requests = [ask("a", "a3", 0), ask("b", "b6", 2), ask("again", "a3 c1", 10)]
    engine = served(Bring(at=9.4), requests, num_blocks=6, cost=Seconds(block=0.5))
    assert fates(engine) == {"done": 3, "useful": 1, "late": 2}
    assert ttft(engine, "again") == 0.9
    assert [e.detail for e in engine.events if e.kind == ev.PREFETCH_ENDED] == ["useful", "late", "late"]


def test_loads_come_one_after_the_other_and_what_a_step_loads_goes_before_them() -> None:
    a, b, c, d = (Block(i) for i in range(4))
    link = Link(lambda n, from_disk: 10 * n)
    link.send([a, b, c], 100)
    assert [link.ready_at(x) for x in (a, b, c, d)] == [110, 120, 130, None]
    link.serve(2, 112)
    assert [link.ready_at(x) for x in (a, b, c)] == [None, 140, 150]
    assert (link.under_way(112), link.under_way(140), link.next_ready) == (2, 1, 150)
    link.send([d], 145)
    assert link.ready_at(d) == 160
    link.serve(5, 300)
    assert link.next_ready is None
    link.send([a], 300)
    assert link.ready_at(a) == 310, "an idle link does not wait for what a step has loaded"


def test_a_block_that_nobody_wants_is_useless() -> None:
    given_up = served(Bring(), [*PUSHED_OUT, ask("c", "c5", 20)])
    at_the_end = served(Bring(), [*PUSHED_OUT, ask("b again", "b3", 20)])
    assert fates(given_up) == fates(at_the_end) == {"done": 2, "useless": 2}
    assert given_up.totals.prefetch["useless"] == 2
    assert at_the_end.totals.prefetch["useless"] == 0, "while there is work it may still be used"


def test_a_block_whose_place_is_missed_first_is_harmful() -> None:
    """a's two blocks take the place of b's last two; then b is asked for, and then a."""
    harmful = served(Bring(), [*PUSHED_OUT, ask("b again", "b5", 8), AGAIN])
    assert fates(harmful) == {"done": 2, "harmful": 2}
    harmless = served(Bring(), [*PUSHED_OUT, ask("b's beginning", "b2 d1", 8), AGAIN])
    assert fates(harmless)["useful"] == 2
    first = served(Bring(), [*PUSHED_OUT, replace(AGAIN, arrival=8), ask("b again", "b5", 10)])
    assert fates(first)["useful"] == 2, "what was used before its place was missed did no harm"


def test_a_free_block_is_taken_before_a_cached_one() -> None:
    """b's last block is not full, so it is free when b has ended."""
    requests = [ask("a", "a2", 0), ask("b", [*text("b4"), 1], 2), ask("last", "c1", 10)]
    engine = served(Bring(evict=False), requests)
    assert fates(engine) == {"done": 1, "refused": 1, "useless": 1}
    both = served(Bring(), [*requests[:2], ask("b again", [*text("b4"), 1], 10)])
    assert fates(both) == {"done": 2, "harmful": 1, "useless": 1}, (
        "one took a free block, the other b's fourth"
    )


def test_the_policy_hears_of_every_load() -> None:
    engine = served(Bring(at=9.4), [*PUSHED_OUT, AGAIN], cost=Seconds(block=0.5))
    heard = Counter(fate for fate, _ in engine.policies.prefetch.heard)
    assert heard == Counter({"done": 2, "useful": 1, "late": 1})
    assert engine.totals.prefetch == dict.fromkeys(FATES, 0) | heard
    refused = served(Bring(evict=False), [*PUSHED_OUT, AGAIN])
    assert [fate for fate, _ in refused.policies.prefetch.heard] == ["refused", "refused"]
    assert ttft(refused, "again") == ttft(served("none", [*PUSHED_OUT, AGAIN]), "again")


def test_the_budget_is_what_may_be_under_way_and_the_rest_is_asked_for_again() -> None:
    """One block at a time, half a second each: the second is ordered when the first has arrived."""

    class Keep(Bring):
        def plan(self, waiting: Any, residency: Any, link_budget: int) -> list[Load]:
            self.asked.append(self.now)
            return [Load(b, evict=True) for b in residency.below(self.known["a"])] if self.now >= 5 else []

    requests = [
        ask("a", "a3", 0),
        ask("b", "b6", 2),
        ask("visitor", "v1", 5.2),  # comes while the first is under way, and gives occasion to ask
        ask("again", "a3 c1", 10),
    ]
    engine = served(Keep(), requests, num_blocks=6, cost=Seconds(block=0.5), prefetch_budget=1)
    ordered = [e.time / PS_PER_SECOND for e in engine.events if e.kind == ev.BLOCKS_PREFETCHED]
    # The visitor's step lasts until 5.7, for a block has to be saved: then the first is there.
    assert ordered == [5.0, 5.7, 6.2]
    assert fates(engine) == {"done": 3, "useful": 3}


# ---- when it is asked --------------------------------------------------------------------------------------------


class Awake(Bring):
    """Wants to be asked at times that make no sense."""

    when: str = "now"

    def wake_at(self) -> Any:
        later = {
            "now": 0.0,
            "soon": 1e-12,
            "next": 0.4,
            "past": -1e9,
            "never": inf,
            "late": 1e300,
            "nan": nan,
        }
        return self.now + later[self.when] if self.when in later else self.when


@pytest.mark.parametrize("when", ["now", "soon", "next", "past", "never", "late"])
def test_finite_work_ends_whatever_wake_at_says(when: str) -> None:
    long = [replace(r, sampling=SamplingParams(max_tokens=60)) for r in PUSHED_OUT]
    for skip in (True, False):
        engine = served(Awake(when=when), [*long, ask("last", "a1", 1000)], num_blocks=40, skip=skip)
        assert len(engine.finished) == 3
        asked = engine.policies.prefetch.asked
        assert len(asked) < (2200 if when in ("soon", "next") else 20)


def test_a_time_that_is_none_is_an_error_by_name() -> None:
    for when in ("nan", "later"):
        with pytest.raises(
            PolicyError, match=r"Awake wants to be asked at .*; wake_at\(\) returns seconds or None"
        ):
            served(Awake(when=when), PUSHED_OUT)


@pytest.mark.parametrize(("plan", "named"), [(["a block"], "'a block'"), ("a block", "'a block'"), (3, "3")])
def test_a_plan_that_is_none_is_an_error_by_name(plan: Any, named: str) -> None:
    class Odd(Bring):
        def plan(self, waiting: Any, residency: Any, link_budget: int) -> Any:
            return plan

    with pytest.raises(PolicyError, match=f"prefetch Odd planned {named}; a plan is a list of Load"):
        served(Odd(), PUSHED_OUT)


def test_it_is_woken_at_its_time_while_others_decode_and_a_leap_does_not_pass_it() -> None:
    """One request decodes for 30 s; at 5 s blocks come up beside it."""
    long = Request(request_id="long", prompt=text("l1"), arrival=2.5, sampling=SamplingParams(max_tokens=300))
    asked = {}
    for skip in (True, False):
        engine = served(
            Bring(at=5.03), [ask("a", "a2", 0), ask("b", "b9", 2), long, ask("again", "a2 c1", 12)],
            num_blocks=100, skip=skip, lookup="radix",
        )  # fmt: skip
        asked[skip] = engine.policies.prefetch.asked
        assert any(5.03 <= at < 5.14 for at in asked[skip]), "the first step that begins after its time"
        assert (sum(r.count for r in engine.steps) > 2 * len(engine.steps)) == skip
    assert asked[True] == asked[False]


def test_nobody_is_asked_before_something_happens() -> None:
    """Neither at the beginning nor while nothing runs: first when a request has come."""
    engine = served(Bring(at=1e13), [ask("a", "a2", 5), ask("b", "b2", 9)])
    assert engine.policies.prefetch.asked[0] == 5.0


def test_what_is_brought_up_counts_as_moved() -> None:
    engine = served(Bring(), [*PUSHED_OUT, AGAIN], cost=Seconds(block=0.5))
    assert engine.totals.moved.to_device == 2
    stored = [e for e in engine.events if (e.kind, e.medium) == (ev.BLOCK_STORED, "host")]
    assert engine.totals.moved.to_host == len(stored)


def test_none_is_asked_nothing() -> None:
    engine = served("none", [*PUSHED_OUT, AGAIN])
    assert engine.prefetching is None
    assert not any(engine.totals.prefetch.values())


# ---- what each brings up -----------------------------------------------------------------------------------------


def wanted_from_host(engine: Engine) -> int:
    """Blocks that admissions had to load themselves."""
    return sum(len(e.blocks) for e in engine.events if e.kind == ev.BLOCKS_LOADED)


def ups(engine: Engine) -> list[float]:
    """When blocks were prefetched, in seconds."""
    return [e.time / PS_PER_SECOND for e in engine.events if e.kind == ev.BLOCKS_PREFETCHED]


def test_next_block_brings_up_what_continues_a_hit() -> None:
    """x hits a's first block and computes another; a's further blocks come up beside it."""
    requests = [
        ask("a", "a4", 0), ask("b", "b8", 2), ask("x", "a1 x1", 5), ask("again", "a4 c1", 10),
    ]  # fmt: skip
    none = served("none", requests, num_blocks=8)
    assert wanted_from_host(none) == 4
    for degree in (1, 2, 5):
        engine = served(pl.make("prefetch", "next-block", degree=degree), requests, num_blocks=8)
        up = min(degree, 3)
        assert fates(engine) == {"done": up, "useful": up}
        assert ups(engine) == [5.0] * up
        assert wanted_from_host(engine) == 4 - up


@pytest.mark.parametrize("lookup", ["chained-hash", "radix"])
def test_children_are_the_blocks_that_continue_a_block_in_the_host_tier_alone(lookup: str) -> None:
    """Against a look at every block of the host, after everything that was ever asked."""

    class Look(Prefetch):
        def used(self, sequence: Any, blocks: Any) -> None:
            self.last = blocks[-1] if blocks else None

        def plan(self, waiting: Any, residency: Any, link_budget: int) -> list[Load]:
            last = getattr(self, "last", None)
            if last is not None and last.key is not None:
                cache = engine_of[0].cache
                found = [
                    b
                    for b in cache.host.blocks
                    if b.key is not None
                    and b.parent == last.serial
                    and not any(d.key == b.key and d.serial == b.serial for d in cache.device.blocks)
                ]
                assert set(residency.children(last)) == set(found)
                seen.update([len(found)])
            return []

    seen: Counter[int] = Counter()
    engine_of: list[Engine] = []
    config = Config(
        num_blocks=8, block_size=SIZE, host_blocks=12, swap="host", lookup=lookup, prefetch=Look()
    )
    executor = SimulatedExecutor(Seconds(), max_model_len=4096, shape=SHAPE)
    engine_of.append(engine := Engine(config, executor, clock=VirtualClock()))
    words = [
        "a1 b1 c2",
        "a1 b1 d2",
        "a1 b1 e1 f1",
        "g5",
        "a1 h3",
        "a1 b1 i4",
        "j6",
        "a1 b1 c2 k1",
        "a1 b1 l1",
    ]
    for i, word in enumerate(words * 6):
        engine.add(ask(str(i), word, 0.3 * i))
    engine.run()
    assert seen[0]
    assert max(seen) > 1, f"no choice was ever seen: {seen}"


def turns(pauses: list[float], *, session: str = "s", gap: float = 2.0) -> list[Request]:
    """Turns of one conversation with think times in seconds, and after each a stranger who pushes it out."""
    words, out = "a2", []
    for i, pause in enumerate([0.0, *pauses]):
        before = f"{session}{i - 1}" if i else None
        turn = ask(f"{session}{i}", f"{words} {'bcdefghi'[i]}1", 0, session=session)
        out.append(replace(turn, follows=before, think_time=pause))
        out.append(ask(f"stranger {i}", f"{'rstuvwxyz'[i]}6", 0, follows=f"{session}{i}", think_time=gap))
        words += f" {'bcdefghi'[i]}1"
    return out


def test_think_time_brings_a_session_up_before_its_next_turn() -> None:
    """Ten seconds of thought each time: the more often that was so, the less before it."""
    requests = turns([10.0, 10.0, 10.0])
    cost = Seconds(block=0.2)
    none = served("none", requests, num_blocks=6, cost=cost)
    engine = served(ThinkTime(deviations=0.5), requests, num_blocks=6, cost=cost)
    answered = [engine.groups[f"s{i}"].sequences[0].finished_at / PS_PER_SECOND for i in range(4)]
    # Nothing is known until the second turn has come, and after the last nothing comes.
    due = [round(answered[i] + 10 - 0.5 * off, 6) for i, off in ((1, 20 / e), (2, 10 / e))]
    assert sorted({round(at, 6) for at in ups(engine)}) == due
    assert fates(engine) == {"done": 9, "useful": 4 + 5}, "what the third and the fourth turn find"
    assert ttft(engine, "s1") == ttft(none, "s1")
    for turn in ("s2", "s3"):
        assert ttft(engine, turn) < ttft(none, turn)


def test_think_times_are_estimated_by_session_and_over_all() -> None:
    policy = ThinkTime(smoothing=0.5)
    policy.reset()

    class Clock(View):
        time = 0.0

        @property
        def now(self) -> int:
            return round(self.time * PS_PER_SECOND)

    clock = Clock()
    policy.attach(clock)

    def turn(session: str, thought: float) -> None:
        sequence: Any = type("Turn", (), {"session": session})()
        policy.finished(sequence)
        clock.time += thought
        policy.arrived(sequence)

    turn("quick", 2.0)
    assert policy.expected("anybody") == pytest.approx((2.0, 4 / e))
    turn("slow", 10.0)
    # The second of all, and off by 8 from what was expected then.
    assert policy.expected("anybody") == pytest.approx((6.0, (4 / e + 8) / 2))
    assert policy.expected("slow") == pytest.approx(((10 + 2 * 6) / 3, (20 / e + (4 / e + 8)) / 3))
    turn("slow", 20.0)
    mean, deviation = 6 + 0.5 * 14, ((4 / e + 8) / 2 + 14) / 2
    assert policy.expected("quick") == pytest.approx(((2 + 2 * mean) / 3, (4 / e + 2 * deviation) / 3))
    assert policy.expected("slow") == pytest.approx(((15 + mean) / 2, ((20 / e + 10) / 2 + deviation) / 2))


def test_what_is_remembered_of_sessions_is_bounded() -> None:
    for name in ("think-time", "agent-step"):
        policy: Any = pl.make("prefetch", name, capacity=5)
        requests = [
            ask(f"{i}.{turn}", [i] * 9, 10 * i + turn, session=str(i), hints=Hints(agent_step=turn))
            for i in range(20)
            for turn in range(3)
        ]
        state = served(policy, requests).policies.prefetch
        tables = ("_own", "_pauses", "_due") if name == "think-time" else ("_steps", "_turns")
        for table in tables:
            assert len(getattr(state, table)) <= 5
        assert len(getattr(state, tables[0])) == 5


def workflow(**hints: bool) -> list[Request]:
    """Two agents by turns: "p" at steps 0 and 2, "q" at 1 and 3. Each pushes out what the other left."""
    out: list[Request] = []
    for step in range(4):
        agent, size = ("p", 4) if step % 2 == 0 else ("q", 5)
        known = Hints(agent_step=step, next_step=step + 2 if hints.get("told") else None)
        out.append(
            replace(
                ask(f"step {step}", f"{agent}{size} {'klmn'[step]}1", 0, session="w", hints=known),
                follows=f"step {step - 1}" if step else None,
                think_time=3.0,
                sampling=SamplingParams(max_tokens=8),
            )
        )
    return out


@pytest.mark.parametrize("told", [True, False])
def test_agent_step_brings_up_the_agent_whose_turn_is_next(told: bool) -> None:
    cycle = 1 if told else 2
    policy = pl.make("prefetch", "agent-step", cycle=cycle)
    none = served("none", workflow(told=told), num_blocks=8)
    engine = served(policy, workflow(told=told), num_blocks=8)
    assert wanted_from_host(none) > 0
    # While q's step runs, p's is the next one, and comes up as soon as q's answer is there.
    assert wanted_from_host(engine) == 0
    assert fates(engine)["useful"] >= wanted_from_host(none)
    far = served(pl.make("prefetch", "agent-step", cycle=5), workflow(told=False), num_blocks=8)
    assert fates(far) == {}, "nobody is due within one step"


def test_markov_learns_what_follows_what() -> None:
    """x, y and z by turns, in a pool for one and a half of them: once y has followed x twice, it comes up after x."""
    requests = [
        ask(f"{w}{i}", f"{w}3 {'klmno'[i]}1", 5.0 * (3 * i + j))
        for i in range(5)
        for j, w in enumerate("xyz")
    ]
    none = served("none", requests, num_blocks=6)
    engine = served(Markov(), requests, num_blocks=6)
    assert wanted_from_host(engine) + fates(engine)["useful"] == wanted_from_host(none)
    useful = {e.time for e in engine.events if e.kind == ev.PREFETCH_ENDED and e.detail == "useful"}
    found_by = {s.request_id for s in engine.finished if s.admitted_at in useful}
    # A prefix is first hit in round 1, and y after x in rounds 1 and 2: round 3 is the first in which that is known.
    assert found_by == {f"{word}{i}" for word in "xyz" for i in (3, 4)} - {"x3"}


def test_markov_table_against_a_naive_count() -> None:
    policy = Markov(lookahead=2, fanout=100)
    policy.reset()
    hits = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5]
    naive: Counter[tuple[int, int]] = Counter()
    for i, key in enumerate(hits):
        block = Block(0)
        block.key = key
        policy.used(type("Hit", (), {"session": None})(), [block])  # type: ignore[arg-type]
        naive.update({(before, key) for before in hits[max(0, i - 2) : i]})
    assert {(a, b): n for a, after in policy._after.items() for b, n in after.items()} == naive
    small = Markov(capacity=3, fanout=2)
    small.reset()
    for i in range(200):
        block = Block(0)
        block.key = i * i % 11
        small.used(type("Hit", (), {"session": None})(), [block])  # type: ignore[arg-type]
        assert len(small._chains) <= 3
        assert set(small._after) <= set(small._chains) == set(small._times)
        assert all(len(after) <= 2 for after in small._after.values())


# ---- the oracle --------------------------------------------------------------------------------------------------


def test_the_oracle_brings_up_whoever_comes_next() -> None:
    """a, b and c by turns in a pool for two of them: every block that is wanted is there before it is wanted."""
    requests = [
        ask(f"{w}{i}", f"{w}3 {'klmnop'[i]}1", 10.0 * (3 * i + j))
        for i in range(4)
        for j, w in enumerate("abc")
    ]
    none = served("none", requests, num_blocks=8)
    engine = served(Oracle(depth=1), requests, num_blocks=8)
    assert wanted_from_host(none) > 0
    assert wanted_from_host(engine) == 0
    assert fates(engine) == {"done": wanted_from_host(none), "useful": wanted_from_host(none)}


def test_the_oracle_knows_followers_once_their_predecessor_has_ended() -> None:
    engine = served(Oracle(depth=2), turns([10.0, 10.0, 10.0]), num_blocks=6, cost=Seconds(block=0.2))
    assert fates(engine)["done"] == fates(engine)["useful"] == 3 + 4 + 5


def test_the_oracle_is_refused_where_the_future_is_not_known() -> None:
    config = Config(prefetch="oracle", swap="host")
    with pytest.raises(ConfigError, match="prefetch 'oracle' needs the future: run and simulate know it"):
        Engine(config, SimulatedExecutor(Seconds()))
    with pytest.raises(ConfigError, match="needs the future"):
        Oracle().reset()
    assert pl.simulate(config, turns([1.0]), cost=Seconds(), progress=False).summary()["finished"] == 4
    with pytest.raises(ConfigError, match="eviction 'belady' needs the future"):
        Engine(Config(eviction="belady"), SimulatedExecutor(Seconds()), knows_future=True)


def test_as_much_of_the_future_is_shown_as_is_asked_for() -> None:
    engine = Engine(Config(), SimulatedExecutor(Seconds()), clock=VirtualClock())
    for i, at in enumerate((3.0, 1.0, 4.0, 1.5)):
        engine.add(ask(f"r{i}", "a1", at))
    future = KnownFuture(engine.coming)
    for n in range(6):
        coming = [(arrival.at, arrival.sequence.request_id) for arrival in future.coming(n)]
        assert coming == [(1.0, "r1"), (1.5, "r3"), (3.0, "r0"), (4.0, "r2")][:n]


def test_with_nothing_to_run_the_engine_says_when_there_will_be() -> None:
    """The next arrival, or before it the time at which the prefetcher wants to be asked."""
    config = Config(num_blocks=5, block_size=SIZE, host_blocks=64, swap="host", prefetch=Bring(at=5.0))
    engine = Engine(config, SimulatedExecutor(Seconds(), shape=SHAPE), clock=VirtualClock())
    for request in [*PUSHED_OUT, AGAIN]:
        engine.add(request)
    while len(engine.finished) < 2:
        engine.step()
    assert engine.rest() == 5 * PS_PER_SECOND
    engine.clock.wait_until(6 * PS_PER_SECOND)
    assert engine.rest() == 10 * PS_PER_SECOND
    assert engine.totals.prefetch["done"] == 2, "its time had come"
    engine.clock.wait_until(10 * PS_PER_SECOND)
    assert engine.rest() == 10 * PS_PER_SECOND
    engine.run()
    assert engine.rest() is None


# ---- what a run says of it ---------------------------------------------------------------------------------------


def simulated_run(prefetch: Any, requests: list[Request], **options: Any) -> Run:
    config = Config(num_blocks=5, block_size=SIZE, host_blocks=64, swap="host", prefetch=prefetch)
    return pl.simulate(config, requests, cost=Seconds(), progress=False, **options)


def test_a_run_tells_of_every_load(tmp_path: Path) -> None:
    run = simulated_run(Bring(), [*PUSHED_OUT, ask("b again", "b5", 8), ask("last", "c1", 9)])
    assert run.prefetch["time"].tolist() == [5.0, 5.0]
    assert run.prefetch["fate"].tolist() == ["harmful", "harmful"]
    assert run.prefetch["fate_time"].tolist() == [8.0, 8.0]
    idle = simulated_run(Bring(), [*PUSHED_OUT, ask("last", "b1 d1", 9)])
    assert idle.prefetch["fate"].tolist() == ["useless", "useless"]
    assert idle.prefetch["fate_time"].isna().all()
    for one in (run, idle):
        summary = one.summary()
        assert (
            summary["prefetch_done"] == len(one.prefetch) == sum(summary[f"prefetch_{fate}"] for fate in ENDS)
        )
        for fate in ENDS:
            assert summary[f"prefetch_{fate}"] == (one.prefetch["fate"] == fate).sum()
    silent = simulated_run(Bring(), [*PUSHED_OUT, AGAIN], events=False)
    assert silent.prefetch.empty
    assert silent.summary()["prefetch_useful"] == 2
    registered = simulated_run(ThinkTime(), turns([10.0, 10.0]))
    loaded = pl.load_run(registered.save(tmp_path / "run"))
    assert loaded.summary() == registered.summary()
    assert loaded.prefetch.equals(registered.prefetch)


def test_a_comparison_shows_how_loads_ended() -> None:
    runs = {
        "none": simulated_run("none", [*PUSHED_OUT, AGAIN]),
        "mine": simulated_run(Bring(), [*PUSHED_OUT, AGAIN]),
    }
    comparison = pl.Comparison(runs, how="simulate")
    frame = comparison.to_frame()
    assert frame.prefetch_useful.tolist() == [0, 2]
    headings, rows = comparison.table()
    shown = dict(zip(headings, rows[1]))
    assert (shown["prefetched"], shown["… useful"]) == ("2", "2")
    assert "… harmful" not in headings
    assert "2 blocks: 2 useful" in runs["mine"]._repr_html_()


def test_a_run_in_real_time_wakes_the_prefetcher_while_nothing_runs() -> None:
    """The engine does not sleep through it, and Ctrl-C would be heard: `drive` waits a little at a time."""
    config = Config(num_blocks=5, block_size=SIZE, host_blocks=64, swap="host", prefetch=Bring(at=0.15))
    requests = [ask("a", "a2", 0), ask("b", "b5", 0.05), ask("again", "a2 c1", 0.4)]
    run = pl.run(config, requests, executor=StubExecutor(vocab_size=20_000), progress=False)
    assert run.prefetch["fate"].tolist() == ["useful", "useful"]
    assert ((run.prefetch["time"] >= 0.15) & (run.prefetch["time"] < 0.4)).all()


# ---- laws --------------------------------------------------------------------------------------------------------

NAMES = [name for name in servable("prefetch") if name != "none"]


def sociable(scenario: Scenario, *, unit: float = 1.0) -> Scenario:
    """The same requests as turns of two sessions and steps of two workflows: something to be learnt from.

    Every third still comes by itself. ``unit`` is what a second of thought or arrival takes.
    """
    requests: list[Request] = []
    last: dict[str, str] = {}
    for i, request in enumerate(scenario.requests):
        session = "st"[i % 2]
        follows = last.get(session) if i % 3 else None
        last[session] = request.request_id
        requests.append(
            replace(
                request,
                arrival=request.arrival * unit,
                session=session,
                follows=follows,
                think_time=unit * (i % 4) * 2.5,
                hints=replace(
                    request.hints, agent_step=i // 2, next_step=(None, i // 2 + 1, i // 2 + 2)[i % 3]
                ),
            )
        )
    return replace(scenario, requests=requests, cancels={}, clears=frozenset())


def with_host(name: str) -> st.SearchStrategy[Scenario]:
    """Scenarios in which blocks go down and prefetcher ``name`` may bring them up."""
    return scenarios(
        choose={"prefetch": (name,), "swap": ("host",), "lookup": ("chained-hash", "radix")}, max_requests=10
    )


def closed(engine: Engine) -> None:
    """Every load that was carried out has had one end."""
    counts = engine.prefetched
    assert counts["done"] == sum(counts[fate] for fate in ENDS)
    said = Counter(e.detail for e in engine.events if e.kind == ev.PREFETCH_ENDED)
    assert all(engine.totals.prefetch[fate] == said[fate] for fate in ENDS)


def crowd(seed: int, name: str) -> Scenario:
    """Sessions and workflows whose prompts grow, over shared beginnings, in a pool that is much too small for all."""
    pick = Random(seed)
    size = pick.choice((1, 2, 4))
    openings = [[pick.randrange(4) for _ in range(3 * size)] for _ in range(3)]
    requests: list[Request] = []
    for session in "stuv":
        text = list(pick.choice(openings))
        for turn in range(4):
            text += [pick.randrange(4) for _ in range(pick.randint(1, 3 * size))]
            told = pick.choice((None, turn + 1, turn + 2))
            request = Request(
                request_id=f"{session}{turn}",
                prompt=list(text),
                arrival=float(pick.randint(0, 6)),
                session=session,
                follows=f"{session}{turn - 1}" if turn else None,
                think_time=pick.choice((0.0, 3.0, 12.0, 30.0)),
                hints=Hints(agent_step=turn, next_step=told),
                sampling=SamplingParams(max_tokens=pick.randint(1, 6), n=pick.choice((1, 1, 2))),
            )
            requests.append(request)
    for visit in range(12):
        text = [*openings[visit % 3], *(pick.randrange(4) for _ in range(size))]
        requests.append(
            Request(
                request_id=str(visit),
                prompt=text,
                arrival=25.0 * visit,
                sampling=SamplingParams(max_tokens=pick.randint(1, 6)),
            )
        )
    eager: dict[str, Any] = {"support": 1, "confidence": 0.0} if name == "markov" else {}
    config = Config(
        num_blocks=blocks_for_longest(requests, size) + pick.randint(0, 4),
        block_size=size,
        host_blocks=200,
        swap="host",
        preemption=pick.choice(("swap", "recompute")),
        lookup=pick.choice(("chained-hash", "radix")),
        eviction=pick.choice(("lru", "lfu", "fifo", "kvflow")),
        prefetch=pl.make("prefetch", name, **eager),
        prefetch_budget=pick.choice((1, 64)),
        max_num_seqs=pick.choice((2, 4)),
        max_num_batched_tokens=pick.choice((3, 64)),
        max_model_len=100,
    )
    return Scenario(config, requests)


@pytest.mark.parametrize("name", NAMES)
def test_laws_5_and_7_with_every_prefetcher(name: str) -> None:
    @settings(max_examples=examples(0.25))
    @given(with_host(name))
    def holds(scenario: Scenario) -> None:
        scenario = sociable(scenario)
        engine = serve(scenario)
        says_the_truth(engine, scenario)
        closed(engine)

    holds()
    seen: Counter[str] = Counter()
    for seed in range(8):
        scenario = crowd(seed, name)
        engine = serve(scenario)
        says_the_truth(engine, scenario)
        closed(engine)
        seen.update(engine.prefetched)
    assert seen["useful"], f"nothing of use was ever brought up: {seen}"


@pytest.mark.parametrize("name", [*NAMES, "oracle"])
def test_law_6_with_every_prefetcher(name: str) -> None:
    """Leaping equals walking, with transfers that take none, some or much of the time."""

    def same(config: Config, requests: list[Request], block: float) -> Engine:
        leapt, walked = (
            on_virtual_clock(config, requests, Seconds(block=block), skip=skip) for skip in (True, False)
        )
        assert event_rows(leapt) == event_rows(walked)
        assert left_behind(leapt) == left_behind(walked)
        closed(leapt)
        return leapt

    @settings(max_examples=examples(0.25))
    @given(
        with_host(name), st.booleans(), st.sampled_from((0.0, 0.3, 5.0)), st.sampled_from((1e-2, 1.0, 40.0))
    )
    def holds(scenario: Scenario, pipelined: bool, block: float, unit: float) -> None:
        scenario = sociable(scenario, unit=unit)
        same(scenario.config.replace(async_scheduling=pipelined), scenario.requests, block)

    holds()
    seen: Counter[str] = Counter()
    for seed in range(8):
        scenario = crowd(seed, name)
        longer = [
            replace(r, sampling=replace(r.sampling, max_tokens=7 * r.sampling.max_tokens))
            for r in scenario.requests
        ]
        config = scenario.config.replace(
            async_scheduling=seed % 2 == 1,
            num_blocks=blocks_for_longest(longer, scenario.config.block_size) + 3,
        )
        seen.update(same(config, longer, (0.0, 0.02, 1.0)[seed % 3]).prefetched)
    assert seen["useful"], f"nothing of use was ever brought up: {seen}"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_and_its_simulation_prefetch_alike(name: str) -> None:
    """On a step clock transfers are done with the step that orders them, in both."""
    for seed in range(6):
        scenario = crowd(seed, name)
        real = serve(scenario, check=False)
        again = simulated(scenario.config, scenario.requests, scripts(real), StepClock(), skip=bool(seed % 2))
        assert event_rows(real) == event_rows(again)
        assert left_behind(real) == left_behind(again)


# ---- the tests are tested ----------------------------------------------------------------------------------------


BUGS = [
    (
        Bug("a leap passes the time", Engine, "_reach", "self.prefetching.next_ask()", "None", ""),
        test_it_is_woken_at_its_time_while_others_decode_and_a_leap_does_not_pass_it,
    ),
    (
        Bug(
            "what is under way counts as there", Prefetching, "hear", "is not None:", "is NotImplemented:", ""
        ),
        test_a_block_that_is_wanted_on_its_way_is_late_and_waited_for,
    ),
    (
        Bug("nobody waits for what is late", Engine, "step", "self.prefetching.wait_ps(start)", "0", ""),
        test_a_block_that_is_wanted_on_its_way_is_late_and_waited_for,
    ),
    (
        Bug(
            "a late load counts twice",
            SimulatedExecutor,
            "execute",
            "orders.wait_ps",
            "2 * orders.wait_ps",
            "",
        ),
        test_a_block_that_is_wanted_on_its_way_is_late_and_waited_for,
    ),
    (
        Bug("loads hold up the step", Prefetching, "take_own", "min(self._ordered, len(moves))", "0", ""),
        test_a_block_that_is_up_before_it_is_wanted_is_useful,
    ),
    (
        Bug(
            "a displaced block is forgotten",
            Prefetched,
            "begin",
            "if displaced is not None:",
            "if False:",
            "",
        ),
        test_a_block_whose_place_is_missed_first_is_harmful,
    ),
    (
        Bug("the budget forgets what is under way", Prefetching, "ask", "self.link.under_way(now)", "0", ""),
        test_the_budget_is_what_may_be_under_way_and_the_rest_is_asked_for_again,
    ),
    (
        Bug(
            "what was cut off is not asked for again",
            Prefetching,
            "next_ask",
            "if self._cut:",
            "if False:",
            "",
        ),
        test_the_budget_is_what_may_be_under_way_and_the_rest_is_asked_for_again,
    ),
    (
        Bug(
            "there is no end to asking",
            Engine,
            "_prefetch_idle",
            "range(_IDLE_ASKS)",
            "range(5 * _IDLE_ASKS)",
            "",
        ),
        lambda: test_finite_work_ends_whatever_wake_at_says("soon"),
    ),
]


@pytest.mark.parametrize(("bug", "check"), BUGS, ids=lambda each: getattr(each, "name", ""))
def test_a_planted_bug_is_caught(bug: Bug, check: Any) -> None:
    check()
    with bug.planted(), pytest.raises(Exception) as caught:
        check()
    assert not isinstance(caught.value, NameError | ImportError | SyntaxError)
