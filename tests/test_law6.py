"""Law 6: the simulator tells the truth. Same decisions, same events, at the same times; leaping equals walking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scenario, ended, event_rows, examples, scenarios, servable, serve

import pagedlab as pl
from pagedlab.config import Config
from pagedlab.costs.base import CostModel, StepWork
from pagedlab.engine.clock import StepClock, VirtualClock
from pagedlab.engine.engine import Engine, _steps_until
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.engine.script import Script
from pagedlab.executors.simulated import SimulatedExecutor
from pagedlab.policies.prompt import HashedPrompt


class Linear(CostModel):
    """Some fixed cost, and some for every token of context."""

    fixed: int = 1000
    slope: int = 7

    def step_ps(self, work: StepWork) -> int:
        return self._rest(work) + self.slope * work.context_tokens

    def _rest(self, work: StepWork) -> int:
        return self.fixed + 13 * work.prefill_tokens + 3 * work.prefill_pairs + 5 * work.decode_seqs

    def linear(self, work: StepWork) -> tuple[int, int] | None:
        return self._rest(work), self.slope


class Crooked(Linear):
    """Not linear in the context, so it has to be walked."""

    def step_ps(self, work: StepWork) -> int:
        return super().step_ps(work) + work.context_tokens**2

    def linear(self, work: StepWork) -> tuple[int, int] | None:
        return None


def scripts(engine: Engine) -> dict[tuple[str, int], Script]:
    """What a run said, to be said again."""
    return {
        (s.request_id, s.sample_index): Script(
            max(1, len(s.output)), s.output, "stop" if s.finish_reason == "stop" else "length"
        )
        for g in engine.groups.values()
        for s in g.sequences
    }


def simulated(
    config: Config,
    requests: list[Request],
    outputs: Any,
    clock: Any,
    *,
    skip: bool,
    cost: CostModel | None = None,
) -> Engine:
    executor = SimulatedExecutor(cost or Linear(), outputs=outputs, max_model_len=4096)
    engine = Engine(config, executor, clock=clock, skip_ahead=skip)
    for request in requests:
        engine.add(request)
    engine.run(max_steps=20_000)
    ended(engine)
    return engine


def left_behind(engine: Engine) -> list[Any]:
    """All that a run leaves: records step by step, and every sequence."""
    steps = [r for record in engine.steps for r in record.each()]
    sequences = [
        (
            s.seq_id,
            s.finish_reason,
            s.admitted_at,
            s.first_token_at,
            s.finished_at,
            s.token_times,
            s.last_token_at,
            s.num_output,
            s.hit_tokens,
            s.recomputed_tokens,
            s.num_preemptions,
        )
        for s in engine.finished
    ]
    return [*steps, *sequences, engine.totals]


def quiet(scenario: Scenario) -> Scenario:
    """Nobody interferes from outside."""
    return replace(scenario, cancels={}, clears=frozenset())


@settings(max_examples=examples(2))
@given(scenarios(), st.booleans(), st.data())
def test_simulate_and_run_have_the_same_events(
    scenario: Scenario, pipelined: bool, data: st.DataObject
) -> None:
    scenario = quiet(scenario)
    scenario.config = scenario.config.replace(async_scheduling=pipelined)
    real = serve(scenario, check=False)
    again = simulated(
        scenario.config, scenario.requests, scripts(real), StepClock(), skip=data.draw(st.booleans(), "skip")
    )
    assert event_rows(real) == event_rows(again)
    for one, other in zip(real.finished, again.finished, strict=True):
        assert one.tokens == other.tokens
    assert left_behind(real) == left_behind(again)


@settings(max_examples=examples(2))
@given(
    scenarios(),
    st.booleans(),
    st.sampled_from([Linear(), Linear(fixed=1, slope=0), Linear(fixed=10**12, slope=10**9), Crooked()]),
    st.lists(st.integers(1, 40), min_size=1),
    st.integers(1, 10**13),
)
def test_leaping_equals_walking(
    scenario: Scenario, pipelined: bool, cost: CostModel, lengths: list[int], unit: int
) -> None:
    scenario = quiet(scenario)
    config = scenario.config.replace(async_scheduling=pipelined)
    requests = [
        replace(
            r,
            arrival=r.arrival * unit / 1e12,
            sampling=replace(r.sampling, max_tokens=lengths[i % len(lengths)]),
        )
        for i, r in enumerate(scenario.requests)
    ]
    leapt, walked = (
        simulated(config, requests, None, VirtualClock(), skip=skip, cost=cost) for skip in (True, False)
    )
    assert event_rows(leapt) == event_rows(walked)
    assert left_behind(leapt) == left_behind(walked)


@pytest.mark.parametrize("name", servable("scheduler"))
@settings(max_examples=examples(0.3))
@given(data=st.data())
def test_every_scheduler_leaps_as_it_walks(name: str, data: st.DataObject) -> None:
    """The same law for each by name: several tenants, a queue that is longer than the seats, and a tight pool."""
    scenario = quiet(data.draw(scenarios(choose={"scheduler": (name,), "prefetch": ("none",)})))
    more = data.draw(st.sampled_from((20, 60)))
    requests = [
        replace(r, arrival=r.arrival * 1e-8, sampling=replace(r.sampling, max_tokens=more))
        for r in scenario.requests
    ]
    config = scenario.config.replace(
        max_num_seqs=3,
        max_num_batched_tokens=64,
        num_blocks=scenario.config.num_blocks + -(-2 * more // scenario.config.block_size),
        max_model_len=(scenario.config.max_model_len or 0) + more,
    )
    leapt, walked = (simulated(config, requests, None, VirtualClock(), skip=skip) for skip in (True, False))
    assert event_rows(leapt) == event_rows(walked)
    assert left_behind(leapt) == left_behind(walked)


def hashed(n: int = 12, output: int = 300) -> list[Request]:
    """Prompts of 64-token hashes over three shared stems."""
    return [
        Request(
            request_id=str(i),
            prompt=HashedPrompt([i % 3, 10 + i % 3, 100 + i], 150, 64),
            arrival=i * 1e-8,
            sampling=SamplingParams(max_tokens=output + i),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_hashed_prompts_share_whole_blocks_only(block_size: int) -> None:
    config = Config(num_blocks=4096 // block_size * 3, block_size=block_size, max_num_seqs=8)
    engine = simulated(config, hashed(), None, VirtualClock(), skip=True)
    # The first of each stem misses; the stem's 128 tokens are there for the others, the last partial hash is not.
    later = [s for s in engine.finished if int(s.request_id) >= 8]
    assert {s.hit_tokens for s in later} == {128}
    assert sum(r.count for r in engine.steps) > 2 * len(engine.steps), "nothing was leapt over"


def test_what_is_generated_is_never_hit() -> None:
    """Two equal lengths-only requests one after the other: only the prompt's whole hashes are shared."""
    requests = [
        Request(
            request_id=str(i),
            prompt=HashedPrompt([1], 64, 64),
            sampling=SamplingParams(max_tokens=200),
            arrival=i,
        )
        for i in range(2)
    ]
    engine = simulated(Config(block_size=16), requests, None, VirtualClock(), skip=True)
    assert engine.finished[1].hit_tokens == 48  # one token is always computed anew


