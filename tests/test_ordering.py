"""Schedulers that do not take the queue as it comes: whose prompt is next, and that nobody waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scenario, event_rows, examples, scenarios, servable, serve

from pagedlab.config import Config
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import StepOrders, StepResult
from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.executors.stub import StubExecutor
from pagedlab.policies.fair import Fair
from pagedlab.registry import make


def admitted(engine: Engine) -> list[str]:
    return [e.detail for e in engine.events if e.kind == "RequestAdmitted"]


def one_seat(requests: list[Request], scheduler: str, **params: Any) -> list[str]:
    """The order in which requests are admitted where one runs at a time."""
    config = Config(
        scheduler=make("scheduler", scheduler, **params),  # type: ignore[arg-type]
        num_blocks=400,
        block_size=4,
        max_num_seqs=1,
        max_num_batched_tokens=512,
        max_model_len=200,
    )
    return admitted(serve(Scenario(config, requests, vocab=50)))


def request(name: str, length: int, tokens: int = 4, **other: Any) -> Request:
    return Request(
        request_id=name,
        prompt=[ord(name[0]) % 50] * length,
        sampling=SamplingParams(max_tokens=tokens),
        **other,
    )


# ---- prefill-first ---------------------------------------------------------------------------------------------------


class Watched(StubExecutor):
    """Keeps the lengths of what every step computed."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.batches: list[list[int]] = []

    def execute(self, orders: StepOrders) -> StepResult:
        self.batches.append([len(e.tokens) for e in orders.batch])
        return super().execute(orders)


@pytest.mark.parametrize(("scheduler", "mixed"), [("prefill-first", False), ("iteration-level", True)])
def test_prefill_first_keeps_prompts_and_decodes_apart(scheduler: str, mixed: bool) -> None:
    requests = [request(name, 5 + i, 12, arrival=3.0 * i) for i, name in enumerate("abcdef")]
    config = Config(scheduler=scheduler, num_blocks=100, block_size=4, max_num_seqs=8, max_model_len=60)
    executor = Watched(vocab_size=50)
    serve(Scenario(config, requests), executor)
    assert any(1 in batch and max(batch) > 1 for batch in executor.batches) == mixed


def test_prefill_first_has_the_earliest_first_tokens_and_stalls_the_others() -> None:
    requests = [request(name, 5 + i, 12, arrival=2.0 * i) for i, name in enumerate("abcdef")]
    ended, first = {}, {}
    for name in ("prefill-first", "iteration-level"):
        config = Config(scheduler=name, num_blocks=100, block_size=4, max_num_seqs=8, max_model_len=60)
        engine = serve(Scenario(config, requests, vocab=50))
        ended[name] = engine.groups["a"].sequences[0].finished_at
        first[name] = [g.sequences[0].first_token_at - g.arrival for g in engine.groups.values()]
    assert max(first["prefill-first"]) <= max(first["iteration-level"])
    assert ended["prefill-first"] > ended["iteration-level"], "five prompts were computed meanwhile"


# ---- shortest-first, priority ----------------------------------------------------------------------------------------


def test_shortest_first_admits_by_length() -> None:
    requests = [request("c", 30), request("a", 7), request("d", 31), request("b", 9)]
    assert one_seat(requests, "shortest-first") == ["a", "b", "c", "d"]
    assert one_seat(requests, "chunked-prefill") == ["c", "a", "d", "b"]


def test_shortest_first_can_count_the_expected_output() -> None:
    requests = [
        request("a", 10, 60, hints=Hints(output_len=50)),
        request("b", 20, 60, hints=Hints(output_len=2)),
        request("c", 11, 60),
    ]
    assert one_seat(requests, "shortest-first") == ["a", "c", "b"]
    assert one_seat(requests, "shortest-first", work="total") == ["b", "a", "c"]


