"""The engine's parts, one by one: what is asked for, clocks, records, who decodes, the link, the queue, the orders."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import fields, replace
from itertools import accumulate
from math import inf, nan
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers
from strategies import Scenario, examples, scenarios, serve
from test_law5_stub import conversation
from test_law6 import Linear

from pagedlab import events as ev
from pagedlab.cache.accounting import Memory
from pagedlab.cache.moves import Move
from pagedlab.config import Config
from pagedlab.costs import find_model
from pagedlab.engine import clock as clocks
from pagedlab.engine.clock import PS_PER_SECOND, StepClock, VirtualClock, WallClock, to_ps, to_seconds
from pagedlab.engine.coming import NEVER, Coming
from pagedlab.engine.decoders import Decoders
from pagedlab.engine.engine import Engine
from pagedlab.engine.link import Link
from pagedlab.engine.orders import Damage, StepOrders, StepResult, TierFault
from pagedlab.engine.plan import Queue
from pagedlab.engine.records import Moved, StepLog, StepRecord
from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.engine.script import Script
from pagedlab.engine.sequence import Group, Sequence
from pagedlab.engine.view import EngineView
from pagedlab.errors import ConfigError, PagedLabError
from pagedlab.events import EventLog
from pagedlab.executors.simulated import SimulatedExecutor
from pagedlab.executors.stub import StubExecutor
from pagedlab.policies.block import DEVICE, DISK, HOST, Block
from pagedlab.policies.eviction import LRU
from pagedlab.policies.prompt import HashedPrompt, HashedTokens

# ---- what a person asks for ------------------------------------------------------------------------------------------

LIMITS: list[tuple[str, tuple[Any, ...], tuple[Any, ...], bool]] = [
    ("max_tokens", (1, 2, 10**9), (0, -1, 1.5, True, "3", None, nan), True),
    ("temperature", (0, 0.0, 0.7, 100), (-0.1, 100.1, 101, True, "1", nan), False),
    ("top_k", (0, 1, 10**6), (-1, 1.0, False), True),
    ("top_p", (0.001, 1, 1.0), (1.01, -0.1, 2, True, nan), False),
    ("min_p", (0, 0.5, 1), (-0.1, 1.1, True), False),
    ("repetition_penalty", (0.01, 1, 100), (0.009, 100.1, 0, True, inf), False),
    ("seed", (None, 0, 1, 2**63 - 1), (-1, 2**63, 1.0, True), True),
    ("n", (1, 2, 1024), (0, 1025, 2.0, True), True),
]


@pytest.mark.parametrize(("name", "good", "bad", "whole"), LIMITS, ids=[name for name, *_ in LIMITS])
def test_sampling_parameters_have_limits(
    name: str, good: tuple[Any, ...], bad: tuple[Any, ...], whole: bool
) -> None:
    for value in good:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=f"^{name} must be") as caught:
            SamplingParams(**{name: value})
        assert ("whole number" in str(caught.value)) == whole
        assert repr(value) in str(caught.value)


def test_a_share_of_nothing_cannot_be_drawn_from() -> None:
    for nothing in (0, 0.0):
        with pytest.raises(ConfigError, match="top_p must be above 0"):
            SamplingParams(top_p=nothing)


def test_stops_are_tuples_whatever_they_came_as() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[3, 4])  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("END",), (3, 4))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert (SamplingParams().stop, SamplingParams().stop_token_ids) == ((), ())
    for bad in ("", ["a", ""], [3]):
        with pytest.raises(ConfigError, match="stop must be non-empty strings"):
            SamplingParams(stop=bad)  # type: ignore[arg-type]
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.1).greedy


def test_a_request_says_where_its_blocks_come_from() -> None:
    hints = Hints(agent_step=2, next_step=5, retention_priority=70, retention_seconds=1.5)
    request = Request(request_id="a", prompt=[1], salt="tenant", session="s", request_class="c", hints=hints)
    assert request.origin._asdict() == {
        "session": "s",
        "request_class": "c",
        "salt": "tenant",
        "agent_step": 2,
        "next_step": 5,
        "retention_priority": 70,
        "retention_seconds": 1.5,
    }


def test_a_script_says_its_tokens_or_some_that_nobody_else_says() -> None:
    told = Script(4, [7, 8, 9, 10])
    assert [told.token(i) for i in range(4)] == list(told.piece(0, 4)) == [7, 8, 9, 10]
    assert list(told.piece(1, 3)) == [8, 9]
    one, two = Script(3, unique=1), Script(3, unique=2)
    assert list(one.piece(0, 3)) == [one.token(i) for i in range(3)]
    assert list(one.piece(1, 3)) == [one.token(1), one.token(2)]
    assert len({*one.piece(0, 3), *two.piece(0, 3)}) == 6


# ---- clocks ----------------------------------------------------------------------------------------------------------


def test_seconds_are_a_trillion_picoseconds() -> None:
    assert to_ps(1.5) == 1_500_000_000_000
    assert to_ps(0.4e-12) == 0
    assert to_seconds(250_000_000_000) == 0.25


def test_virtual_time_goes_on_by_what_steps_take() -> None:
    clock = VirtualClock()
    assert clock.now() == 0
    clock.step_done(5)
    clock.leap(20)
    assert clock.now() == 25
    clock.wait_until(20)
    assert clock.now() == 25, "time never goes back"
    clock.wait_until(31)
    assert clock.now() == 31
    assert clock.pace(3, 4) == (3, 4)
    clock.start()
    assert clock.now() == 0


def test_steps_by_the_step_clock_take_a_second() -> None:
    clock = StepClock()
    clock.step_done(5)
    assert clock.now() == PS_PER_SECOND
    clock.wait_until(PS_PER_SECOND + 1)
    assert clock.now() == 2 * PS_PER_SECOND
    clock.wait_until(3 * PS_PER_SECOND)
    assert clock.now() == 3 * PS_PER_SECOND
    assert clock.pace(3, 4) == (PS_PER_SECOND, 0)


def test_real_time_passes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    nanoseconds, slept = [7_000], []
    fake = SimpleNamespace(perf_counter_ns=lambda: nanoseconds[0], sleep=slept.append)
    monkeypatch.setattr(clocks, "time", fake)
    clock = WallClock()
    nanoseconds[0] += 2_000
    assert clock.now() == 2_000_000
    clock.start()
    assert clock.now() == 0
    nanoseconds[0] += 500_000_000
    clock.step_done(9)
    clock.leap(9)
    assert clock.now() == PS_PER_SECOND // 2
    clock.wait_until(2 * PS_PER_SECOND)
    clock.wait_until(1)
    assert slept == [1.5, 0.0]
    assert clock.pace(3, 4) is None


# ---- records ---------------------------------------------------------------------------------------------------------


def test_moves_are_counted_by_the_link_they_go_over() -> None:
    before = Moved(10, 20, 30, 40, 50)
    for src, dst, change in [
        (DEVICE, HOST, (1, 0, 0, 0, 0)),
        (HOST, DEVICE, (0, 1, 0, 0, 0)),
        (DEVICE, DEVICE, (0, 0, 1, 0, 0)),
        (HOST, DISK, (0, 0, 0, 1, 0)),
        (DISK, DEVICE, (0, 1, 0, 0, 1)),
    ]:
        twice = before.and_also([Move(src, 3, dst, 4)] * 2)
        assert twice == tuple(b + 2 * c for b, c in zip(before, change))
    assert before.and_also([]) == before


def record(step: int, start: int, count: int = 1, growth: int = 0, duration: int = 10) -> StepRecord:
    return StepRecord(
        step=step,
        start=start,
        duration=duration,
        num_running=3,
        num_waiting=1,
        prefill_tokens=0,
        decode_tokens=2,
        moved=Moved(),
        preemptions=0,
        recomputed_tokens=0,
        memory=Memory(stored=8, reserved=5, internal=3, external=0, cached=4, free=12, saved=0),
        context_tokens=8,
        count=count,
        growth=growth,
    )


def test_a_leap_is_so_many_steps() -> None:
    leap = record(4, 100, count=4, growth=3)
    steps = list(leap.each())
    assert [s.step for s in steps] == [4, 5, 6, 7]
    assert [s.duration for s in steps] == [10, 13, 16, 19]
    ends = [100 + d for d in accumulate(s.duration for s in steps)]
    assert [leap.end(i) for i in range(4)] == ends == [s.end(0) for s in steps]
    assert [s.start for s in steps] == [100, *ends[:-1]]
    assert [s.context_tokens for s in steps] == [8, 10, 12, 14]
    assert [(s.count, s.growth) for s in steps] == [(1, 0)] * 4
    # Two tokens a step go where they were reserved, then where nobody had expected them.
    assert [s.memory[:3] for s in steps] == [(8, 5, 3), (10, 3, 3), (12, 1, 3), (14, 0, 2)]
    assert all(s.memory[3:] == leap.memory[3:] for s in steps)
    single = record(9, 7)
    assert list(single.each()) == [single]


def test_when_tokens_came_is_read_from_the_records() -> None:
    records = StepLog([record(0, 0), record(1, 10, count=3, growth=2), record(4, 46, count=2), record(6, 66)])
    ends = [r.end(0) for each in records for r in each.each()]
    assert len(ends) == 7
    for first in range(7):
        for count in range(1, 8 - first):
            assert records.ends([[first, count]]) == ends[first : first + count]
    assert records.ends([[0, 2], [3, 1], [5, 2]]) == [ends[i] for i in (0, 1, 3, 5, 6)]
    assert records.ends([]) == []


def test_a_log_of_steps_gives_back_what_was_put_in() -> None:
    wide = replace(record(7, 90, count=3, growth=5), prefill_pairs=2**40, preemptions=6, recomputed_tokens=11)
    records = [record(0, 0), replace(record(1, 10), moved=Moved(1, 2, 3, 4, 5)), wide]
    log = StepLog(records)
    assert len(log) == 3
    assert list(log) == records
    assert log[-1] == wide
    assert log[1:] == records[1:]
    assert log[::2] == records[::2]
    assert log[5:] == []
    for at in (3, -4):
        with pytest.raises(IndexError):
            log[at]
    numbers, moved, memory = log.columns()
    for name, column in numbers.items():
        assert column.tolist() == [getattr(r, name) for r in records], name
    for name, column in moved.items():
        assert column.tolist() == [getattr(r.moved, name) for r in records], name
    for name, column in memory.items():
        assert column.tolist() == [getattr(r.memory, name) for r in records], name
    assert {*numbers, "moved", "memory"} == {f.name for f in fields(StepRecord)}
    assert len(StepLog()) == 0
    assert not any(len(c) for part in StepLog().columns() for c in part.values())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_last_step_of_a_leap_can_be_changed_alone(count: int) -> None:
    before, leap = record(3, 80), record(4, 100, count=count, growth=3)
    log = StepLog([before, leap])
    log.amend_last(preemptions=7)
    single = [r for each in log for r in each.each()]
    assert single == [before, *list(leap.each())[:-1], replace(list(leap.each())[-1], preemptions=7)]
    assert [r.count for r in log] == [1, 1] + [1] * (count == 2) if count < 3 else [1, count - 1, 1]


def test_a_step_that_cannot_be_recorded_is_refused_and_the_log_stays_whole() -> None:
    log = StepLog([record(0, 0)])
    with pytest.raises(PagedLabError, match="106 days"):
        log.append(record(1, 2**63))
    assert list(log) == [record(0, 0)]
    log.append(record(1, 2**63 - 1))
    assert log[1].start == 2**63 - 1


# ---- who is to come --------------------------------------------------------------------------------------------------


@given(seed=integers(0, 2**32 - 1))
def test_who_is_to_come_comes_in_order(seed: int) -> None:
    """In whatever order they are told of; a sorted list is the model."""
    pick = Random(seed)
    coming, model = Coming(), list[Any]()
    for order in range(pick.randrange(1, 40)):
        deed = pick.choice(("add", "add", "add", "pop", "forget"))
        if deed == "add":
            group = SimpleNamespace(arrival=pick.randrange(10), order=order)
            coming.add(group)  # type: ignore[arg-type]
            model = sorted([*model, group], key=lambda g: (g.arrival, g.order))
        elif deed == "pop" and model:
            assert coming.pop() is model.pop(0)
        elif deed == "forget":
            gone = pick.choice(model) if model else SimpleNamespace()
            coming.forget(gone)
            model = [g for g in model if g is not gone]
        assert list(coming) == model == list(coming)
        assert len(coming) == len(model)
        assert coming.next == (model[0].arrival if model else NEVER)


def test_any_time_that_can_be_recorded_comes() -> None:
    coming = Coming()
    late = SimpleNamespace(arrival=2**63, order=0)
    coming.add(late)  # type: ignore[arg-type]
    assert coming.next == 2**63 < NEVER


# ---- who decodes -----------------------------------------------------------------------------------------------------


class Member:
    """As much of a sequence as decoding together needs, and its own count of what it has computed."""

    def __init__(self, computed: int, left: int | None) -> None:
        self.table = SimpleNamespace(num_tokens=computed)
        self.computed, self.left = computed, left
        self.decoders: Any = None
        self.since = self.phase = 0
        self.ends_at = -1


def decode_walk(seed: int) -> None:
    """Members join, decode and leave; every sum is compared with one over the members."""
    pick = Random(seed)
    size = pick.choice((1, 2, 3, 5))
    decoders, members = Decoders(size), list[Member]()
    fresh = list[Member]()

    def agrees() -> None:
        assert len(decoders) == len(members)
        assert list(decoders.members) == members
        assert list(decoders.fresh) == fresh
        assert decoders.context == sum(m.computed for m in members)
        assert decoders.behind == sum(m.computed - m.table.num_tokens for m in members)
        assert decoders.at_boundary() == [m for m in members if m.computed % size == 0]
        if members:
            assert decoders.steps_to_boundary() == min(size - m.computed % size for m in members)
        left = [m.left for m in members if m.left is not None]
        if left:
            assert decoders.steps_to_end() == min(left)
        else:
            assert decoders.steps_to_end() > 1 << 60

    def leaves(member: Member) -> None:
        member.table.num_tokens += decoders.lag(member)  # type: ignore[arg-type]
        assert member.table.num_tokens == member.computed
        decoders.leave(member)  # type: ignore[arg-type]
        members.remove(member)
        if member in fresh:
            fresh.remove(member)
        assert member.decoders is None

    assert decoders.steps_to_boundary() > 1 << 60
    for _ in range(60):
        what = pick.choice(("join", "advance", "advance", "leave", "sync"))
        if what == "join" and len(members) < 6:
            member = Member(pick.randint(0, 9), pick.choice((None, pick.randint(1, 12))))
            decoders.join(member, member.left)  # type: ignore[arg-type]
            assert member.decoders is decoders
            members.append(member)
            fresh.append(member)
        elif what == "advance":
            most = min([m.left for m in members if m.left is not None], default=4)
            n = pick.randint(1, most)
            decoders.advance(n)
            fresh.clear()
            for member in members:
                member.computed += n
                member.left = None if member.left is None else member.left - n
            ended: Any = decoders.pop_ended()
            assert ended == [m for m in members if m.left == 0]
            for member in ended:
                leaves(member)
        elif what == "leave" and members:
            leaves(pick.choice(members))
        elif what == "sync" and members:
            member = pick.choice(members)
            member.table.num_tokens += decoders.lag(member)  # type: ignore[arg-type]
            assert decoders.lag(member) == 0  # type: ignore[arg-type]
        agrees()


def test_decoding_together_is_decoding_one_by_one() -> None:
    for seed in range(40):
        decode_walk(seed)


# ---- the link --------------------------------------------------------------------------------------------------------


def link_walk(seed: int) -> None:
    """Loads are sent, steps load between them, time passes; the other one is a list of arrival times."""
    pick = Random(seed)
    link = Link(lambda n, from_disk: 7 * n + 100 * from_disk)
    blocks = [Block(i) for i in range(5)]
    coming: list[list[Any]] = []
    now = 0
    for _ in range(60):
        now += pick.choice((0, 1, 7, 30, 300))
        coming = [entry for entry in coming if entry[0] > now]
        what = pick.choice(("send", "send", "serve", "look"))
        if what == "send":
            loaded = [pick.choice(blocks) for _ in range(pick.randint(1, 3))]
            disk = pick.randint(0, len(loaded))
            start, total = coming[-1][0] if coming else now, 7 * len(loaded) + 100 * disk
            link.send(loaded, now, disk) if disk else link.send(loaded, now)
            coming += [[start + total * i // len(loaded), b] for i, b in enumerate(loaded, 1)]
        elif what == "serve":
            n = pick.randint(0, 3)
            link.serve(n, now)
            for entry in coming:
                entry[0] += 7 * n
        assert link.under_way(now) == len(coming)
        assert link.next_ready == (coming[0][0] if coming else None)
        for block in blocks:
            ready = [at for at, b in coming if b is block]
            assert link.ready_at(block) == (ready[-1] if ready else None)


def test_the_link_loads_one_after_the_other_and_steps_before_them() -> None:
    for seed in range(40):
        link_walk(seed)


# ---- what policies are shown -----------------------------------------------------------------------------------------


def test_what_a_token_costs_is_the_models() -> None:
    shape = find_model("qwen3-8b")
    view = EngineView(EventLog(), deque(), shape, 4)
    assert view.flops_per_token == shape.flops_per_token
    assert view.flops_per_pair == shape.pair_flops
    assert view.bytes_per_token == shape.kv_bytes_per_token


@pytest.mark.parametrize("size", [0, 3, 16, 17, 40])
def test_the_queue_is_shown_as_it_was(size: int) -> None:
    """Whoever is let in meanwhile or put back to its front, from its front as schedulers do."""
    pick = Random(size)
    for seen in range(0, size + 1, 5):
        names = [f"s{i}" for i in range(size)]
        waiting: Any = deque(names)
        lost: Any = set()
        queue: Any = Queue(SimpleNamespace(waiting=waiting), lost)  # type: ignore[arg-type]
        assert len(queue) == size
        for _ in range(min(seen, size, 16)):
            assert queue[size - len(waiting)] == waiting[0]
            waiting.popleft()
        for name in ("p", "q"):
            waiting.appendleft(name)
            lost.add(name)
        assert list(queue) == names
        assert queue[2:30] == names[2:30]
        assert queue[-1:] == names[-1:]
        for _ in range(min(size, 3)):
            at = pick.randrange(-size, size)
            assert queue[at] == names[at]
        with pytest.raises(IndexError):
            queue[size]


# ---- what an executor is ordered -------------------------------------------------------------------------------------


class Auditor(StubExecutor):
    """Holds the orders to what their contract says, step by step."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.encoded: dict[int, tuple[int, list[int]]] = {}
        self.computed: dict[int, int] = {}
        self.sums: list[tuple[int, int, int, int, int]] = []
        self.steps: list[int] = []

    def execute(self, orders: StepOrders) -> StepResult:
        assert not orders.moves, "moves are carried out before the batch"
        for seq_id in orders.ended:
            self.encoded.pop(seq_id, None)
            self.computed.pop(seq_id, None)
        assert len({entry.seq_id for entry in orders.batch}) == len(orders.batch)
        decodes = prefills = context = pairs = prefilling = samples = 0
        for entry in orders.batch:
            start, n = entry.start, len(entry.tokens)
            assert list(entry.history[start : start + n]) == entry.tokens
            assert n > 0
            assert len(entry.table) * self._block_size >= entry.context_len
            known, table = self.encoded.get(entry.seq_id, (None, []))
            if known == entry.table_version:
                assert list(entry.table[: len(table)]) == table, "a table changed and says that it grew"
                assert self.computed[entry.seq_id] == start, "not where the last step ended"
            self.encoded[entry.seq_id] = entry.table_version, list(entry.table)
            self.computed[entry.seq_id] = start + n
            whole = start + n == len(entry.history)
            assert (entry.num_samples > 0) == whole
            samples += entry.num_samples > 0
            if n == 1 and whole:
                decodes += 1
                context += start + 1
            else:
                prefilling += 1
                prefills += n
                pairs += sum(range(start + 1, start + n + 1))
        work = orders.work
        assert (work.decode_seqs, work.context_tokens) == (decodes, context)
        assert (work.prefill_seqs, work.prefill_tokens, work.prefill_pairs) == (prefilling, prefills, pairs)
        assert work.samples == samples
        self.sums.append((decodes, context, prefills, pairs, len(orders.batch)))
        self.steps.append(orders.step)
        return super().execute(orders)