def test_a_follower_comes_after_its_think_time() -> None:
    turns = [
        Request(
            request_id=str(i),
            prompt=[1] * (4 + i),
            sampling=SamplingParams(max_tokens=3),
            follows=None if i == 0 else str(i - 1),
            think_time=0.5,
        )
        for i in range(3)
    ]
    engine = simulated(Config(), turns, None, VirtualClock(), skip=True)
    first, second, third = (engine.groups[str(i)] for i in range(3))
    assert second.arrival == first.sequences[0].finished_at + 500_000_000_000
    assert third.arrival == second.sequences[0].finished_at + 500_000_000_000


def test_a_refused_or_cancelled_request_does_not_hold_its_followers() -> None:
    def chain(first_len: int) -> list[Request]:
        return [
            Request(request_id="a", prompt=[1] * first_len, sampling=SamplingParams(max_tokens=50, n=2)),
            Request(request_id="b", prompt=[1], sampling=SamplingParams(max_tokens=2), follows="a"),
        ]

    engine = simulated(Config(num_blocks=8), chain(500), None, VirtualClock(), skip=True)
    assert engine.groups["a"].sequences[0].finish_reason == "refused"
    assert engine.groups["b"].sequences[0].finish_reason == "length"
    engine = Engine(Config(), SimulatedExecutor(Linear(), max_model_len=4096), clock=VirtualClock())
    for request in chain(5):
        engine.add(request)
    assert engine.cancel("a")
    engine.run()
    assert engine.groups["b"].sequences[0].finish_reason == "length"


