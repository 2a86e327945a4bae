"""Slot `preemption`: whom it stops, by which way back, and that the choices are not one under several names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scenario, event_rows, examples, policies, says_the_truth, serve

from pagedlab.config import Config
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.policies import Preemption
from pagedlab.policies.view import View
from pagedlab.registry import make


@dataclass(frozen=True)
class Victim:
    num_computed: int
    priority: int = 0
    num_shared: int = 0
    request_id: str = "r"


class Shape(View):
    """A model that costs 10 FLOPs a token and 2 a pair, and stores a token in 3 bytes."""

    flops_per_token = 10.0
    flops_per_pair = 2.0
    bytes_per_token = 3.0


def preemption(name: str, **params: Any) -> Preemption:
    policy = make("preemption", name, **params)
    assert isinstance(policy, Preemption)
    policy.attach(Shape())
    return policy


victims = st.builds(
    lambda n, share, p: Victim(n, p, n * share // 4),
    st.integers(1, 90),
    st.integers(0, 4),
    st.integers(-2, 2),
)


def flops(victim: Victim) -> float:
    return sum(10 + 2 * position for position in range(victim.num_shared + 1, victim.num_computed + 1))


@settings(max_examples=examples(2))
@given(data=st.data(), candidates=st.lists(victims, min_size=1, max_size=6))
def test_victims_are_what_their_names_say(data: st.DataObject, candidates: list[Victim]) -> None:
    policy = data.draw(policies("preemption"))
    assert isinstance(policy, Preemption)
    policy.attach(Shape())
    rate = getattr(policy, "flops_per_byte", 1.0)
    work = {
        "recompute": flops,
        "swap": lambda v: 2 * 3 * v.num_computed * rate,
        "cheaper": lambda v: min(flops(v), 2 * 3 * v.num_computed * rate),
    }[policy.name]
    key = {"last-in": lambda v: 0, "priority": lambda v: v.priority, "cheapest": work}[policy.victim]  # type: ignore[attr-defined]
    chosen = policy.choose(candidates)
    assert key(chosen) == pytest.approx(min(map(key, candidates)))
    equals = [i for i, v in enumerate(candidates) if key(v) == key(chosen)]
    assert chosen is candidates[equals[-1]], "among equals the one that was admitted last"
    mode = policy.mode(chosen)
    if policy.name != "cheaper":
        assert mode == policy.name
    elif flops(chosen) != pytest.approx(6 * chosen.num_computed * rate):
        assert mode == ("swap" if 6 * chosen.num_computed * rate < flops(chosen) else "recompute")


def test_the_cheapest_depends_on_the_way_back() -> None:
    """Long and shared costs little to compute again and much to move."""
    candidates = [Victim(80, num_shared=79), Victim(20), Victim(40)]
    assert preemption("recompute", victim="cheapest").choose(candidates) is candidates[0]
    assert preemption("swap", victim="cheapest").choose(candidates) is candidates[1]
    assert preemption("recompute", victim="last-in").choose(candidates) is candidates[2]


def test_cheaper_turns_with_the_length_of_the_context() -> None:
    """Work grows with the square of the context, bytes with its length: there is a length from which swapping pays."""
    policy = preemption("cheaper", flops_per_byte=10.0)
    modes = [policy.mode(Victim(n)) for n in range(1, 200)]
    assert modes == sorted(modes), "recompute up to some length, swap beyond"
    assert set(modes) == {"recompute", "swap"}
    assert policy.mode(Victim(199, num_shared=190)) == "recompute"


def crowd(**config: Any) -> Scenario:
    """Some requests share a long prompt, others have their own, and the pool is too small for all of them."""
    stem = [1, 2, 3, 1, 2, 0] * 4
    requests = [
        Request(
            request_id=str(i),
            prompt=[*stem, i % 4] if i % 2 else [i % 4, *[(i + t) % 4 for t in range(4 + 3 * i)]],
            priority=i % 3,
            sampling=SamplingParams(max_tokens=16 + i),
        )
        for i in range(8)
    ]
    sizes = {"num_blocks": 44, "block_size": 2, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Scenario(Config(**{**sizes, "max_model_len": 64, **config}), requests)


def test_every_choice_makes_another_run() -> None:
    logs = {}
    for name in ("recompute", "swap", "cheaper"):
        for victim in ("last-in", "priority", "cheapest"):
            more = {"flops_per_byte": 0.4} if name == "cheaper" else {}
            scenario = crowd(preemption=make("preemption", name, victim=victim, **more))
            engine = serve(scenario)
            says_the_truth(engine, scenario)
            assert engine.totals.preemptions
            logs[name, victim] = event_rows(engine)
    rows = list(logs.items())
    for i, (one, log) in enumerate(rows):
        for other, another in rows[:i]:
            assert log != another, f"{one} and {other} are one policy"


def test_cheaper_swaps_some_and_recomputes_others() -> None:
    scenario = crowd(preemption=make("preemption", "cheaper", flops_per_byte=0.4))
    engine = serve(scenario)
    ways = {e.detail for e in engine.events if e.kind == "RequestPreempted"}
    assert ways == {"swap", "recompute"}


def test_cheaper_brings_a_host_tier_of_its_own() -> None:
    assert Config(preemption="cheaper", num_blocks=7).num_host_blocks == 7
    assert Config(preemption="recompute", num_blocks=7).num_host_blocks == 0


def test_what_is_shared_is_counted_in_whole_cached_blocks() -> None:
    seen = set()

    def look(engine: Any) -> None:
        for seq in engine.running:
            held = [b for b in seq.table.blocks if b.ref_count > 1]
            seen.add(seq.num_shared)
            assert seq.num_shared <= sum(b.fill for b in held)
            assert seq.num_shared <= seq.num_computed

    serve(crowd(), after_step=look)
    assert 24 in seen
    seen.clear()
    serve(crowd(lookup="none"), after_step=look)
    assert seen == {0}, "without a lookup nothing is found again"
