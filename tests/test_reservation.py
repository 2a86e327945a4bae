"""Slot `reservation`: how much a request claims, and what that does to memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scenario, examples, policies, says_the_truth, servable, serve

from pagedlab.config import Config
from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.policies import Reservation
from pagedlab.registry import make


@dataclass
class Claimant:
    prompt_len: int
    num_tokens: int
    max_len: int
    expected_len: int


@st.composite
def claimants(draw: st.DrawFn) -> Claimant:
    prompt = draw(st.integers(1, 50))
    longest = prompt + draw(st.integers(1, 50))
    known = draw(st.integers(prompt, longest - 1))
    return Claimant(prompt, known, longest, draw(st.integers(prompt + 1, longest)))


def claim(name: str, who: Claimant, step_end: int, max_model_len: int) -> int:
    policy = make("reservation", name)
    assert isinstance(policy, Reservation)
    return policy.claim(who, step_end, max_model_len)


@settings(max_examples=examples(1.0))
@given(data=st.data(), who=claimants(), longer=st.integers(0, 50))
def test_a_claim_is_within_what_the_model_allows(data: st.DataObject, who: Claimant, longer: int) -> None:
    policy = data.draw(policies("reservation"))
    assert isinstance(policy, Reservation)
    most = who.max_len + longer
    step_end = data.draw(st.integers(1, who.num_tokens))
    claimed = policy.claim(who, step_end, most)
    assert 0 <= claimed <= most
    assert claimed == policy.claim(who, step_end, most), "a claim is a function of what it is told"


@given(who=claimants(), longer=st.integers(0, 50))
def test_builtins_claim_what_their_names_say(who: Claimant, longer: int) -> None:
    most = who.max_len + longer
    assert claim("on-demand", who, who.num_tokens, most) == who.num_tokens
    assert claim("full-prompt", who, 1, most) == who.num_tokens
    assert claim("max", who, who.num_tokens, most) == most
    outgrown = who.num_tokens >= who.expected_len
    foreseen = who.max_len if outgrown else who.expected_len
    assert claim("oracle", who, who.num_tokens, most) == foreseen - 1
    rounded = claim("pow2", who, who.num_tokens, most)
    output = foreseen - who.prompt_len
    assert rounded == most or rounded - who.prompt_len >= output
    assert rounded == most or rounded - who.prompt_len < 2 * output
    assert (rounded - who.prompt_len).bit_count() == 1 or rounded == most


def run(
    reservation: str, hint: int | None = 7, allocator: str = "free-list", lookup: str = "none"
) -> Scenario:
    requests = [
        Request(
            request_id=str(i),
            prompt=[i + 1] * 5,
            sampling=SamplingParams(max_tokens=7),
            hints=Hints(output_len=hint),
        )
        for i in range(3)
    ]
    config = Config(
        reservation=reservation,
        allocator=allocator,
        lookup=lookup,
        num_blocks=60,
        block_size=4,
        max_model_len=40,
        max_num_seqs=3,
        max_num_batched_tokens=64,
    )
    return Scenario(config, requests, vocab=60)


def test_who_claims_more_wastes_more() -> None:
    """The order of the paper's figure 2: the more is claimed at once, the less of what is held is used."""
    share = {}
    for name in ("max", "pow2", "oracle", "on-demand"):
        engine = serve(run(name))
        held = [r.memory.stored + r.memory.reserved + r.memory.internal for r in engine.steps]
        share[name] = sum(r.memory.stored for r in engine.steps) / sum(held)
    assert share["max"] < share["pow2"] <= share["oracle"] < share["on-demand"]


@pytest.mark.parametrize("name", servable("reservation"))
@pytest.mark.parametrize("hint", [None, 1, 3, 7, 30])
@pytest.mark.parametrize("allocator", servable("allocator"))
def test_a_wrong_hint_costs_room_and_never_the_output(name: str, hint: int | None, allocator: str) -> None:
    scenario = run(name, hint, allocator)
    says_the_truth(serve(scenario), scenario)


def test_a_full_claim_is_never_grown() -> None:
    """Who claimed everything at admission gets no further block while it runs."""
    for name in ("max", "oracle", "pow2"):
        engine = serve(run(name))
        allocations = [e for e in engine.events if e.kind == "BlocksAllocated"]
        assert len(allocations) == 3, name
    assert sum(e.kind == "BlocksAllocated" for e in serve(run("on-demand")).events) > 3


def test_a_full_prompt_has_its_room_before_its_first_chunk() -> None:
    """In chunks of 2, a prompt of 5 tokens claims its blocks at once, or one by one on demand."""
    held = {}
    for name in ("full-prompt", "on-demand"):
        scenario = run(name)
        config = scenario.config.replace(block_size=1, max_num_batched_tokens=2)
        engine = serve(Scenario(config, scenario.requests[:1], vocab=60))
        held[name] = [r.memory.stored + r.memory.reserved for r in engine.steps[:3]]
    assert held == {"full-prompt": [5, 5, 5], "on-demand": [2, 4, 5]}


def test_a_watermark_keeps_room_for_those_who_run() -> None:
    """The older rule in both its parts: with blocks kept free, who runs is preempted less often."""
    requests = [
        Request(request_id=str(i), prompt=[i] * 8, sampling=SamplingParams(max_tokens=12)) for i in range(8)
    ]
    preempted = []
    for watermark in (0.0, 0.3):
        config = Config.preset(
            "vllm-v0", watermark=watermark, num_blocks=20, block_size=4, max_num_seqs=8, max_model_len=40
        )
        scenario = Scenario(config, requests, vocab=60)
        engine = serve(scenario)
        says_the_truth(engine, scenario)
        preempted.append(engine.totals.preemptions)
    assert preempted[0] > preempted[1]
