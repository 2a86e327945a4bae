"""Workloads are functions of their seeds, and share the prefixes that they promise to share."""

from __future__ import annotations

from itertools import pairwise

import pytest

import pagedlab as pl
from pagedlab.errors import WorkloadError

NAMES = [row["name"] for row in pl.workloads.list_workloads()]


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_requests(name: str) -> None:
    assert pl.workloads.load(name, seed=3) == pl.workloads.load(name, seed=3)
    assert pl.workloads.load(name, seed=3) != pl.workloads.load(name, seed=4)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_unique_and_prompts_are_not_empty(name: str) -> None:
    workload = pl.workloads.load(name)
    assert len({r.request_id for r in workload}) == len(workload) > 0
    assert all(r.text or len(r.prompt) for r in workload)


def test_a_turn_repeats_the_conversation_before_it() -> None:
    by_session: dict[str | None, list[str]] = {}
    for request in pl.workloads.chat(seed=1, conversations=3, turns=4):
        assert request.text is not None
        by_session.setdefault(request.session, []).append(request.text)
    assert len(by_session) == 3
    for turns in by_session.values():
        assert len(turns) == 4
        for earlier, later in pairwise(turns):
            assert later.startswith(earlier)


def test_turns_come_in_order_of_arrival() -> None:
    arrivals = [r.arrival for r in pl.workloads.chat(seed=0)]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] > 0


def test_shared_prefixes_are_shared_and_tails_are_not() -> None:
    workload = pl.workloads.shared_prefix(num_requests=30, num_prefixes=2, prefix=64, tail=16)
    assert len({tuple(r.prompt[:64]) for r in workload}) == 2
    assert len({tuple(r.prompt[64:]) for r in workload}) == 30


def test_fixed_outputs_are_announced() -> None:
    for request in pl.workloads.mixed_lengths(num_requests=10, output=(3, 9)):
        assert 3 <= request.sampling.max_tokens <= 9
        assert request.hints.output_len == request.sampling.max_tokens
        assert request.sampling.ignore_eos


def test_rate_changes_arrivals_and_nothing_else() -> None:
    slow, fast = (pl.workloads.mixed_lengths(seed=5, num_requests=20, rate=r) for r in (1.0, 10.0))
    assert [r.prompt for r in slow] == [r.prompt for r in fast]
    assert slow.requests[-1].arrival == pytest.approx(10 * fast.requests[-1].arrival)
    assert slow.scale_rate(10).requests[-1].arrival == pytest.approx(fast.requests[-1].arrival)


def test_head() -> None:
    assert [r.request_id for r in pl.workloads.mixed_lengths().head(2)] == ["mixed-0", "mixed-1"]
    with pytest.raises(WorkloadError):
        pl.workloads.mixed_lengths().head(0)


def test_unknown_names_answer_with_the_nearest() -> None:
    with pytest.raises(WorkloadError, match="did you mean 'mixed-lengths'"):
        pl.workloads.load("mixed-length")
    with pytest.raises(WorkloadError, match="did you mean 'num_requests'"):
        pl.workloads.load("mixed-lengths", num_request=3)


@pytest.mark.parametrize("bad", [{"num_requests": 0}, {"prompt": (5, 2)}, {"output": 0}, {"rate": -1.0}])
def test_values_out_of_range(bad: dict[str, object]) -> None:
    with pytest.raises(WorkloadError):
        pl.workloads.mixed_lengths(**bad)  # type: ignore[arg-type]


def test_prompts_take_texts_and_ids_and_nothing_else() -> None:
    import numpy as np

    workload = pl.workloads.prompts(["a text", [1, 2], np.array([3, 4])])  # type: ignore[list-item]
    assert [r.text for r in workload] == ["a text", None, None]
    assert list(workload.requests[2].prompt) == [3, 4]
    for bad in ("one text", [1.5], [None], [["a"]], [{"prompt": "x"}]):
        with pytest.raises(WorkloadError):
            pl.workloads.prompts(bad)  # type: ignore[arg-type]
