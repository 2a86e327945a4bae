"""Slot `scheduler`: budget, seats, whole prompts, and that a standing decision equals asking at every step."""

from __future__ import annotations

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
    policies,
    request_streams,
    says_the_truth,
    scenarios,
    servable,
    serve,
)

from pagedlab.config import Config
from pagedlab.engine.clock import StepClock
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import StepOrders, StepResult
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.executors.stub import StubExecutor
from pagedlab.policies import Recompute, Scheduler, SwapOut
from pagedlab.policies.scheduler import PrefillFirst


class Walking(Scheduler):
    """The same scheduler, asked at every step; counts how often the other's decision would have stood."""

    inner: object = None

    @property
    def steady_decode(self) -> bool:  # type: ignore[override]
        return self.inner.steady_decode  # type: ignore[attr-defined,no-any-return]

    def reset(self) -> None:
        self.asked = self.would_stand = 0
        self.inner.reset()  # type: ignore[attr-defined]

    def plan(self, step: Any) -> None:
        self.asked += 1
        self.would_stand += self.inner.plan(step) is not None  # type: ignore[attr-defined]


class Watched(StubExecutor):
    """Keeps the orders of every step."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.batches: list[list[tuple[int, int, int, int]]] = []

    def execute(self, orders: StepOrders) -> StepResult:
        self.batches.append([(e.seq_id, e.start, len(e.tokens), e.num_samples) for e in orders.batch])
        return super().execute(orders)


def test_blocks_that_come_free_in_the_midst_of_a_decision_are_not_overlooked() -> None:
    """The only one that runs needs a block, and who has ended gives up its own, after others were refused."""
    ends = []
    for scheduler in ("prefill-first", Walking(inner=PrefillFirst())):
        config = Config(
            scheduler=scheduler,
            num_blocks=7,
            block_size=2,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            max_model_len=14,
            async_scheduling=True,
        )
        engine = Engine(config, StubExecutor(vocab_size=3, seed=3), clock=StepClock())
        for name, prompt, most in (("a", [0, 1, 2], 5), ("b", [0, 1, 0, 2], 9), ("c", [2], 4)):
            engine.add(
                Request(
                    request_id=name,
                    prompt=prompt,
                    sampling=SamplingParams(max_tokens=most, ignore_eos=True, seed=0),
                )
            )
            if name == "a":
                engine.step()
        engine.run()
        ends.append({s.request_id: (s.num_preemptions, s.finished_at) for s in engine.finished})
    assert ends[0]["c"][0] == 1, "who is refused was preempted before"
    assert ends[0] == ends[1]


@settings(max_examples=examples(3))
@given(scenarios())
def test_a_standing_decision_equals_walking(scenario: Scenario) -> None:
    """Law 6's half that lives here: what is not asked would have been answered the same."""
    walking = scenario.config.replace(scheduler=Walking(inner=scenario.config.policy("scheduler").clone()))
    one, other = serve(scenario, check=False), serve(scenario, check=False, config=walking)
    assert event_rows(one) == event_rows(other)
    assert [(r.num_running, r.prefill_tokens, r.decode_tokens, r.memory) for r in one.steps] == [
        (r.num_running, r.prefill_tokens, r.decode_tokens, r.memory) for r in other.steps
    ]


def plain(n: int = 3, max_tokens: int = 20, **sizes: Any) -> Scenario:
    requests = [
        Request(request_id=str(i), prompt=[i] * (4 + i), sampling=SamplingParams(max_tokens=max_tokens + i))
        for i in range(n)
    ]
    sizes = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 32} | sizes
    return Scenario(Config(**sizes), requests, vocab=40)