def audited(scenario: Scenario) -> tuple[Engine, Auditor]:
    auditor = Auditor(vocab_size=scenario.vocab, seed=scenario.seed, eos_token_id=scenario.eos)
    return serve(scenario, auditor, check=False), auditor


@settings(max_examples=examples(1))
@given(scenarios())
def test_orders_are_what_they_say_and_records_say_what_was_ordered(scenario: Scenario) -> None:
    engine, auditor = audited(scenario)
    assert auditor.steps == list(range(len(auditor.steps)))
    assert [r.step for r in engine.steps] == auditor.steps
    for r, (decodes, context, prefills, pairs, entries) in zip(engine.steps, auditor.sums, strict=True):
        assert decodes + prefills <= engine.config.max_num_batched_tokens or entries == 1
        assert (r.decode_tokens, r.context_tokens) == (decodes, context)
        assert (r.prefill_tokens, r.prefill_pairs) == (prefills, pairs)


def test_who_decodes_is_within_the_budget_of_those_who_prefill() -> None:
    config = Config(max_num_batched_tokens=8, max_num_seqs=4, num_blocks=64, block_size=4)
    requests = [
        Request(request_id=str(i), prompt=[i] * (2 if i < 3 else 30), sampling=SamplingParams(max_tokens=12))
        for i in range(4)
    ]
    engine, auditor = audited(Scenario(config, requests))
    assert [decodes + prefills for decodes, _, prefills, *_ in auditor.sums[:6]] == [8, 8, 8, 8, 8, 8]
    assert [prefills for _, _, prefills, *_ in auditor.sums[:6]] == [8, 5, 5, 5, 5, 5]
    assert engine.steps[0].num_running == 4