def coming(long: int = 40) -> list[Request]:
    """A long request that keeps being overtaken by short ones, unless waiting counts."""
    return [
        request("first", 4, 4),
        request("long", long, arrival=1.0),
        *(request(f"s{i}", 4, 4, arrival=2.0 + 3 * i) for i in range(12)),
    ]


@pytest.mark.parametrize(("scheduler", "more"), [("shortest-first", {}), ("priority", {"priority": 3})])
def test_ageing_brings_in_who_would_starve(scheduler: str, more: dict[str, int]) -> None:
    requests = coming()
    if more:
        requests = [Request(**{**vars(r), **more}) if r.request_id.startswith("s") else r for r in requests]
    at = [
        one_seat(requests, scheduler, ageing=rate).index("long") for rate in (0.0, 0.5 if more else 2.0, 1e4)
    ]
    assert at[0] == len(requests) - 1, "nothing else is left"
    assert at[2] == 1, "first come, first served"
    assert at[2] < at[1] < at[0]


def test_priority_admits_by_level_then_by_arrival() -> None:
    requests = [request(n, 5, priority=p) for n, p in (("a", 0), ("b", 2), ("c", 1), ("d", 2), ("e", -1))]
    assert one_seat(requests, "priority") == ["b", "d", "c", "a", "e"]


def test_a_short_prompt_overtakes_one_that_has_begun() -> None:
    """A long prompt in chunks does not hold up a short one that comes later."""
    requests = [request("long", 60), request("quick", 3, arrival=2.0)]
    ends = {}
    for name, params in (("shortest-first", {"ageing": 1.0}), ("chunked-prefill", {})):
        config = Config(
            scheduler=make("scheduler", name, **params),  # type: ignore[arg-type]
            num_blocks=100,
            block_size=4,
            max_num_batched_tokens=16,
            max_num_seqs=4,
            max_model_len=100,
        )
        engine = serve(Scenario(config, requests, vocab=50))
        ends[name] = engine.groups["quick"].sequences[0].first_token_at
    assert ends["shortest-first"] < ends["chunked-prefill"]


# ---- longest-prefix --------------------------------------------------------------------------------------------------


def families(n: int = 5, turns: int = 4) -> list[Request]:
    """Families of prompts with a stem each, coming one of each family at a time."""
    return [
        Request(
            request_id=f"{f}.{t}",
            prompt=[*[10 + f] * 24, 30 + t, f],
            sampling=SamplingParams(max_tokens=3),
            salt=str(f),
        )
        for t in range(turns)
        for f in range(n)
    ]


def prefix_config(**params: Any) -> Config:
    return Config(
        scheduler=make("scheduler", "longest-prefix", **params),  # type: ignore[arg-type]
        num_blocks=16,
        block_size=4,
        max_num_seqs=1,
        max_num_batched_tokens=64,
        max_model_len=64,
    )


def test_longest_prefix_hits_what_first_come_would_have_lost() -> None:
    requests = families()
    lpm = serve(Scenario(prefix_config(), requests, vocab=50))
    fcfs = serve(Scenario(prefix_config().replace(scheduler="chunked-prefill"), requests, vocab=50))
    assert fcfs.totals.hit_tokens == 0, "five stems do not fit"
    assert lpm.totals.hit_tokens == 5 * 3 * 24, "every family one after the other"


def test_a_queue_too_long_is_taken_as_it_comes() -> None:
    requests = families()
    fcfs = serve(Scenario(prefix_config().replace(scheduler="chunked-prefill"), requests, vocab=50))
    short = serve(Scenario(prefix_config(max_queue=1), requests, vocab=50))
    assert event_rows(short) == event_rows(fcfs)
    some = serve(Scenario(prefix_config(max_queue=10), requests, vocab=50))
    assert admitted(some)[:9] == admitted(fcfs)[:9]
    assert 0 < some.totals.hit_tokens < 5 * 3 * 24


# ---- fair ------------------------------------------------------------------------------------------------------------


