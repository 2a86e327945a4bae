"""The event log: what a run says of itself is what happened."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from strategies import Scenario, examples, scenarios, serve
from test_law5_stub import conversation

from pagedlab import events as ev
from pagedlab.engine.clock import PS_PER_SECOND
from pagedlab.engine.engine import Engine
from pagedlab.events import Event, EventLog

KINDS = {value for name, value in vars(ev).items() if name.isupper() and isinstance(value, str)}


def test_rows_columns_and_frames_agree() -> None:
    log = EventLog()
    log.step, log.time = 3, 7
    log.record(ev.BLOCK_STORED, 1, [4, 5], [44, 55], None, token_ids=[(1, 2), (3, 4)])
    log.record(ev.ALL_BLOCKS_CLEARED)
    first, second = log
    assert first == Event(3, 7, "BlockStored", 1, (4, 5), (44, 55), None, "device", "", ((1, 2), (3, 4)))
    assert (second.seq_id, second.blocks) == (-1, ())
    assert list(log.since(1)) == [second]
    assert len(log) == 2
    columns = log.columns()
    assert columns["kind"] == ["BlockStored", "AllBlocksCleared"]
    assert columns["blocks"] == [[4, 5], []]
    assert "token_ids" not in columns
    frame = pytest.importorskip("pandas") and log.to_frame()
    assert list(frame["kind"]) == columns["kind"]
    assert list(frame.columns) == list(columns)


def test_an_empty_log_and_one_that_is_switched_off() -> None:
    for log in (EventLog(), EventLog(enabled=False)):
        if not log.enabled:
            log.record(ev.ALL_BLOCKS_CLEARED)
        assert len(log) == 0
        assert list(log) == []
        assert log.columns()["kind"] == []


def test_a_run_does_not_depend_on_its_log() -> None:
    from pagedlab.engine.clock import StepClock

    scenario = conversation()
    outputs = []
    for enabled in (True, False):
        log = EventLog(enabled=enabled)
        engine = Engine(scenario.config, scenario.executor(), clock=StepClock(), events=log)
        for request in scenario.requests:
            engine.add(request)
        engine.run()
        assert bool(len(log)) == enabled
        outputs.append([s.output for g in engine.groups.values() for s in g.sequences])
    assert outputs[0] == outputs[1]


@settings(max_examples=examples(1.5))
@given(scenarios())
def test_the_log_tells_the_whole_story(scenario: Scenario) -> None:
    """Replaying the events alone gives who is cached at the end, and every request's life in legal order."""
    engine = serve(scenario, check=False)
    cached: dict[tuple[str, int], int] = {}
    state: dict[int, str] = {}
    before = (0, 0)
    for event in engine.events:
        assert event.kind in KINDS
        assert (event.step, event.time) >= before, "steps and times never go back"
        before = event.step, event.time
        json.dumps([list(event.blocks), list(event.keys)])
        seq = event.seq_id
        if event.kind == ev.BLOCK_STORED:
            for block, key in zip(event.blocks, event.keys, strict=True):
                assert (event.medium, block) not in cached, "stored twice"
                cached[event.medium, block] = key
        elif event.kind == ev.BLOCK_REMOVED:
            for block, key in zip(event.blocks, event.keys, strict=True):
                assert cached.pop((event.medium, block)) == key, "removed under another name"
        elif event.kind in (ev.BLOCKS_LOADED, ev.BLOCKS_PREFETCHED):
            if event.detail != "resumed":
                cached.update({("device", b): k for b, k in zip(event.blocks, event.keys, strict=True)})
        elif event.kind == ev.ALL_BLOCKS_CLEARED:
            cached.clear()
        elif event.kind == ev.REQUEST_ARRIVED:
            assert state.setdefault(seq, "waiting") == "waiting"
        elif event.kind == ev.REQUEST_ADMITTED:
            assert state[seq] == "waiting"
            state[seq] = "running"
        elif event.kind == ev.REQUEST_PREEMPTED:
            assert state[seq] == "running"
            state[seq] = event.detail
        elif event.kind == ev.REQUEST_RESUMED:
            assert state[seq] == event.detail, "resumed in another way than it was preempted"
            state[seq] = "running"
        elif event.kind == ev.SEQUENCE_FORKED:
            state[seq] = "running"
        elif event.kind == ev.REQUEST_FINISHED:
            assert event.detail == "cancelled" or state[seq] == "running"
            state[seq] = "finished"
    for tier, pool in (("device", engine.cache.device), ("host", engine.cache.host)):
        if pool is not None:
            now = {b.index: b.key for b in pool.blocks if b.key is not None}
            assert {b: k for (medium, b), k in cached.items() if medium == tier} == now
    ended = [e.seq_id for e in engine.events if e.kind in (ev.REQUEST_FINISHED, ev.REQUEST_REFUSED)]
    assert sorted(ended) == sorted(s.seq_id for s in engine.finished)


@settings(max_examples=examples(0.7))
@given(scenarios())
def test_times_of_a_sequence_are_in_order(scenario: Scenario) -> None:
    engine = serve(scenario, check=False)
    for seq in engine.finished:
        assert len(seq.token_times) == len(seq.output)
        assert seq.token_times == sorted(seq.token_times)
        if seq.output:
            assert seq.admitted_at is not None
            assert seq.group.arrival <= seq.admitted_at < seq.token_times[0]
            assert seq.first_token_at == seq.token_times[0]
            assert seq.finished_at is not None
            assert seq.finished_at >= seq.token_times[-1]
    for record in engine.steps:
        assert record.duration == PS_PER_SECOND
        assert record.start % PS_PER_SECOND == 0
    assert engine.totals.output_tokens == sum(len(s.output) for s in engine.finished)
