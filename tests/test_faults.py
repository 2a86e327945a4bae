"""Law 8: a fault in the model, Ctrl-C, a cancelled request or a policy that misbehaves leaves the engine usable."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import ENDLESS, Scenario, ended, examples, says_the_truth, scenarios
from test_law5_stub import conversation

from pagedlab.config import Config
from pagedlab.engine.clock import StepClock
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import Move, StepOrders, StepResult
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.engine.sequence import Status
from pagedlab.errors import ConfigError, PolicyError
from pagedlab.events import REQUEST_REFUSED
from pagedlab.executors.stub import StubExecutor
from pagedlab.policies import Allocator, Eviction, Preemption, Scheduler


class Fault(Exception):
    """What a device might raise."""


class Faulty(StubExecutor):
    """Raises at chosen calls: before anything is done, half way, or after all but the answer."""

    def __init__(
        self, faults: dict[int, tuple[str, int]], error: type[BaseException] = Fault, **params: Any
    ) -> None:
        super().__init__(**params)
        self.faults = faults
        self.error = error
        self.calls = 0
        self.raised = 0
        self.moves_done = 0

    def _due(self, where: str) -> int | None:
        kind, at = self.faults.get(self.calls, ("", 0))
        return at if kind == where else None

    def move(self, moves: deque[Move]) -> None:
        at = self._due("move")
        if at is None:
            self.moves_done += len(moves)
            return super().move(moves)
        self.calls += 1
        for _ in range(min(at, len(moves))):
            super().move(deque([moves[0]]))
            moves.popleft()
            self.moves_done += 1
        self.raised += 1
        raise self.error("copying failed")

    def execute(self, orders: StepOrders) -> StepResult:
        at = self._due("execute")
        self.calls += 1
        if at is None:
            return super().execute(orders)
        if at:
            # Half of the batch is written, or all of it: a fault gives no guarantee.
            half = StepOrders(orders.step, orders.moves, orders.batch[: -(-len(orders.batch) // at)])
            super().execute(half)
        self.raised += 1
        raise self.error("the model failed")


def faulty(
    scenario: Scenario, faults: dict[int, tuple[str, int]], error: type[BaseException] = Fault
) -> Faulty:
    return Faulty(faults, error, vocab_size=scenario.vocab, seed=scenario.seed, eos_token_id=scenario.eos)


def persist(engine: Engine, scenario: Scenario, error: type[BaseException] = Fault) -> int:
    """Step on through every fault, checking the books after each; return the number of faults met."""
    met = steps = 0
    more = True
    while more:
        before = engine.events.step
        try:
            more = engine.step()
        except error:
            met += 1
            assert engine.events.step == before, "a step that failed has not happened"
        engine.check()
        if steps in scenario.cancels:
            engine.cancel(scenario.cancels[steps])
        if steps in scenario.clears:
            engine.clear_cache()
        steps += 1
        assert steps < ENDLESS
    ended(engine)
    return met


FAULTS = st.dictionaries(
    st.integers(0, 25), st.tuples(st.sampled_from(("execute", "move")), st.integers(0, 3)), max_size=6
)


@settings(max_examples=examples(2))
@given(scenarios(), FAULTS, st.sampled_from((Fault, KeyboardInterrupt, MemoryError)))
def test_a_fault_in_the_executor_costs_a_step_and_nothing_else(
    scenario: Scenario, faults: dict[int, tuple[str, int]], error: type[BaseException]
) -> None:
    executor = faulty(scenario, faults, error)
    engine = Engine(scenario.config, executor, clock=StepClock())
    for request in scenario.requests:
        engine.add(request)
    assert persist(engine, scenario, error) == executor.raised
    says_the_truth(engine, scenario)


def test_faults_really_hit_moves_and_batches() -> None:
    """Not vacuous: in a run full of copies, faults in the middle of copying and of computing."""
    scenario = conversation()
    plain = Engine(scenario.config, scenario.executor(), clock=StepClock())
    for request in scenario.requests:
        plain.add(request)
    plain.run()
    assert sum(plain.totals.moved) > 10
    for kind in ("move", "execute"):
        executor = faulty(scenario, {i: (kind, i % 3) for i in range(0, 400, 2)})
        engine = Engine(scenario.config, executor, clock=StepClock())
        for request in scenario.requests:
            engine.add(request)
        assert persist(engine, scenario) > 10
        says_the_truth(engine, scenario)
        assert sum(engine.totals.moved) == executor.moves_done > 10, "what a fault cut short is counted once"
        assert engine.steps[-1].moved == engine.totals.moved


def test_ctrl_c_keeps_what_there_is() -> None:
    scenario = conversation()
    executor = faulty(scenario, {7: ("execute", 1)}, KeyboardInterrupt)
    engine = Engine(scenario.config, executor, clock=StepClock())
    for request in scenario.requests:
        engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.check()
    assert len(engine.steps) == 7
    assert any(s.output for g in engine.groups.values() for s in g.sequences)
    engine.run()
    ended(engine)
    says_the_truth(engine, scenario)


# ---- cancelling ----------------------------------------------------------------------------------------------------


def engine_with(requests: list[Request], executor: StubExecutor | None = None, **sizes: Any) -> Engine:
    sizes = {"num_blocks": 32, "block_size": 2, "max_num_seqs": 8, "max_num_batched_tokens": 32} | sizes
    engine = Engine(Config(**sizes), executor or StubExecutor(), clock=StepClock())
    for request in requests:
        engine.add(request)
    return engine


def request(name: str, length: int = 6, max_tokens: int = 8, **rest: Any) -> Request:
    n = rest.pop("n", 1)
    prompt = rest.pop("prompt", [hash((name, i)) % 60 for i in range(length)])
    return Request(
        request_id=name, prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens, n=n), **rest
    )


def state_of(engine: Engine, name: str) -> str:
    seq = engine.groups[name].sequences[0]
    if seq.table.swapped:
        return "swapped out"
    if seq.status is Status.WAITING and seq not in engine.waiting:
        return "not arrived"
    return seq.status.value


@pytest.mark.parametrize("state", ["not arrived", "waiting", "running", "swapped out", "finished"])
def test_cancelling_a_request_wherever_it_stands(state: str) -> None:
    requests = [
        request(str(i), arrival=0.0 if i < 4 else 12.0, max_tokens=10, n=1 + (i == 1)) for i in range(6)
    ]
    engine = engine_with(requests, num_blocks=14, preemption="swap", max_num_seqs=4)
    executor = engine.executor
    assert isinstance(executor, StubExecutor)
    cancelled = None
    for _ in range(ENDLESS):
        cancelled = next((r.request_id for r in requests if state_of(engine, r.request_id) == state), None)
        if cancelled is not None:
            break
        assert engine.step(), f"no request was ever {state}"
    assert cancelled is not None
    assert engine.cancel(cancelled) == (state != "finished")
    assert not engine.cancel(cancelled)
    engine.check()
    assert all(not s.table.blocks and not s.table.swapped for s in engine.groups[cancelled].sequences)
    engine.run()
    ended(engine)
    for r in requests:
        for seq in engine.groups[r.request_id].sequences:
            want = executor.reference(r.prompt, 10, seq.sample_index)
            assert seq.output == want or (r.request_id == cancelled and seq.output == want[: len(seq.output)])
    reasons = {s.finish_reason for s in engine.groups[cancelled].sequences}
    assert reasons == ({"length"} if state == "finished" else {"cancelled"})


def test_cancelling_what_is_unknown_or_everything() -> None:
    engine = engine_with([request("a"), request("b", arrival=3.0)])
    assert not engine.cancel("c")
    engine.step()
    assert engine.cancel("a")
    assert engine.cancel("b")
    assert not engine.step()
    ended(engine)


def test_nobody_waits_for_the_arrival_of_a_cancelled_request() -> None:
    engine = engine_with([request("a", max_tokens=2), request("late", arrival=1e6)])
    engine.cancel("late")
    engine.run()
    assert not engine.has_work
    assert engine.clock.now() < 10 * 10**12, "the clock was moved on for a request that nobody wants"


# ---- requests that cannot be served --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request("bad", length=6, max_tokens=60), ["'bad'", "33 blocks", "32"]),
        (request("bad", prompt=[1] * 200), ["'bad'", "201 tokens", "128"]),
        (request("bad", prompt=[]), ["'bad'", "empty prompt"]),
        (request("bad", n=9), ["'bad'", "n=9", "8"]),
        (
            Request(request_id="bad", prompt=[1], sampling=SamplingParams(stop=("x",))),
            ["'bad'", "stop strings", "stop_token_ids"],
        ),
    ],
)
def test_what_can_never_run_is_refused_at_once_by_name(bad: Request, words: list[str]) -> None:
    engine = engine_with([request("a"), bad, request("b")], max_model_len=128)
    (refused,) = engine.groups["bad"].sequences
    assert refused.finish_reason == "refused"
    assert refused.error is not None
    assert "\n" not in refused.error
    for word in words:
        assert word in refused.error
    assert [e.detail for e in engine.events if e.kind == REQUEST_REFUSED] == [refused.error]
    engine.run()
    ended(engine)
    assert not refused.output
    assert not engine.cancel("bad")
    executor = engine.executor
    assert isinstance(executor, StubExecutor)
    for name in "ab":
        (seq,) = engine.groups[name].sequences
        assert seq.output == executor.reference(request(name).prompt, 8)


def test_the_longest_that_fits_is_not_refused() -> None:
    """The last generated token is never stored, so 32 blocks of 2 hold a request of 65 tokens."""
    engine = engine_with([request("long", length=6, max_tokens=59)])
    engine.run()
    (seq,) = engine.groups["long"].sequences
    assert seq.finish_reason == "length"
    assert len(seq.output) == 59
    assert seq.num_preemptions == 0


def test_a_request_id_is_used_once() -> None:
    engine = engine_with([request("a")])
    with pytest.raises(ConfigError, match="'a' is used twice"):
        engine.add(request("a"))
    engine.run()
    with pytest.raises(ConfigError, match="'a' is used twice"):
        engine.add(request("a"))
    assert len(engine.groups) == 1
    ended(engine)


# ---- logits that are not numbers -----------------------------------------------------------------------------------


class Broken(StubExecutor):
    """Reports chosen sequences as failed from some number of their tokens on, and spoils what they wrote."""

    def __init__(self, sick: dict[int, int]) -> None:
        super().__init__(vocab_size=60)
        self.sick = sick

    def execute(self, orders: StepOrders) -> StepResult:
        result = super().execute(orders)
        for i, entry in enumerate(orders.batch):
            if entry.context_len >= self.sick.get(entry.seq_id, 10**9):
                result.failures[i] = "the logits are not numbers"
                result.samples[i] = []
                for position in range(entry.start, entry.context_len):
                    block, offset = divmod(position, self._block_size)
                    self._slots[0][entry.table[block]][offset] = -77
        return result


@pytest.mark.parametrize("lookup", ["chained-hash", "radix", "none"])
@pytest.mark.parametrize("swap", ["drop", "host"])
@pytest.mark.parametrize("at", [1, 6, 9, 12])
def test_bad_logits_end_one_request_alone_and_its_blocks_are_found_by_nobody(
    lookup: str, swap: str, at: int
) -> None:
    same = [7, 7, 8, 8, 9, 9]
    requests = [
        request("sick", prompt=same),
        request("twin", prompt=[*same, 1], arrival=12.0),
        request("other", prompt=[20, 21, 22, 23, 24, 25], arrival=1.0),
    ]
    executor = Broken({0: at})
    engine = engine_with(requests, executor, lookup=lookup, swap=swap, max_num_batched_tokens=5)
    while engine.step():
        engine.check()
    ended(engine)
    (sick,) = engine.groups["sick"].sequences
    assert sick.finish_reason == "error"
    assert sick.error == "the logits are not numbers"
    for name in ("twin", "other"):
        (seq,) = engine.groups[name].sequences
        assert seq.finish_reason == "length"
        assert seq.output == executor.reference(seq.group.request.prompt, 8)
    if at >= 6:
        assert engine.groups["twin"].sequences[0].hit_tokens == 0, "a prefix of doubtful content was used"


@settings(max_examples=examples(0.7))
@given(scenarios(), st.dictionaries(st.integers(0, 8), st.integers(1, 30), max_size=4))
def test_failures_never_reach_others(scenario: Scenario, sick: dict[int, int]) -> None:
    executor = Broken(sick)
    executor.vocab_size, executor.seed = scenario.vocab, scenario.seed
    executor.eos_token_ids = scenario.executor().eos_token_ids
    engine = Engine(scenario.config, executor, clock=StepClock())
    for r in scenario.requests:
        engine.add(r)
    persist(engine, scenario)
    says_the_truth(engine, scenario, but=("error",))


# ---- policies that misbehave ---------------------------------------------------------------------------------------


class NamesUsedBlocks(Eviction):
    def victims(self, n: int, protected: Any = ()) -> list[Any]:
        return [b for b in self.seen if b.ref_count][:n]

    def reset(self, *, capacity: int) -> None:
        self.seen: list[Any] = []

    def insert(self, block: Any) -> None:
        self.seen.append(block)

    def hit(self, block: Any) -> None: ...
    def release(self, block: Any) -> None: ...
    def remove(self, block: Any) -> None: ...


class NamesTooFew(NamesUsedBlocks):
    def victims(self, n: int, protected: Any = ()) -> list[Any]:
        return []


class NamesOneTwice(NamesUsedBlocks):
    def victims(self, n: int, protected: Any = ()) -> list[Any]:
        return [b for b in self.seen if not b.ref_count and b.key is not None][:1] * n


class GrantsNothing(Scheduler):
    def plan(self, step: Any) -> None:
        return None


class AsksTwice(Scheduler):
    def plan(self, step: Any) -> None:
        for seq in (*step.running, *step.waiting):
            step.grant(seq, 1)
            step.grant(seq, 1)


class ChoosesStrangers(Preemption):
    def choose(self, candidates: Sequence[Any]) -> Any:
        return None

    def mode(self, victim: Any) -> Any:
        return "recompute"


class RefusesFreeBlocks(Allocator):
    def reset(self, blocks: Sequence[int]) -> None:
        self.blocks, self.given = list(blocks), 0

    @property
    def num_free(self) -> int:
        return len(self.blocks)

    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        self.given += 1
        return None if self.given > 3 else [self.blocks.pop() for _ in range(n)]

    def free(self, blocks: Sequence[int]) -> None:
        self.blocks += blocks


@pytest.mark.parametrize(
    ("slot", "policy"),
    [
        ("eviction", NamesUsedBlocks()),
        ("eviction", NamesTooFew()),
        ("eviction", NamesOneTwice()),
        ("scheduler", GrantsNothing()),
        ("scheduler", AsksTwice()),
        ("preemption", ChoosesStrangers()),
        ("allocator", RefusesFreeBlocks()),
    ],
    ids=lambda p: p if isinstance(p, str) else type(p).__name__,
)
def test_a_policy_that_breaks_its_contract_is_named(slot: str, policy: Any) -> None:
    requests = [request(str(i), max_tokens=14, arrival=float(i // 3)) for i in range(8)]
    engine = engine_with(requests, num_blocks=12, max_num_seqs=4, **{slot: policy})
    with pytest.raises(PolicyError, match=type(policy).__name__) as caught:
        engine.run()
    assert slot in str(caught.value)
    assert "\n" not in str(caught.value)
    engine.check()
