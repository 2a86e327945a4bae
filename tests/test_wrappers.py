"""Wrappers change nothing: whatever is wrapped decides the same; and what they write down is what happened."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    ENGINE_SLOTS,
    Scenario,
    event_rows,
    examples,
    policies,
    says_the_truth,
    scenarios,
    servable,
    serve,
)
from test_scheduler import plain

import pagedlab as pl
from pagedlab.config import Config
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.errors import ConfigError
from pagedlab.policies import LFU, LRU, Eviction, Recorded, Timed
from pagedlab.policies.block import Block
from pagedlab.registry import make

KEYS = [(i * i + i // 7) % 23 for i in range(400)]


@settings(max_examples=examples(1.5))
@given(scenarios(), st.sampled_from((Timed, Recorded)))
def test_a_run_with_every_policy_wrapped_is_the_same_run(scenario: Scenario, wrapper: Any) -> None:
    wrapped = {slot: wrapper(scenario.config.policy(slot)) for slot in ENGINE_SLOTS}
    engine = serve(scenario, config=scenario.config.replace(**wrapped))
    says_the_truth(engine, scenario)
    assert event_rows(engine) == event_rows(serve(scenario, check=False))
    for slot, policy in wrapped.items():
        assert type(getattr(engine.policies, slot)) is type(policy)
    assert wrapped["scheduler"].book, "what the run's clone was asked is in the book of the original"
    assert wrapped["allocator"].book


@pytest.mark.parametrize("name", servable("eviction"))
@pytest.mark.parametrize("semantics", ["plain", "prefix"])
def test_a_replay_with_a_wrapped_policy_finds_the_same(name: str, semantics: Any) -> None:
    plain = pl.replay(KEYS, name, 7, semantics=semantics, progress=False)
    for wrapper in (Timed, Recorded):
        again = pl.replay(KEYS, wrapper(make("eviction", name)), 7, semantics=semantics, progress=False)
        assert again.request_hits == plain.request_hits


# ---- Timed -----------------------------------------------------------------------------------------------------------


def test_calls_are_counted_as_they_were_made() -> None:
    timed = Timed(LRU())
    done = pl.replay(KEYS, timed, 7, semantics="plain", progress=False)
    calls = {method: cost.calls for method, cost in timed.times.items()}
    assert calls["hit"] == done.hits
    assert calls["miss"] == calls["insert"] == done.misses
    assert calls["release"] == len(KEYS)
    assert calls["evict"] == done.misses - 7
    assert calls["reset"] == 1
    assert "victims" not in calls, "what evict does inside is its own affair"
    assert done.stats["calls"] == calls
    assert set(done.stats["seconds"]) == set(calls)


class Slow(Eviction):
    """Sleeps over every victim."""

    def priority(self, block: Block) -> float:
        return block.born

    def victims(self, n: int, protected: Any = ()) -> list[Block]:
        time.sleep(0.002)
        return super().victims(n, protected)

    def stats(self) -> dict[str, Any]:
        return {"mood": "sleepy"}


def test_time_is_where_it_is_spent() -> None:
    timed = Timed(Slow())
    done = pl.replay(KEYS[:60], timed, 7, semantics="plain", progress=False)
    times = timed.times
    assert next(iter(times)) == "evict", "the dearest first"
    assert times["evict"].seconds >= 0.002 * times["evict"].calls
    assert times["release"].seconds < times["evict"].seconds
    assert done.stats["mood"] == "sleepy"
    head, first, *rest = timed.report().splitlines()
    assert head.split() == ["method", "calls", "ms", "µs", "a", "call"]
    assert first.split()[0] == "evict"
    assert len(rest) == len(times) - 1


def test_clones_write_into_one_book_and_other_wrappers_into_their_own() -> None:
    one, other = Timed(LRU()), Timed(LRU())
    pl.replay(KEYS, one, 7, progress=False)
    first = one.times["reset"].calls
    pl.replay(KEYS, one.clone(), 7, progress=False)
    assert one.times["reset"].calls == first + 1
    assert not other.times
    one.forget()
    assert not one.times
    assert one.report().count("\n") == 0


def test_a_wrapped_policy_is_its_policy() -> None:
    timed = Timed(make("eviction", "quota", shares="a=0.5"))
    assert isinstance(timed, Timed)
    assert isinstance(timed, Eviction)
    assert timed.get_params()["shares"] == "a=0.5"
    assert timed.clone(shares="b=0.1").shares == "b=0.1"
    assert Config(eviction=timed).describe()["eviction"]["name"] == "TimedQuota"
    with pytest.raises(ConfigError, match="not registered"):
        Config(eviction=timed).to_json()


@pytest.mark.parametrize("wrapper", [Timed, Recorded])
def test_what_cannot_be_wrapped_is_named(wrapper: Any) -> None:
    with pytest.raises(ConfigError, match=f"{wrapper.__name__} wraps a policy object, not 'lru'"):
        wrapper("lru")


def test_wrappers_can_be_nested() -> None:
    both = Timed(Recorded(LRU()))
    done = pl.replay(KEYS, both, 7, semantics="plain", progress=False)
    assert done.hits == pl.replay(KEYS, "lru", 7, semantics="plain", progress=False).hits
    assert both.times["hit"].calls == done.hits


# ---- Recorded --------------------------------------------------------------------------------------------------------


def recorded(policy: Any, semantics: Any = "prefix") -> Recorded:
    wrapped = Recorded(policy)
    pl.replay(KEYS, wrapped, 7, semantics=semantics, progress=False)
    return wrapped  # type: ignore[no-any-return]


def test_equal_runs_make_equal_recordings() -> None:
    one, other = recorded(LRU()), recorded(LRU())
    assert one.book == other.book
    assert one.book != recorded(LFU()).book
    assert [call.method for call in one.book[:4]] == ["reset", "begin", "miss", "insert"]


@settings(max_examples=examples(1.0))
@given(data=st.data())
def test_the_same_policy_gives_the_same_answers_again(data: st.DataObject) -> None:
    """Law 2 from a log: any policy, with any parameters, asked the same once more."""
    policy = data.draw(policies("eviction"))
    assert recorded(policy, data.draw(st.sampled_from(("plain", "prefix")))).first_difference(policy) is None


def test_another_policy_is_caught_at_its_first_other_answer() -> None:
    log = recorded(LRU(), "plain")
    found = log.first_difference(LFU())
    assert found is not None
    assert found.call is log.book[found.number]
    assert found.call.method == "evict"
    assert found.answer != found.call.answer
    assert not any(c.method == "evict" and c.answer is None for c in log.book)


def test_allocators_can_be_compared() -> None:
    log = Recorded(make("allocator", "first-fit"))
    config = Config(allocator=log, num_blocks=16, block_size=4, lookup="none", max_model_len=40)
    requests = [
        Request(
            request_id=str(i),
            prompt=[i] * (3 + i),
            arrival=float(i),
            sampling=SamplingParams(max_tokens=9 - i),
        )
        for i in range(6)
    ]
    serve(Scenario(config, requests, vocab=40))
    assert log.first_difference(make("allocator", "first-fit")) is None
    found = log.first_difference(make("allocator", "fifo"))
    assert found is not None
    assert found.call.method == "allocate"


def test_what_lives_in_the_engine_cannot_be_asked_again() -> None:
    log = Recorded(make("scheduler", "fair"))
    serve(plain(), config=plain().config.replace(scheduler=log))
    assert [call.method for call in log.book[:2]] == ["reset", "plan"]
    with pytest.raises(ConfigError, match="does not keep a Plan"):
        log.first_difference(make("scheduler", "fair"))
    with pytest.raises(ConfigError, match="slot 'scheduler'"):
        log.first_difference(LRU())
