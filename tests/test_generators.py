"""Synthetic workloads: what they promise to share, how long they are, when they come, and both forms of a prompt."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pagedlab.workloads as w
from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt
from pagedlab.workloads.synthetic import LogNormal

BOTH_FORMS = {
    "conversations": {"sessions": 5},
    "agents": {"num_agents": 4},
    "rag": {"num_requests": 20, "documents": 6},
}


def blocks_of(workload: w.Workload, block: int) -> list[list[int]]:
    """Number every full block by its content and all before it, in the order of first sight."""
    seen: dict[Any, int] = {}
    found = []
    for request in workload:
        prompt = request.prompt
        if isinstance(prompt, HashedPrompt):
            keys: list[Any] = list(prompt.hash_ids[: prompt.num_full])
        else:
            keys = [tuple(prompt[: i + block]) for i in range(0, len(prompt) - block + 1, block)]
        found.append([seen.setdefault(k, len(seen)) for k in keys])
    return found


@pytest.mark.parametrize("name", BOTH_FORMS)
@pytest.mark.parametrize("block", [1, 16, 48])
def test_hashes_say_what_the_tokens_say(name: str, block: int) -> None:
    tokens = w.load(name, seed=7, **BOTH_FORMS[name])
    hashes = w.load(name, seed=7, hash_block=block, **BOTH_FORMS[name])
    assert hashes.outputs is None
    for t, h in zip(tokens, hashes, strict=True):
        assert (t.request_id, t.arrival, t.follows, t.think_time) == (
            h.request_id,
            h.arrival,
            h.follows,
            h.think_time,
        )
        assert len(t.prompt) == len(h.prompt)
        assert isinstance(h.prompt, HashedPrompt)
    assert blocks_of(tokens, block) == blocks_of(hashes, block)


@pytest.mark.parametrize("name", ["conversations", "agents"])
def test_a_closed_loop_repeats_its_history_with_the_answers(name: str) -> None:
    workload = w.load(name, seed=3)
    assert workload.outputs is not None
    by_id = {r.request_id: r for r in workload}
    assert set(workload.outputs) == set(by_id)
    openings = Counter(r.session for r in workload if r.follows is None)
    assert set(openings.values()) == {1}
    for request in workload:
        assert len(workload.outputs[request.request_id]) == request.sampling.max_tokens
        if request.follows is not None:
            before = by_id[request.follows]
            assert before.session == request.session
            assert request.think_time > 0
            said = list(before.prompt) + list(workload.outputs[before.request_id])
            assert list(request.prompt)[: len(said)] == said


def test_agents_count_their_steps() -> None:
    workload = w.agents(seed=1, num_agents=3, steps=4)
    assert sorted(r.hints.agent_step or 0 for r in workload) == sorted([0, 1, 2, 3] * 3)


def test_an_open_loop_follows_nobody() -> None:
    workload = w.conversations(closed_loop=False)
    assert all(r.follows is None and r.think_time == 0 for r in workload)
    assert [r.arrival for r in workload] == [r.arrival for r in w.conversations()]


def test_all_conversations_share_the_system_prompt_and_nothing_else() -> None:
    prompts = [r.prompt for r in w.conversations(system=64, turns=1, sessions=10)]
    assert len({tuple(p[:64]) for p in prompts}) == 1
    assert len({tuple(p[64:80]) for p in prompts}) == 10


def test_popular_documents_come_first_and_are_shared() -> None:
    by_rank, drawn = (w.rag(num_requests=300, order=o, hash_block=16) for o in ("popular-first", "drawn"))
    assert by_rank.describe()["input_tokens"] == drawn.describe()["input_tokens"]
    assert by_rank.describe()["repeated_blocks"] > drawn.describe()["repeated_blocks"] > 0.1


def test_every_document_is_drawn_once_even_where_chances_are_nil() -> None:
    workload = w.rag(num_requests=3, documents=4, per_prompt=4, alpha=2000.0, document=16, system=16)
    assert {len(set(map(tuple, [r.prompt[i : i + 16] for i in range(16, 80, 16)]))) for r in workload} == {4}


@pytest.mark.parametrize(("name", "means"), [("sharegpt-like", (161, 338)), ("alpaca-like", (19, 58))])
def test_published_means_hold_after_clipping(name: str, means: tuple[int, int]) -> None:
    workload = w.load(name, num_requests=60_000, hashed=True)
    inputs = [len(r.prompt) for r in workload]
    outputs = [r.sampling.max_tokens for r in workload]
    assert statistics.fmean(inputs) == pytest.approx(means[0], rel=0.02)
    assert statistics.fmean(outputs) == pytest.approx(means[1], rel=0.02)
    assert min(inputs) >= 2
    assert max(outputs) > 3 * means[1]  # skewed, as the real ones are
    few = w.load(name, num_requests=20)
    assert [len(r.prompt) for r in few] == inputs[:20]


@settings(max_examples=30, deadline=None)
@given(low=st.integers(1, 20), width=st.integers(2, 4000), at=st.floats(0.05, 0.9), sigma=st.floats(0.05, 3))
def test_the_clipped_mean_is_solved_for(low: int, width: int, at: float, sigma: float) -> None:
    mean = low + at * width
    lengths = LogNormal(mean, sigma, low, low + width)
    assert lengths._mean() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("hashed", [False, True])
def test_zipf_blocks_come_as_often_as_their_ranks_say(hashed: bool) -> None:
    workload = w.zipf(num_requests=20_000, blocks=50, alpha=1.0, tail=0, hashed=hashed)
    counts = Counter(tuple(r.prompt) for r in workload).most_common()
    assert len(counts) == 50
    assert counts[0][1] / counts[1][1] == pytest.approx(2.0, rel=0.1)
    assert counts[0][1] / counts[9][1] == pytest.approx(10.0, rel=0.2)
    assert {len(r.prompt) for r in workload} == {16}


def test_a_tail_is_private() -> None:
    for hashed in (False, True):
        workload = w.zipf(num_requests=100, blocks=3, tail=2, hashed=hashed)
        assert len({tuple(r.prompt[:16]) for r in workload}) == 3
        assert len({tuple(r.prompt[16:]) for r in workload}) == 100


def test_the_scan_never_returns_and_the_loop_always_does() -> None:
    workload = w.scan_loop(num_requests=1000, loop=10, scan=0.4, tail=0, hashed=True)
    counts = Counter(r.prompt for r in workload)
    often = {p: n for p, n in counts.items() if n > 1}
    assert len(often) == 10
    assert sum(often.values()) == pytest.approx(600, abs=60)
    looped = [r.prompt for r in workload if r.prompt in often]
    assert looped[10:] == looped[:-10]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    workload = w.mixed_lengths(num_requests=20_000, hashed=True, rate=5.0, burstiness=burstiness)
    gaps = [b.arrival - a.arrival for a, b in pairwise(workload)]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(0.2, rel=0.05)
    assert statistics.pvariance(gaps) == pytest.approx(mean**2 / burstiness, rel=0.15)


def test_hashed_prompts_of_the_older_generators() -> None:
    shared = w.shared_prefix(num_requests=30, num_prefixes=2, prefix=64, tail=16, hash_block=16)
    ids = [r.prompt.hash_ids for r in shared]  # type: ignore[attr-defined]
    assert len({i[:4] for i in ids}) == 2
    assert len({i[4:] for i in ids}) == 30
    private = w.mixed_lengths(num_requests=30, hashed=True)
    assert len({r.prompt for r in private}) == 30


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("conversations", {"sessions": 0}),
        ("conversations", {"think_time": -1}),
        ("conversations", {"hash_block": 0}),
        ("conversations", {"turns": (3, 2)}),
        ("agents", {"pause": float("nan")}),
        ("rag", {"per_prompt": 100}),
        ("rag", {"order": "best"}),
        ("zipf", {"alpha": -1.0}),
        ("zipf", {"tail": 16}),
        ("scan-loop", {"scan": 1.5}),
        ("scan-loop", {"block": 0}),
        ("mixed-lengths", {"burstiness": 0.0, "rate": 1.0}),
        ("sharegpt-like", {"rate": float("inf")}),
    ],
)
def test_values_out_of_range(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(WorkloadError):
        w.load(name, **bad)


# ---- what a workload can do ----------------------------------------------------------------------------------------


def test_head_sets_free_whoever_followed_what_is_cut_off() -> None:
    workload = w.conversations(seed=2)
    moved = w.Workload("x", tuple(reversed(workload.requests)), outputs=workload.outputs)
    for n in (1, 7, len(moved)):
        cut = moved.head(n)
        ids = {r.request_id for r in cut}
        assert set(cut.outputs or ()) == ids
        for request, whole in zip(cut, moved, strict=False):
            if whole.follows is not None and whole.follows not in ids:
                assert (request.follows, request.think_time) == (None, 0.0)
            else:
                assert request == whole
            assert request.arrival == whole.arrival


def test_sessions_by_number_and_by_name() -> None:
    workload = w.conversations(seed=2)
    first = workload.requests[0].session
    assert {r.session for r in workload.sessions(1)} == {first}
    assert len({r.session for r in workload.sessions(3)}) == 3
    assert workload.sessions(10_000).requests == workload.requests
    assert {r.session for r in workload.sessions(lambda s: s.endswith("-4"))} == {"conversation-4"}
    assert len(w.mixed_lengths().sessions(2)) == 2
    bad: list[Any] = [0, -1, True, 1.5, lambda s: False]
    for which in bad:
        with pytest.raises(WorkloadError):
            workload.sessions(which)


def test_scaling_the_rate_leaves_think_times_alone_unless_told() -> None:
    workload = w.conversations(seed=2)
    twice, hurried = workload.scale_rate(2.0), workload.scale_rate(2.0, think_times=True)
    for before, a, b in zip(workload, twice, hurried, strict=True):
        assert a.arrival == b.arrival == before.arrival / 2
        assert (a.think_time, b.think_time) == (before.think_time, before.think_time / 2)


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.integers(0, 20), min_size=1, max_size=40),
    seconds=st.floats(0, 10),
    quantum=st.sampled_from([0.5, 3.0, 2.999]),
)
def test_jitter_spreads_within_the_step_and_nobody_overtakes(
    steps: list[int], seconds: float, quantum: float
) -> None:
    stamps = sorted(s * quantum for s in steps)
    given_ = w.prompts([[i + 1] for i in range(len(stamps))])
    from dataclasses import replace

    workload = w.Workload("x", tuple(replace(r, arrival=s) for r, s in zip(given_, stamps, strict=True)))
    spread = workload.jitter(seconds, seed=1)
    assert [r.request_id for r in spread] == [r.request_id for r in workload]
    assert spread == workload.jitter(seconds, seed=1)
    for before, after in zip(workload, spread, strict=True):
        assert before.arrival <= after.arrival <= before.arrival + seconds
    for a, b in pairwise(zip(workload, spread, strict=True)):
        assert a[1].arrival <= b[1].arrival
        if a[0].arrival < b[0].arrival:
            assert a[1].arrival <= b[0].arrival


def test_jitter_is_uniform() -> None:
    workload = w.mixed_lengths(num_requests=3000, hashed=True).jitter(3.0)
    arrivals = [r.arrival for r in workload]
    assert statistics.fmean(arrivals) == pytest.approx(1.5, rel=0.05)
    assert max(arrivals) < 3.0
    with pytest.raises(WorkloadError):
        workload.jitter(-1)


def test_describe_counts() -> None:
    said = w.shared_prefix(num_requests=10, num_prefixes=1, prefix=32, tail=16, output=8).describe(16)
    assert said["requests"] == 10
    assert (said["input_tokens"], said["output_tokens"]) == (480, 80)
    assert (said["blocks"], said["unique_blocks"]) == (30, 12)
    assert said["repeated_blocks"] == pytest.approx(18 / 30)
    assert said["sessions"] == 1
    assert w.chat().describe()["input_tokens"] is None
    hashed = w.shared_prefix(num_requests=10, num_prefixes=1, prefix=32, tail=16, output=8, hash_block=16)
    assert {k: hashed.describe()[k] for k in ("blocks", "unique_blocks")} == {
        "blocks": 30,
        "unique_blocks": 12,
    }
    assert w.parallel_samples(num_requests=2, n=3, output=5).describe()["output_tokens"] == 30


def test_a_tenants_blocks_are_its_own() -> None:
    from dataclasses import replace

    one = w.zipf(num_requests=50, blocks=1, tail=0)
    tenants = w.Workload("x", tuple(replace(r, salt=i % 2) for i, r in enumerate(one)))
    assert one.describe()["unique_blocks"] == 1
    assert tenants.describe()["unique_blocks"] == 2