@settings(max_examples=examples(1))
@given(scenarios(choose={"reservation": ("on-demand",)}))
def test_on_demand_nobody_holds_a_block_before_it_is_needed(scenario: Scenario) -> None:
    def lean(engine: Engine) -> None:
        size = engine.config.block_size
        for seq in engine.running:
            assert len(seq.table.blocks) == -(-seq.num_computed // size)

    serve(scenario, check=False, after_step=lean)


@settings(max_examples=examples(1))
@given(scenarios())
def test_counts_of_a_run_are_counts_over_its_events(scenario: Scenario) -> None:
    engine = serve(scenario, check=False)
    kinds = [e.kind for e in engine.events]
    totals = engine.totals
    assert totals.preemptions == kinds.count(ev.REQUEST_PREEMPTED)
    swapped = [e for e in engine.events if (e.kind, e.detail) == (ev.REQUEST_PREEMPTED, "swap")]
    assert totals.swapped_out == len(swapped)
    seqs = engine.finished
    assert totals.preemptions == sum(s.num_preemptions for s in seqs)
    assert totals.recomputed_tokens == sum(s.recomputed_tokens for s in seqs)
    leaders = [s for s in seqs if s.sample_index == 0]
    assert totals.hit_tokens == sum(s.hit_tokens for s in leaders)
    assert totals.prompt_tokens == sum(s.prompt_len for s in leaders if s.admitted_at is not None)
    assert totals.output_tokens == sum(s.num_output for s in seqs)
    for r, more in zip(engine.steps, [*engine.steps[1:], None]):
        if more is not None:
            assert r.preemptions <= more.preemptions
            assert r.recomputed_tokens <= more.recomputed_tokens
            assert all(a <= b for a, b in zip(r.moved, more.moved))
    if engine.steps:
        assert engine.steps[-1].moved == totals.moved
    blocks = Counter[tuple[str, str]]()
    for e in engine.events:
        blocks[e.kind, e.medium] += 1 if e.kind == ev.BLOCKS_COPIED else len(e.blocks)
    moved = totals.moved
    assert moved.to_host == blocks[ev.BLOCK_STORED, "host"] + blocks[ev.BLOCKS_SAVED, "host"]
    assert moved.to_disk == blocks[ev.BLOCK_STORED, "disk"]
    up = sum(
        blocks[kind, tier] for kind in (ev.BLOCKS_LOADED, ev.BLOCKS_PREFETCHED) for tier in ("host", "disk")
    )
    assert moved.to_device + moved.copied == up + blocks[ev.BLOCKS_COPIED, "device"]


def test_draws_differ_from_request_to_request_and_not_from_run_to_run() -> None:
    def seeds(**config: Any) -> list[int | None]:
        engine = Engine(Config(**config), StubExecutor(), clock=StepClock())
        asks = [Request(request_id=str(i), prompt=[1, 2]) for i in range(3)]
        asks.append(Request(request_id="own", prompt=[1, 2], sampling=SamplingParams(seed=5)))
        return [engine.add(r).request.sampling.seed for r in asks]

    first = seeds()
    assert first[3] == 5
    assert len(set(first)) == 4
    assert all(seed is not None and 0 <= seed < 2**63 for seed in first)
    assert seeds() == first
    assert seeds(seed=1)[:3] != first[:3]


class Speaks(StubExecutor):
    """Says tokens as letters, so stop strings can be looked for."""

    def detokenize(self, tokens: Any) -> str:
        return "".join(chr(ord("a") + t % 26) for t in tokens)


def test_a_stop_string_ends_the_text_before_it() -> None:
    ask = Request(request_id="a", prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=12, ignore_eos=True))
    said = StubExecutor().reference([1, 2, 3], 12)
    text = Speaks().detokenize(said)
    for stop in ((text[4:6],), (text[8:10], text[4:6]), (text[4:6], text[8:10])):
        engine = Engine(Config(), Speaks(), clock=StepClock())
        engine.add(replace(ask, sampling=replace(ask.sampling, stop=stop)))
        engine.run()
        (seq,) = engine.finished
        assert seq.finish_reason == "stop"
        first = min(text.find(s) for s in stop)
        assert seq.text == text[:first]
        assert Speaks().detokenize(seq.output) == text[: first + 2]