@pytest.mark.parametrize("name", servable("scheduler"))
def test_a_decision_that_stands_is_not_asked_again(name: str) -> None:
    scenario = plain(scheduler=name)
    policy = scenario.config.policy("scheduler").clone()

    class Counting(type(policy)):  # type: ignore[misc]
        def reset(self) -> None:
            super().reset()
            self.asked = 0

        def plan(self, step: Any) -> Any:
            self.asked += 1
            return super().plan(step)

    engine = serve(scenario, config=scenario.config.replace(scheduler=Counting(**policy.get_params())))
    assert engine.policies.scheduler.asked <= len(engine.steps)  # type: ignore[attr-defined]
    if name in ("chunked-prefill", "iteration-level", "static-batch"):
        assert engine.policies.scheduler.asked < len(engine.steps) / 2  # type: ignore[attr-defined]


@settings(max_examples=examples(1.5))
@given(scenarios(), st.data())
def test_budget_and_seats_are_kept(scenario: Scenario, data: st.DataObject) -> None:
    config = scenario.config.replace(scheduler=data.draw(policies("scheduler")))
    executor = Watched(vocab_size=scenario.vocab, seed=scenario.seed, eos_token_id=scenario.eos)

    def seats(engine: Engine) -> None:
        assert sum(1 + s.to_fork for s in engine.running) <= config.max_num_seqs

    engine = serve(scenario, executor, config=config, after_step=seats)
    says_the_truth(engine, scenario)
    for batch in executor.batches:
        assert batch
        assert len({seq_id for seq_id, *_ in batch}) == len(batch)
        assert all(n >= 1 for _, _, n, _ in batch)
        tokens = sum(n for _, _, n, _ in batch)
        # A prompt that may not be cut can exceed the budget, alone.
        assert tokens <= config.max_num_batched_tokens or len(batch) == 1


def test_samples_to_come_take_a_seat() -> None:
    """Prompts of two samples each, computed in chunks: their second samples must find a seat when they part."""
    scenario = plain(max_num_seqs=3, max_num_batched_tokens=4)
    scenario.requests = [replace(r, sampling=SamplingParams(max_tokens=6, n=2)) for r in scenario.requests]
    engine = serve(scenario)
    assert max(r.num_running for r in engine.steps) <= 3
    says_the_truth(engine, scenario)


@pytest.mark.parametrize("name", ["iteration-level", "static-batch"])
@settings(max_examples=examples(0.5))
@given(data=st.data())
def test_whole_prompts_are_never_cut(name: str, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(choose={"scheduler": (name,)}))
    executor = Watched(vocab_size=scenario.vocab, seed=scenario.seed, eos_token_id=scenario.eos)
    serve(scenario, executor)
    assert all(samples >= 1 for batch in executor.batches for *_, samples in batch), (
        "a step ended inside a prompt"
    )


def test_chunks_are_no_longer_than_asked() -> None:
    from pagedlab.policies import ChunkedPrefill

    scenario = plain(scheduler=ChunkedPrefill(max_chunk=3))
    executor = Watched(vocab_size=40)
    serve(scenario, executor)
    assert max(n for batch in executor.batches for _, _, n, _ in batch) == 3


def test_static_batch_waits_for_its_last_sequence() -> None:
    scenario = plain(n=6, scheduler="static-batch")
    engine = serve(scenario)
    ends: dict[int, int] = {e.seq_id: i for i, e in enumerate(engine.events) if e.kind == "RequestFinished"}
    starts = {e.seq_id: i for i, e in enumerate(engine.events) if e.kind == "RequestAdmitted"}
    batches = sorted(starts, key=lambda s: starts[s])
    assert starts[batches[4]] > max(ends[s] for s in batches[:4])


def test_iteration_level_admits_as_soon_as_a_seat_is_free() -> None:
    static = serve(plain(n=6, scheduler="static-batch"))
    level = serve(plain(n=6, scheduler="iteration-level"))
    assert len(level.steps) < len(static.steps)