class Ledger:
    """The service that tenants get, counted from outside, while all of them have requests waiting."""

    def __init__(self, tenants: tuple[str, ...], weights: tuple[float, float]) -> None:
        self.tenants, (self.input_weight, self.output_weight) = tenants, weights
        self.leads: list[float] = []

    def service(self, engine: Engine, tenant: str) -> float:
        groups = [g for g in engine.groups.values() if g.request.salt == tenant]
        inputs = sum(len(g.request.prompt) for g in groups if g.sequences[0].admitted_at is not None)
        outputs = sum(s.num_output for g in groups for s in g.sequences)
        return self.input_weight * inputs + self.output_weight * outputs

    def __call__(self, engine: Engine) -> None:
        if {s.salt for s in engine.waiting} == set(self.tenants):
            one, other = (self.service(engine, t) for t in self.tenants)
            self.leads.append(one - other)

    def bound(self, requests: list[Request], seats: int) -> float:
        """What the paper allows; M, the tokens of a full batch, are those of as many of the longest requests."""
        lengths = sorted(len(r.prompt) + r.sampling.max_tokens for r in requests)
        longest = max(len(r.prompt) for r in requests)
        return 2 * max(self.input_weight * longest, self.output_weight * sum(lengths[-seats:]))

    @property
    def spread(self) -> float:
        """The most by which one got more than the other in any interval."""
        return max(self.leads) - min(self.leads)


@st.composite
def rivals(draw: st.DrawFn) -> list[Request]:
    """Two tenants with many requests each, of lengths of their own; one may come first with all of them."""
    requests = []
    for tenant in ("x", "y"):
        prompts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
        outputs = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
        requests += [
            Request(
                request_id=f"{tenant}{i}",
                prompt=[i % 40] * prompts[i % len(prompts)],
                sampling=SamplingParams(max_tokens=outputs[i % len(outputs)]),
                salt=tenant,
            )
            for i in range(25)
        ]
    return draw(st.permutations(requests)) if draw(st.booleans()) else requests


def fair_config(seats: int = 3, scheduler: Any = "fair") -> Config:
    return Config(
        scheduler=scheduler,
        lookup="none",
        num_blocks=400,
        block_size=4,
        max_num_seqs=seats,
        max_num_batched_tokens=64,
        max_model_len=64,
    )


@settings(max_examples=examples(0.6))
@given(rivals(), st.integers(1, 4), st.sampled_from([(1.0, 2.0), (1.0, 1.0), (0.5, 3.0), (0.0, 1.0)]))
def test_two_tenants_that_wait_get_the_same(
    requests: list[Request], seats: int, weights: tuple[float, float]
) -> None:
    """The theorem of the paper: the difference is at most 2 max(w_p L_input, w_q M), over any interval."""
    ledger = Ledger(("x", "y"), weights)
    policy = Fair(input_weight=weights[0], output_weight=weights[1])
    engine = serve(Scenario(fair_config(seats, policy), requests, vocab=50), check=False, after_step=ledger)
    assert not engine.totals.preemptions
    if ledger.leads:
        assert ledger.spread <= ledger.bound(requests, seats)


def flood(n: int = 30) -> list[Request]:
    """One tenant has sent everything before the other comes."""
    return [
        Request(
            request_id=f"{tenant}{i}",
            prompt=[i] * 8,
            sampling=SamplingParams(max_tokens=8),
            salt=tenant,
            session=f"{tenant}{i % 2}",
        )
        for tenant in ("x", "y")
        for i in range(n)
    ]


def test_first_come_first_served_breaks_the_bound_that_fair_keeps() -> None:
    spread = {}
    for name in ("fair", "chunked-prefill"):
        ledger = Ledger(("x", "y"), (1.0, 2.0))
        serve(Scenario(fair_config(3, name), flood(), vocab=50), check=False, after_step=ledger)
        spread[name] = ledger.spread
    assert spread["fair"] <= ledger.bound(flood(), 3) < spread["chunked-prefill"]