def test_asynchronous_scheduling_frees_seats_a_step_late() -> None:
    """The first ends with step 2; whoever takes its seat joins step 3, or step 4 if step 3 was planned before."""
    requests = [
        Request(request_id=str(i), prompt=[i] * 4, sampling=SamplingParams(max_tokens=n))
        for i, n in enumerate((3, 20, 3))
    ]
    admitted = {}
    for pipelined in (False, True):
        config = Config(max_num_seqs=2, async_scheduling=pipelined)
        engine = simulated(config, requests, None, StepClock(), skip=True)
        admitted[pipelined] = engine.groups["2"].sequences[0].admitted_at
    assert admitted == {False: 3 * 10**12, True: 4 * 10**12}


def test_asynchronous_scheduling_sees_arrivals_a_step_late() -> None:
    """A request that comes during step k is in step k + 2, for step k + 1 was planned when k began."""
    requests = [
        Request(request_id="a", prompt=[1] * 4, sampling=SamplingParams(max_tokens=30)),
        Request(request_id="b", prompt=[2] * 4, sampling=SamplingParams(max_tokens=3), arrival=4.5),
    ]
    for skip in (True, False):
        admitted = {}
        for pipelined in (False, True):
            engine = simulated(
                Config(async_scheduling=pipelined, block_size=64), requests, None, StepClock(), skip=skip
            )
            admitted[pipelined] = engine.groups["b"].sequences[0].admitted_at
        assert admitted == {False: 5 * 10**12, True: 6 * 10**12}


@given(st.integers(1, 10**9), st.integers(1, 10**6), st.integers(0, 10**5))
def test_the_number_of_steps_to_an_arrival(gap: int, first: int, growth: int) -> None:
    n = _steps_until(gap, first, growth)
    assert n * first + growth * (n * (n - 1) // 2) >= gap
    n -= 1
    assert n == 0 or n * first + growth * (n * (n - 1) // 2) < gap


@pytest.mark.parametrize("wait", [False, True])
def test_requests_that_come_together_share_their_prefix_if_they_wait_for_it(wait: bool) -> None:
    requests = [
        Request(request_id=str(i), prompt=[*range(100), 200 + i], sampling=SamplingParams(max_tokens=4))
        for i in range(3)
    ]
    engine = simulated(Config(wait_for_prefix=wait, block_size=4), requests, None, StepClock(), skip=True)
    assert [s.hit_tokens for s in sorted(engine.finished, key=lambda s: s.seq_id)] == [0, *[100 * wait] * 2]


@pytest.mark.parametrize("pipelined", [False, True])
def test_the_real_model_and_its_simulation_write_the_same_log(pipelined: bool) -> None:
    """`tiny` under memory pressure, texts and all; keys included."""
    config = Config(
        num_blocks=40, block_size=16, max_num_seqs=6, async_scheduling=pipelined, max_model_len=512
    )
    workload = pl.workloads.chat(conversations=4, turns=2, max_tokens=12)
    real = pl.run(config, workload, clock="step", progress=False)
    simulated_run = pl.simulate(config, workload, clock="step", outputs=real, progress=False)
    assert real.columns("events") == simulated_run.columns("events")
    assert real.columns("requests") == simulated_run.columns("requests")
    assert real.columns("memory") == simulated_run.columns("memory")


def test_a_cancelled_last_request_leaves_nothing_in_use() -> None:
    """With asynchronous scheduling too, where blocks otherwise wait for the next plan."""
    config = Config(async_scheduling=True)
    engine = Engine(config, SimulatedExecutor(Linear(), max_model_len=4096), clock=VirtualClock())
    engine.add(Request(request_id="a", prompt=[1] * 40, sampling=SamplingParams(max_tokens=50)))
    engine.run(max_steps=5)
    assert engine.cache.device.num_in_use
    assert engine.cancel("a")
    ended(engine)