@settings(max_examples=examples(1.0))
@given(data=st.data())
def test_first_come_is_first_served_where_nothing_else_is_asked(data: st.DataObject) -> None:
    """Law 7: with the built-in schedulers, admission for the first time follows arrival."""
    scenario = data.draw(
        scenarios(choose={"scheduler": ("chunked-prefill", "iteration-level", "static-batch")})
    )
    engine = serve(scenario, check=False)
    admitted = [e.detail for e in engine.events if e.kind == "RequestAdmitted"]
    arrived = [e.detail for e in engine.events if e.kind == "RequestArrived"]
    assert admitted == [name for name in arrived if name in admitted]


@settings(max_examples=examples(0.7))
@given(data=st.data(), requests=request_streams(max_samples=3))
def test_an_arrival_ends_a_standing_decision(data: st.DataObject, requests: list[Request]) -> None:
    """Requests that come one by one are all let in while others decode."""
    scenario = Scenario(
        Config(
            num_blocks=400,
            block_size=4,
            max_num_seqs=40,
            max_num_batched_tokens=400,
            max_model_len=200,
            scheduler=data.draw(policies("scheduler", ("chunked-prefill", "iteration-level"))),
        ),
        requests,
    )
    engine = Engine(scenario.config, scenario.executor(), clock=StepClock())
    for request in requests:
        engine.add(request)
    engine.run()
    for group in engine.groups.values():
        leader = group.sequences[0]
        assert leader.admitted_at == max(group.arrival, 0), "room and seats for all, and yet it waited"


def crowded(seed: int) -> Scenario:
    """More samples run than the budget serves, the pool is tight, and victims are chosen by priority."""
    pick = Random(seed)
    requests = [
        Request(
            request_id=str(i),
            prompt=[i] * pick.randint(1, 6),
            priority=pick.randint(0, 3),
            sampling=SamplingParams(max_tokens=pick.randint(6, 18), n=pick.choice((1, 2, 3))),
        )
        for i in range(pick.randint(3, 6))
    ]
    config = Config(
        num_blocks=pick.randint(12, 20),
        block_size=2,
        max_num_seqs=6,
        max_num_batched_tokens=pick.choice((2, 3, 4)),
        max_model_len=30,
        preemption=pick.choice((Recompute, SwapOut))(victim="priority"),
        scheduler=pick.choice(servable("scheduler")),
    )
    return Scenario(config, requests, vocab=40)


def test_a_standing_decision_equals_walking_where_not_all_can_run() -> None:
    """What a preempted sequence does not use of the budget goes to one that would have had none."""
    starved = 0
    for seed in range(examples(2)):
        scenario = crowded(seed)
        walking = scenario.config.replace(
            scheduler=Walking(inner=scenario.config.policy("scheduler").clone())
        )
        one, other = serve(scenario, check=False), serve(scenario, check=False, config=walking)
        assert event_rows(one) == event_rows(other), f"seed {seed}"
        budget = scenario.config.max_num_batched_tokens
        starved += one.totals.preemptions > 0 and any(r.num_running > budget for r in one.steps)
    assert starved > 5, "no run was as crowded as this test needs"


def memories(scenario: Scenario, config: Config) -> list[Any]:
    return [r.memory for r in serve(scenario, check=False, config=config).steps]


def test_a_standing_decision_equals_walking_where_memory_is_fragmented() -> None:
    """While somebody waits for a run that is long enough, growth of the others can make it wait for room at all."""
    fragmented = 0
    for seed in range(examples(1)):
        scenario = crowded(seed)
        config = scenario.config.replace(
            allocator=Random(seed).choice(("first-fit", "best-fit", "buddy")),
            max_num_batched_tokens=64,
            max_num_seqs=9,
        )
        walking = config.replace(scheduler=Walking(inner=config.policy("scheduler").clone()))
        one = memories(scenario, config)
        assert one == memories(scenario, walking), f"seed {seed}"
        fragmented += any(memory.external for memory in one)
    assert fragmented > 5, "no run was as fragmented as this test needs"