def test_within_a_tenant_first_come_is_first_served() -> None:
    order = admitted(serve(Scenario(fair_config(), flood(), vocab=50)))
    for tenant in "xy":
        assert [n for n in order if n[0] == tenant] == [f"{tenant}{i}" for i in range(30)]


def test_the_tenant_may_be_the_session() -> None:
    by_salt = admitted(serve(Scenario(fair_config(1), flood(), vocab=50)))
    by_session = admitted(serve(Scenario(fair_config(1, Fair(tenant="session")), flood(), vocab=50)))
    assert [n[0] for n in by_salt[:4]] == ["x", "y", "x", "y"]
    assert by_session[:4] == ["x0", "x1", "y0", "y1"]


def test_weights_count() -> None:
    """One sends long prompts, the other asks for long answers: what is counted decides who gets in."""
    requests = [
        Request(
            request_id=f"{tenant}{i}",
            prompt=[i] * (12 if tenant == "x" else 2),
            sampling=SamplingParams(max_tokens=2 if tenant == "x" else 12),
            salt=tenant,
        )
        for i in range(20)
        for tenant in "xy"
    ]
    first = {}
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        policy = Fair(input_weight=weights[0], output_weight=weights[1])
        order = admitted(serve(Scenario(fair_config(1, policy), requests, vocab=50)))
        first[weights] = sum(n[0] == "x" for n in order[:14])
    assert first[1.0, 0.0] < 4 < 10 < first[0.0, 1.0]


def test_being_away_earns_nothing() -> None:
    """Who comes late is lifted to the others: it gets its share from then on, not what it has missed."""
    early = [r for r in flood(40) if r.salt == "x"]
    late = [Request(**{**vars(r), "arrival": 60.0}) for r in flood(20) if r.salt == "y"]
    engine = serve(Scenario(fair_config(2), [*early, *late], vocab=50), check=False)
    order = admitted(engine)
    start = order.index("y0")
    assert start > 8
    share = [n[0] for n in order[start : start + 12]]
    assert abs(share.count("x") - share.count("y")) <= 2


def test_a_preempted_request_is_charged_once() -> None:
    requests = flood(4)
    config = fair_config(4).replace(num_blocks=9, lookup="chained-hash")
    seen: list[Fair] = []
    engine = serve(
        Scenario(config, requests, vocab=50),
        after_step=lambda e: seen.append(e.policies.scheduler),  # type: ignore[arg-type]
    )
    assert engine.totals.preemptions
    assert {a.inputs for a in seen[-1].accounts.values()} == {4 * 8}


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", servable("scheduler"))
@settings(max_examples=examples(0.3))
@given(data=st.data())
def test_nobody_starves(name: str, data: st.DataObject) -> None:
    """Law 7 for each: all who can run at all have run, in a pool that is as small as it can be."""
    scenario = data.draw(scenarios(choose={"scheduler": (name,)}))
    engine = serve(scenario, check=False)
    for group in engine.groups.values():
        assert all(s.finish_reason in ("stop", "length", "cancelled", "refused") for s in group.sequences)


def test_every_scheduler_makes_another_run() -> None:
    requests = [
        Request(
            request_id=str(i),
            prompt=[i % 3] * (3 + 7 * i % 24),
            arrival=float(i // 3),
            priority=i * 7 % 4,
            salt="ab"[i % 5 > 1],
            sampling=SamplingParams(max_tokens=5 + i % 4),
        )
        for i in range(16)
    ]
    logs = {}
    for name in servable("scheduler"):
        config = fair_config(3, name).replace(lookup="chained-hash", max_num_batched_tokens=20)
        logs[name] = event_rows(serve(Scenario(config, requests, vocab=50), check=False))
    names = list(logs)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert logs[one] != logs[other], f"{one} and {other} are one policy"