class Stammers(StubExecutor):
    """Says every letter twice, or nothing at all."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def detokenize(self, tokens: Any) -> str:
        return "".join(chr(ord("a") + t % 26) * self.times for t in tokens)


@pytest.mark.parametrize("times", [2, 0])
def test_the_text_ends_before_the_first_of_two_stops_in_one_token(times: int) -> None:
    said = StubExecutor().reference([1, 2, 3], 12)
    letters = Speaks().detokenize(said)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, stop=(letters[5],) if times else ("X", "XX"))
    engine = Engine(Config(), Stammers(times), clock=StepClock())
    engine.add(Request(request_id="a", prompt=[1, 2, 3], sampling=sampling))
    engine.run()
    (seq,) = engine.finished
    if times:
        assert seq.text == "".join(2 * letter for letter in letters[: letters.index(letters[5])])
    else:
        assert (seq.text, seq.finish_reason, len(seq.output)) == (None, "length", 12)


def test_tokens_of_steps_in_a_row_are_one_span() -> None:
    engine = Engine(Config(block_size=4), StubExecutor(), clock=StepClock())
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    engine.add(Request(request_id="a", prompt=[1, 2, 3], sampling=sampling))
    engine.add(Request(request_id="b", prompt=[1, 2], arrival=3.0, sampling=sampling))
    engine.run()
    spans = {s.request_id: s.spans for s in engine.finished}
    assert spans == {"a": [[0, 9]], "b": [[3, 9]]}


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_run_takes_as_many_steps_as_it_may(most: int) -> None:
    for skip in (True, False):
        executor = SimulatedExecutor(Linear(), max_model_len=4096)
        engine = Engine(Config(block_size=16), executor, clock=VirtualClock(), skip_ahead=skip)
        engine.add(Request(request_id="a", prompt=[1, 2], sampling=SamplingParams(max_tokens=12)))
        for times in (1, 2):
            engine.run(max_steps=most)
            assert engine.events.step == min(12, times * most) == sum(r.count for r in engine.steps)
        assert engine.has_work == (2 * most < 12)


def test_a_sample_begins_with_what_there_is() -> None:
    """Also where the prompt is known by hashes alone: as many tokens, of which those generated are its own."""
    prompt = HashedPrompt([3, 4], 7, 4)
    request = Request(request_id="a", prompt=prompt)
    for tokens in (HashedTokens(prompt, 5, 2), [1, 2, 3]):
        seq = Sequence(0, Group(request, 0, 0, []), 0, tokens, 20, 4)
        copy = seq.fork_tokens(6)
        assert copy is not tokens
        assert len(copy) == len(tokens)
        assert copy[:3] == tokens[:3]
        assert (copy[:] == tokens[:]) == isinstance(tokens, list)


def test_samples_stand_behind_the_one_they_part_from() -> None:
    engine = Engine(Config(), StubExecutor(), clock=StepClock())
    for name, n in (("a", 1), ("b", 3), ("c", 1)):
        sampling = SamplingParams(max_tokens=4, n=n, ignore_eos=True)
        engine.add(Request(request_id=name, prompt=[1, 2, 3], sampling=sampling))
    engine.step()
    running = [(s.request_id, s.sample_index) for s in engine.running]
    assert running == [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 0)]


@pytest.mark.parametrize("length", [11, 12, 13])
def test_a_prompt_leaves_room_for_one_token_of_output(length: int) -> None:
    engine = Engine(Config(max_model_len=12, block_size=4), StubExecutor(), clock=StepClock())
    engine.add(Request(request_id="a", prompt=[1] * length, sampling=SamplingParams(max_tokens=5)))
    engine.run()
    (seq,) = engine.finished
    assert (seq.finish_reason, len(seq.output)) == (("length", 1) if length == 11 else ("refused", 0))
    if length > 11:
        assert f"{length + 1} tokens" in (seq.error or "")


def test_the_future_is_known_only_where_that_is_said() -> None:
    with pytest.raises(ConfigError, match="oracle"):
        Engine(Config(prefetch="oracle", swap="host"), StubExecutor(), clock=StepClock())


class Listens(LRU):
    """Notes of every miss whether somebody asked again."""

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self.heard: list[bool] = []

    def miss(self, key: Any, readmitted: bool = False) -> None:
        self.heard.append(readmitted)


def test_who_comes_back_after_a_preemption_is_said_to_ask_again() -> None:
    heard: dict[int, list[bool]] = {}
    for num_blocks in (64, 6):
        config = Config(
            num_blocks=num_blocks, block_size=2, eviction=Listens(), preemption="recompute", max_model_len=12
        )
        requests = [
            Request(request_id=str(i), prompt=[i] * 4, sampling=SamplingParams(max_tokens=7))
            for i in range(3)
        ]
        engine = serve(Scenario(config, requests))
        heard[num_blocks] = engine.policies.eviction.heard
        assert bool(engine.totals.preemptions) == (num_blocks == 6)
    assert heard[64] == [False] * 6
    assert heard[6].count(False) == 6
    assert True in heard[6]


def test_tokens_end_a_request_unless_it_says_otherwise() -> None:
    said = StubExecutor().reference([1, 2, 3], 12)
    end, at = said[5], said.index(said[5])
    for params, reason, length in [
        ({"stop_token_ids": (end,)}, "stop", at + 1),
        ({}, "stop", at + 1),
        ({"ignore_eos": True}, "length", 12),
        ({"ignore_eos": True, "stop_token_ids": (end,)}, "stop", at + 1),
        ({"max_tokens": at + 1, "ignore_eos": True}, "length", at + 1),
    ]:
        sampling = SamplingParams(**{"max_tokens": 12, **params})  # type: ignore[arg-type]
        engine = Engine(Config(), StubExecutor(eos_token_id=end), clock=StepClock())
        engine.add(Request(request_id="a", prompt=[1, 2, 3], sampling=sampling))
        engine.run()
        (seq,) = engine.finished
        assert (seq.finish_reason, len(seq.output)) == (reason, length)


def test_who_was_given_a_spoiled_block_starts_over_at_once() -> None:
    """Not swapped out, for what would be kept is not worth it; and the scheduler is asked again, though it had said
    that its decision stands while all decode.
    """
    config = Config(swap="host", preemption="swap", block_size=4, num_blocks=32)
    engine = Engine(config, StubExecutor(), clock=StepClock())
    for i in range(3):
        sampling = SamplingParams(max_tokens=20, ignore_eos=True)
        engine.add(Request(request_id=str(i), prompt=[i] * 6, sampling=sampling))
    engine.run(max_steps=4)
    first, second, third = engine.running
    spoiled = (DEVICE, second.table.indices[0])
    fault = TierFault(DISK, 7, "damaged")
    assert engine._suffer(Damage([fault], {spoiled})) == [second]
    assert engine.running == [first, third]
    assert list(engine.waiting) == [second]
    assert second.num_computed == 0
    told = [e for e in engine.events if e.kind in (ev.TIER_FAULT, ev.REQUEST_PREEMPTED)]
    assert [(e.kind, e.seq_id, e.medium, e.detail) for e in told] == [
        (ev.TIER_FAULT, -1, "disk", "damaged"),
        (ev.REQUEST_PREEMPTED, second.seq_id, "device", "fault"),
    ]
    assert list(told[0].blocks) == [7]
    engine.step()
    assert engine.running == [first, third, second]
    engine.run()
    for i, seq in enumerate((first, second, third)):
        assert seq.output == StubExecutor().reference([i] * 6, 20)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_every_request_has_a_life_on_record(preemption: str) -> None:
    """Who arrives, is let in, put back, let in again and ends is named, with the reason."""
    scenario = conversation("chained-hash", "host")
    engine = serve(scenario, config=scenario.config.replace(preemption=preemption))
    by_kind: dict[str, list[Any]] = {}
    for event in engine.events:
        by_kind.setdefault(event.kind, []).append(event)
    of = {s.seq_id: s for s in engine.finished}
    for kind in (ev.REQUEST_ARRIVED, ev.REQUEST_ADMITTED):
        assert by_kind[kind]
        for event in by_kind[kind]:
            assert event.detail == of[event.seq_id].request_id
    for event in by_kind[ev.REQUEST_FINISHED]:
        assert event.detail == of[event.seq_id].finish_reason
        assert event.time == of[event.seq_id].finished_at
    assert sorted(e.seq_id for e in by_kind[ev.REQUEST_FINISHED]) == sorted(of)
    back, again = (
        [(e.seq_id, e.detail) for e in by_kind[k]] for k in (ev.REQUEST_PREEMPTED, ev.REQUEST_RESUMED)
    )
    assert Counter(back) == Counter(again)
    assert {how for _, how in back} == {preemption}
    assert Counter(seq_id for seq_id, _ in back) == {
        i: s.num_preemptions for i, s in of.items() if s.num_preemptions
    }


@pytest.mark.parametrize(("prompts", "salts", "waits"), [
    ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], (None, None), True),
    ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], ("a", "b"), False),
    ([[1, 2, 3, 4, 5], [9, 2, 3, 4, 6]], (None, None), False),
    ([[1, 2, 3, 4, 5], [1, 2, 3, 4]], (None, None), False),
])  # fmt: skip
def test_only_a_prefix_that_is_being_computed_is_waited_for(
    prompts: list[list[int]], salts: tuple[Any, Any], waits: bool
) -> None:
    """With ``wait_for_prefix``: of the same tenant, and a whole block that the later one can use."""
    engine = Engine(Config(wait_for_prefix=True, block_size=4), StubExecutor(), clock=StepClock())
    for i, (prompt, salt) in enumerate(zip(prompts, salts)):
        sampling = SamplingParams(max_tokens=3, ignore_eos=True)
        engine.add(Request(request_id=str(i), prompt=prompt, salt=salt, sampling=sampling))
    engine.run()
    first, second = sorted(engine.finished, key=lambda s: s.seq_id)
    assert first.admitted_at == 0
    assert second.admitted_at == waits * PS_PER_SECOND
    assert second.hit_tokens == 4 * waits
