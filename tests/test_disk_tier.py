"""The disk tier: what goes down to it and when, and that a disk that fails costs a recompute and never a wrong token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    Scenario,
    event_rows,
    examples,
    mechanisms,
    says_the_truth,
    scenarios,
    serve,
)
from test_faults import Fault, persist
from test_law5_stub import conversation
from test_law6 import left_behind, quiet, scripts, simulated

from pagedlab import events as ev
from pagedlab.config import Config
from pagedlab.engine.clock import StepClock, VirtualClock
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import DEVICE, DISK, HOST, Move
from pagedlab.errors import ConfigError
from pagedlab.executors.stub import StubExecutor
from pagedlab.policies.swap import ADMISSIONS
from pagedlab.registry import make

DISKS = {"choose": {"swap": ("disk",), "lookup": ("chained-hash", "radix")}}
SMALL = {"host_blocks": 6, "disk_blocks": 40}


# ---- what goes down, and when ------------------------------------------------------------------------------------


def turns(swap: Any, **sizes: int) -> Scenario:
    """Conversations that push each other out of the device and the host, and come once more."""
    scenario = conversation("chained-hash", **SMALL | sizes)
    scenario.requests = [
        replace(r, request_id=f"{r.request_id}.{again}", arrival=r.arrival + 60 * again)
        for again in range(2)
        for r in scenario.requests
    ]
    scenario.config = scenario.config.replace(swap=swap, preemption="recompute")
    return scenario


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_every_admission_brings_blocks_to_the_disk_and_back(admission: str) -> None:
    scenario = turns(make("swap", "disk", admission=admission))
    engine = serve(scenario)
    says_the_truth(engine, scenario)
    seen = mechanisms(engine)
    for what in ("kept on host", "kept on disk", "prefix loaded from disk"):
        assert seen[what], f"{what} did not happen"
    assert engine.totals.moved.to_disk == seen["kept on disk"]
    assert engine.totals.moved.from_disk > 0
    assert engine.steps[-1].moved == engine.totals.moved


def test_what_is_written_through_lies_below_as_soon_as_it_is_stored() -> None:
    """Nothing is evicted here, so nothing but writing through can bring anything down."""
    requests = conversation().requests[:2]
    for admission in ADMISSIONS:
        swap = make("swap", "disk", admission=admission)
        config = Config(swap=swap, num_blocks=64, block_size=2, host_blocks=64, disk_blocks=64)
        engine = serve(Scenario(config, requests))
        stored = [sum(b.key is not None for b in pool.blocks) for pool in engine.cache.pools]
        assert stored[DEVICE] > 0
        assert stored == ([stored[DEVICE]] * 3 if admission == "write-through" else [stored[DEVICE], 0, 0])
        assert engine.totals.moved.to_disk == stored[DISK]


def test_writing_through_waits_for_as_many_hits_as_are_asked_for() -> None:
    swap = make("swap", "disk", admission="write-through", min_hits=2)
    one = conversation().requests[0]
    requests = [replace(one, request_id=str(i), arrival=20.0 * i) for i in range(4)]
    config = Config(swap=swap, num_blocks=64, block_size=2, host_blocks=64, disk_blocks=64)
    engine = Engine(config, StubExecutor(), clock=StepClock())
    kept = []
    for request in requests:
        engine.add(request)
        engine.run()
        kept.append(sum(e.kind == ev.BLOCK_STORED and e.medium == "disk" for e in engine.events))
    assert kept[:2] == [0, 0], "stored before it was hit twice"
    assert kept[2] > 0
    assert kept[3] == kept[2], "stored although it is there"


class Chosen:
    """A block that somebody gives up, as a swap policy sees it."""

    def __init__(self, key: int, hits: int) -> None:
        self.key, self.hits = key, hits


def test_on_second_use_takes_what_was_hit_or_comes_again() -> None:
    swap: Any = make("swap", "disk", admission="on-second-use")
    swap.reset(capacities=[4, 2, 8])
    assert not swap.eager
    assert swap.store(Chosen(1, hits=1), HOST)
    assert not swap.store(Chosen(2, hits=0), HOST)
    assert not swap.store(Chosen(2, hits=0), DISK), "the tiers know nothing of each other"
    assert swap.store(Chosen(2, hits=0), HOST)
    assert not swap.store(Chosen(2, hits=0), HOST), "it begins anew"
    for key in (3, 4):
        assert not swap.store(Chosen(key, hits=0), HOST)
    assert not swap.store(Chosen(2, hits=0), HOST), "no more keys are remembered than the tier has blocks"
    swap.reset(capacities=[4, 2, 8])
    assert not swap.store(Chosen(4, hits=0), HOST), "a new run knows nothing"
    strict: Any = make("swap", "disk", admission="on-second-use", min_hits=2)
    strict.reset(capacities=[4, 2, 8])
    assert not strict.store(Chosen(1, hits=1), HOST)
    assert strict.store(Chosen(1, hits=2), HOST)


def test_each_tier_has_its_own_eviction() -> None:
    swap = make("swap", "disk", eviction="fifo", disk_eviction="lfu")
    engine = Engine(Config(swap=swap, eviction="lru"), StubExecutor(), clock=StepClock())
    assert [type(pool.eviction).name for pool in engine.cache.pools] == ["lru", "fifo", "lfu"]
    left = {
        name: event_rows(serve(turns(make("swap", "disk", disk_eviction=name), disk_blocks=8)))
        for name in ("lru", "fifo")
    }
    assert left["lru"] != left["fifo"], "an option that changes nothing"


def test_sizes_of_the_disk_tier() -> None:
    assert Config(swap="disk", num_blocks=10).num_disk_blocks == 40
    assert Config(swap="disk", host_blocks=3).num_disk_blocks == 12
    assert Config(swap="disk", disk_blocks=7).num_disk_blocks == 7
    assert Config(swap="host", disk_blocks=7).num_disk_blocks == 0
    assert Engine(Config(swap="host", disk_blocks=7), StubExecutor()).cache.disk is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"swap": "disk", "disk_blocks": 0}, "disk_blocks must be at least 1"),
        ({"swap": "disk", "host_blocks": 0}, "host_blocks must be at least 1"),
        ({"disk_blocks": -1}, "disk_blocks must be a whole number of at least 0"),
        ({"disk_path": 3}, "disk_path must be a folder"),
        ({"disk_path": ""}, "disk_path must be a folder"),
        ({"swap": make("swap", "disk", disk_eviction="lur")}, "lru"),
        ({"swap": make("swap", "disk", disk_eviction="belady")}, "needs the future"),
    ],
)
def test_a_disk_that_cannot_be_is_refused_by_name(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Config(**wrong)
    assert "\n" not in str(caught.value)


# ---- laws 5 and 6 with a disk --------------------------------------------------------------------------------------


@settings(max_examples=examples(1.0))
@given(scenarios(**DISKS))
def test_a_disk_never_changes_what_is_said(scenario: Scenario) -> None:
    says_the_truth(serve(scenario), scenario)


@settings(max_examples=examples(0.7))
@given(scenarios(**DISKS), st.booleans(), st.booleans())
def test_simulate_and_run_move_the_same(scenario: Scenario, pipelined: bool, skip: bool) -> None:
    scenario = quiet(scenario)
    scenario.config = scenario.config.replace(async_scheduling=pipelined)
    real = serve(scenario, check=False)
    again = simulated(scenario.config, scenario.requests, scripts(real), StepClock(), skip=skip)
    assert event_rows(real) == event_rows(again)
    assert left_behind(real) == left_behind(again)


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_leaping_equals_walking_with_a_disk(admission: str) -> None:
    scenario = turns(make("swap", "disk", admission=admission))
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=17)) for r in scenario.requests]
    config = scenario.config.replace(block_size=8, prefetch="none")
    leapt, walked = (simulated(config, requests, None, VirtualClock(), skip=skip) for skip in (True, False))
    assert len(leapt.steps) < len(walked.steps), "nothing was leapt over"
    assert event_rows(leapt) == event_rows(walked)
    assert left_behind(leapt) == left_behind(walked)


# ---- faults, on the stub -------------------------------------------------------------------------------------------


def failing(rate: float, seed: int, ways: tuple[int, ...] = (DISK, DEVICE)) -> Callable[[Move], str | None]:
    """Moves to these tiers fail at ``rate``, the same ones every time."""
    pick = Random(seed)

    def reason(move: Move) -> str | None:
        return "damaged" if move.dst_tier in ways and pick.random() < rate else None

    return reason


def with_faults(scenario: Scenario, rate: float, seed: int = 0, **ways: Any) -> StubExecutor:
    executor = scenario.executor()
    executor.disk_fault = failing(rate, seed, **ways)
    return executor


def faults_of(engine: Engine) -> list[Any]:
    return [e for e in engine.events if e.kind == ev.TIER_FAULT]


@settings(max_examples=examples(1.5))
@given(
    scenarios(**DISKS),
    st.sampled_from((0.1, 0.5, 1.0)),
    st.integers(0, 5),
    st.sampled_from(((DISK,), (DEVICE,), (DISK, DEVICE))),
)
def test_a_disk_that_fails_never_changes_what_is_said(
    scenario: Scenario, rate: float, seed: int, ways: tuple[int, ...]
) -> None:
    engine = serve(scenario, with_faults(scenario, rate, seed, ways=ways))
    says_the_truth(engine, scenario)
    found = faults_of(engine)
    assert engine.totals.tier_faults == len(found)
    assert {(e.medium, e.detail) for e in found} <= {("disk", "damaged")}


def fixed_faults() -> Iterator[tuple[Scenario, float, int, tuple[int, ...]]]:
    """Runs in which disks fail in every way."""
    for lookup in ("chained-hash", "radix"):
        for admission in ADMISSIONS:
            for preemption in ("recompute", "swap"):
                scenario = conversation(lookup, **SMALL)
                scenario.config = scenario.config.replace(
                    swap=make("swap", "disk", admission=admission), preemption=preemption
                )
                for rate, ways in ((0.3, (DEVICE,)), (1.0, (DEVICE,)), (0.5, (DISK,)), (0.3, (DISK, DEVICE))):
                    yield scenario, rate, len(lookup), ways


def test_the_planted_faults_are_survived() -> None:
    told = put_back = 0
    for scenario, rate, seed, ways in fixed_faults():
        engine = serve(scenario, with_faults(scenario, rate, seed, ways=ways))
        says_the_truth(engine, scenario)
        told += len(faults_of(engine))
        put_back += mechanisms(engine)["preempted by fault"]
    assert told > 100
    assert put_back > 10


class Broken(StubExecutor):
    """Every disk move fails at a rate, and now and then a move or a batch is cut short besides."""

    def __init__(self, cut: float, faults: int, **params: Any) -> None:
        super().__init__(disk_fault=failing(0.4, faults), **params)
        self.cut, self.pick, self.raised = cut, Random(faults), 0

    def _perhaps(self) -> None:
        if self.pick.random() < self.cut:
            self.raised += 1
            raise Fault

    def move(self, moves: Any) -> None:
        while moves:
            self._perhaps()
            first = type(moves)([moves[0]])
            super().move(first)
            moves.popleft()

    def execute(self, orders: Any) -> Any:
        self._perhaps()
        return super().execute(orders)


@settings(max_examples=examples(0.7))
@given(scenarios(**DISKS), st.integers(0, 9))
def test_faults_of_the_disk_and_of_the_executor_together(scenario: Scenario, seed: int) -> None:
    executor = Broken(0.1, seed, vocab_size=scenario.vocab, seed=scenario.seed, eos_token_id=scenario.eos)
    engine = Engine(scenario.config, executor, clock=StepClock())
    for request in scenario.requests:
        engine.add(request)
    assert persist(engine, scenario) == executor.raised
    says_the_truth(engine, scenario)
