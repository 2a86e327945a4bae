"""Cost models: exact in integers, never cheaper for more work, fitted back from what they say; and vLLM's logs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples

import pagedlab as pl
from pagedlab.config import Config
from pagedlab.costs import (
    Calibrated,
    CostModel,
    FitReport,
    LinearCost,
    Roofline,
    StepWork,
    VllmRun,
    find_hardware,
    find_model,
    fit_steps,
)
from pagedlab.costs.catalogue import HARDWARE, MODELS
from pagedlab.costs.fitting import nnls
from pagedlab.errors import ConfigError, WorkloadError
from pagedlab.policies.layout import CSR, Padded
from pagedlab.registry import SLOTS, is_registered, list_policies, make, policy_names

# ---- what is drawn -------------------------------------------------------------------------------------------------

WORKS = st.builds(
    StepWork,
    prefill_tokens=st.integers(0, 100_000),
    prefill_pairs=st.integers(0, 10**10),
    prefill_seqs=st.integers(0, 100),
    decode_seqs=st.integers(0, 5_000),
    context_tokens=st.integers(0, 10**9),
    samples=st.integers(0, 5_000),
)


@st.composite
def rooflines(draw: st.DrawFn) -> Roofline:
    model = draw(st.sampled_from(sorted(MODELS)))
    parts = [n for n in (1, 2, 3, 4, 8) if MODELS[model].heads % n == 0]
    return Roofline(
        model=model,
        hardware=draw(st.sampled_from(sorted(HARDWARE))),
        tensor_parallel=draw(st.sampled_from(parts)),
        dtype=draw(st.sampled_from(["auto", "float32", "int4"])),
        kv_dtype=draw(st.sampled_from(["auto", "fp8"])),
        block_size=draw(st.integers(1, 512)),
        table_bytes_per_block=draw(st.floats(0, 64)),
        table_bytes_per_seq=draw(st.floats(0, 64)),
        bandwidth_efficiency=draw(st.floats(0.1, 1)),
        flops_efficiency=draw(st.floats(0.1, 1)),
        kernel_efficiency=draw(st.floats(0.1, 1)),
        overhead_factor=draw(st.floats(0, 3)),
    )


@st.composite
def calibrateds(draw: st.DrawFn) -> Calibrated:
    experts = draw(st.sampled_from([0, 0, 8, 128]))
    return Calibrated(
        **{name: draw(st.floats(0, 1e4)) for name in Calibrated.VECTOR},
        knee=draw(st.sampled_from(["max", "hypot"])),
        experts=experts,
        experts_per_token=draw(st.integers(1, experts)) if experts else 0,
        expert_share=draw(st.floats(0, 1)),
        host_gb_per_s=draw(st.floats(1, 100)),
        host_latency_us=draw(st.floats(0, 100)),
    )


MODELS_OF_COST = st.one_of(rooflines(), calibrateds())


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the contract --------------------------------------------------------------------------------------------------


@given(model=MODELS_OF_COST, work=WORKS, contexts=st.lists(st.integers(0, 10**9), min_size=1, max_size=4))
def test_steps_are_linear_in_their_contexts_exactly(
    model: CostModel, work: StepWork, contexts: list[int]
) -> None:
    line = model.linear(work)
    assert line is not None
    fixed, slope = line
    assert (type(fixed), type(slope)) == (int, int)
    assert fixed >= 1
    assert slope >= 0
    for context in contexts:
        here = replace(work, context_tokens=context)
        assert model.linear(here) == line
        assert type(model.step_ps(here)) is int
        assert model.step_ps(here) == fixed + slope * context


@given(
    model=MODELS_OF_COST, decoding=st.integers(1, 3000), context=st.integers(0, 10**7), n=st.integers(1, 60)
)
def test_a_leap_takes_as_long_as_its_steps(model: CostModel, decoding: int, context: int, n: int) -> None:
    work = StepWork(decode_seqs=decoding, context_tokens=context, samples=decoding)
    line = model.linear(work)
    assert line is not None
    fixed, slope = line
    walked = 0
    for _ in range(n):
        walked += model.step_ps(work)
        work = replace(work, context_tokens=work.context_tokens + decoding)
    assert walked == n * fixed + slope * (n * context + decoding * n * (n - 1) // 2)


@given(model=MODELS_OF_COST, work=WORKS, data=st.data())
def test_more_work_is_never_cheaper(model: CostModel, work: StepWork, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([f.name for f in fields(StepWork)]))
    more = replace(work, **{name: getattr(work, name) + data.draw(st.integers(1, 1000))})
    assert model.step_ps(more) >= model.step_ps(work) >= 1


def test_a_free_step_still_takes_time() -> None:
    free = Calibrated(**dict.fromkeys(Calibrated.VECTOR, 0.0))
    for work in (StepWork(), StepWork(decode_seqs=3, context_tokens=99, samples=3)):
        assert free.step_ps(work) == 1


@given(model=MODELS_OF_COST, work=WORKS)
def test_copies_of_every_kind_cost_the_same(model: LinearCost, work: StepWork) -> None:
    for other in (
        model.clone(),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        make("cost", model.name, **json.loads(json.dumps(model.get_params()))),
    ):
        assert other == model
        assert isinstance(other, CostModel)
        assert other.step_ps(work) == model.step_ps(work)
        assert other.transfer_ps(10**9, "host") == model.transfer_ps(10**9, "host")


def test_a_parameter_that_is_set_counts_at_once() -> None:
    model, work = Calibrated(), StepWork(decode_seqs=4, context_tokens=1000, samples=4)
    before = model.step_ps(work)
    model.c3 = 0.0
    assert model.step_ps(work) == before - 1000 * 100_000


def test_cost_models_are_listed_and_made_by_name_but_no_config_holds_one() -> None:
    assert {"calibrated", "roofline"} <= set(policy_names("cost"))
    assert "cost" not in SLOTS
    assert not any(row["slot"] == "cost" for row in list_policies())
    rows = list_policies("cost")
    for row in rows:
        assert row["slot"] == "cost"
        assert row["summary"]
        assert all(parameter["help"] for parameter in row["params"])
        model = make("cost", row["name"])
        assert isinstance(model, CostModel)
        assert is_registered(model)
    assert pl.make("cost", "roofline", model="qwen3-8b", hardware="L4") == Roofline(
        model="qwen3-8b", hardware="L4"
    )
    with pytest.raises(ConfigError, match="did you mean 'roofline'"):
        make("cost", "rooflin")
    with pytest.raises(ConfigError, match="did you mean 'cost'"):
        make("costs", "roofline")
    with pytest.raises(ConfigError, match="no field 'cost'"):
        Config().replace(cost="roofline")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"model": "lama-3.1-8b"}, "did you mean 'llama-3.1-8b'"),
        ({"hardware": "h10"}, "hardware"),
        ({"tensor_parallel": 3}, "3 accelerators"),
        ({"flops_efficiency": 1.2}, "flops_efficiency"),
        ({"dtype": "float17"}, "did you mean 'float16'"),
        ({"modle": "tiny"}, "did you mean 'model'"),
    ],
)
def test_a_roofline_that_cannot_be_is_refused_when_it_is_made(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make("cost", "roofline", **params)
    assert words in one_line(caught)


def test_transfers_take_latency_and_bandwidth() -> None:
    one, two = Roofline(model="qwen3-32b"), Roofline(model="qwen3-32b", tensor_parallel=2)
    assert one.transfer_ps(0, "host") == 0
    latency = round(find_hardware("h100").host_latency_s * 1e12)
    moved = one.transfer_ps(10**9, "host") - latency
    assert moved == pytest.approx(1e12 * 1e9 / (64e9 * 0.8))
    assert two.transfer_ps(10**9, "host") - latency == pytest.approx(moved / 2), "each has its own link"
    assert (
        Calibrated(host_gb_per_s=10.0, host_latency_us=5.0).transfer_ps(10**10, "host") == 10**12 + 5 * 10**6
    )
    with pytest.raises(ConfigError, match="known: host, disk-read, disk-write; did you mean 'host'"):
        one.transfer_ps(1, "hots")


# ---- the roofline --------------------------------------------------------------------------------------------------


def test_the_roofline_is_of_the_order_of_measured_cards() -> None:
    """Within 2.5 times of what vLLM 0.19 took on RTX PRO 6000 (Llama-3.1-8B on one card, Qwen3-32B on two)."""
    llama = Calibrated.prior("meta-llama/Llama-3.1-8B", "rtx-pro-6000")
    qwen = Calibrated.prior("Qwen/Qwen3-32B", "rtx-pro-6000", 2)
    pairs = [
        (llama.c0 + llama.w, 12.3),
        (llama.c1, 32.8),
        (llama.c3, 82),
        (llama.c6, 10.9),
        (qwen.c4, 4.1),
        (qwen.c1 + qwen.c2, 149),
    ]
    assert llama.c2 == 0
    for said, measured in pairs:
        assert 1 / 2.5 < said / measured < 2.5


def test_each_term_follows_its_resource() -> None:
    base = Roofline(model="llama-3.1-8b", overhead_factor=0.0)
    decode = StepWork(decode_seqs=1, context_tokens=1000, samples=1)
    shape, card = find_model("llama-3.1-8b"), find_hardware("h100")
    read = (
        shape.weight_bytes - shape.vocab * shape.hidden * 2
    )  # all but the input embedding, which is looked up
    assert base.linear(decode)[0] == pytest.approx(1e12 * read / (card.bandwidth * 0.8), rel=1e-3)
    assert base.linear(decode)[1] == pytest.approx(1e12 * 131072 / (card.bandwidth * 0.8), rel=1e-3)
    prefill = StepWork(prefill_tokens=8192, prefill_seqs=1, samples=1)
    assert base.step_ps(prefill) == pytest.approx(
        1e12 * 8192 * shape.flops_per_token / (card.flops * 0.6), rel=0.02
    )
    pairs = StepWork(prefill_tokens=8192, prefill_pairs=8192 * 8193 // 2, prefill_seqs=1, samples=1)
    assert base.step_ps(pairs) - base.step_ps(prefill) == pytest.approx(
        1e12 * pairs.prefill_pairs * 4 * 32 * 4096 / (card.flops * 0.5), rel=1e-6
    )
    assert base.clone(hardware="h200").linear(decode)[0] < base.linear(decode)[0]
    assert base.clone(dtype="fp8").linear(decode)[0] == pytest.approx(base.linear(decode)[0] / 2, rel=1e-6)
    assert base.clone(kv_dtype="fp8").linear(decode)[1] == pytest.approx(base.linear(decode)[1] / 2, rel=1e-3)
    slower = base.clone(step_overhead_us=500.0)
    assert slower.step_ps(decode) - base.step_ps(decode) == 500 * 10**6


def test_layout_and_kernel_enter_the_slope() -> None:
    base = Roofline()
    slope = base.linear(StepWork())[1]
    assert base.clone(kernel_efficiency=0.5).linear(StepWork())[1] == pytest.approx(2 * slope, rel=1e-4)
    small, large = (base.clone(block_size=size).linear(StepWork())[1] for size in (1, 256))
    assert small > large, "smaller blocks have longer tables"
    padded, csr = base.with_layout(Padded()), base.with_layout(CSR())
    assert (padded.table_bytes_per_block, padded.table_bytes_per_seq) == (4.0, 0.0)
    assert (csr.table_bytes_per_block, csr.table_bytes_per_seq) == (4.0, 4.0)
    work = StepWork(decode_seqs=100, context_tokens=10**5, samples=100)
    assert csr.step_ps(work) > padded.step_ps(work)


def test_tensor_parallelism_halves_the_reading_and_adds_all_reduces() -> None:
    one, two = (
        Roofline(model="qwen3-32b", hardware="rtx-pro-6000", tensor_parallel=n).terms() for n in (1, 2)
    )
    assert two.weights == pytest.approx(one.weights / 2)
    assert two.token == pytest.approx(one.token / 2)
    assert two.context == pytest.approx(one.context / 2, rel=0.01)
    assert one.link == 0
    # 64 layers, 2 all-reduces, 5,120 two-byte numbers, over 16 GB/s
    assert two.link == pytest.approx(1e12 * 64 * 2 * 5120 * 2 / 16e9)
    nvlink = Roofline(model="qwen3-32b", hardware="h100", tensor_parallel=2).terms()
    assert nvlink.link < two.link / 10


def test_a_mixture_reads_the_experts_that_its_tokens_reach() -> None:
    mixture = Roofline(model="qwen3-30b-a3b", overhead_factor=0.0)
    shape = find_model("qwen3-30b-a3b")
    read = [mixture.linear(StepWork(decode_seqs=n))[0] for n in (1, 8, 64, 512)]
    byte = 1e12 / (find_hardware("h100").bandwidth * 0.8)
    for n, ps in zip((1, 8, 64, 512), read):
        assert ps == pytest.approx(
            (shape.common_bytes + shape.coverage(n) * shape.expert_bytes) * byte, rel=1e-6
        )
    assert read[0] < read[-1] / 8


# ---- calibrated ----------------------------------------------------------------------------------------------------


@given(model=calibrateds())
def test_calibrated_models_are_json_and_vectors(model: Calibrated) -> None:
    assert Calibrated.from_json(model.to_json()) == model
    back = Calibrated.from_vector(model.to_vector(), like=model)
    for name in Calibrated.VECTOR:
        value = getattr(model, name)
        assert getattr(back, name) == pytest.approx(value if value > Calibrated.FLOOR else 0.0, rel=1e-9)
    assert back.get_params().keys() == model.get_params().keys()
    assert (back.knee, back.experts, back.expert_share) == (model.knee, model.experts, model.expert_share)
    for (low, high), x, name in zip(model.bounds(), model.to_vector(), Calibrated.VECTOR):
        assert low <= x <= high
        assert (low == high) == (getattr(model, name) <= Calibrated.FLOOR)


@pytest.mark.parametrize(
    "text",
    ["", "3", "{}", '{"cost": "roofline", "params": {}}', '{"cost": "calibrated", "params": {"c9": 1}}'],
)
def test_what_is_no_calibrated_model_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Calibrated.from_json(text)
    assert one_line(caught)


def test_vectors_and_experts_are_checked() -> None:
    with pytest.raises(ConfigError, match="8 numbers, not 2"):
        Calibrated.from_vector([1.0, 2.0])
    with pytest.raises(ConfigError, match="allowed: 1 to 8"):
        Calibrated(experts=8)
    with pytest.raises(ConfigError, match="factor"):
        Calibrated().bounds(1.0)


def test_a_calibrated_model_says_its_units() -> None:
    text = repr(Calibrated(c0=2.9, c3=82.0, c2=0.0, experts=128, experts_per_token=8, expert_share=0.9))
    assert "c0=2.9 ms" in text
    assert "c3=82 ns" in text
    assert "c2" not in text
    assert "experts=8/128" in text


@given(model=calibrateds(), name=st.sampled_from(sorted(MODELS)), card=st.sampled_from(sorted(HARDWARE)))
def test_scaling_to_the_same_place_changes_nothing(model: Calibrated, name: str, card: str) -> None:
    moved = model.scaled(name, card, from_model=name, from_hardware=card)
    for coefficient in Calibrated.VECTOR:
        value = getattr(model, coefficient)
        if value:
            assert getattr(moved, coefficient) == value
    assert (moved.experts, moved.expert_share, moved.knee) == (model.experts, model.expert_share, model.knee)
    assert moved.host_gb_per_s == model.host_gb_per_s


@given(
    names=st.tuples(st.sampled_from(sorted(MODELS)), st.sampled_from(sorted(MODELS))),
    cards=st.tuples(st.sampled_from(sorted(HARDWARE)), st.sampled_from(sorted(HARDWARE))),
)
def test_a_roofline_scales_to_the_other_roofline(names: tuple[str, str], cards: tuple[str, str]) -> None:
    old, new = (Calibrated.prior(name, card) for name, card in zip(names, cards))
    moved = old.scaled(names[1], cards[1], from_model=names[0], from_hardware=cards[0])
    assert moved.to_vector() == pytest.approx(new.to_vector(), abs=1e-9)
    assert (moved.experts, moved.expert_share) == (new.experts, new.expert_share)


def test_scaling_goes_by_bytes_flops_layers_and_links() -> None:
    here = {"from_model": "llama-3.1-8b", "from_hardware": "rtx-pro-6000"}
    measured = Calibrated()
    moved = measured.scaled("qwen3-32b", "rtx-pro-6000", to_tp=2, **here)  # type: ignore[arg-type]
    assert moved.c6 == pytest.approx(measured.c6 * 64 / 32)
    assert moved.c2 == pytest.approx(81.92)
    assert moved.c3 == pytest.approx(measured.c3, rel=0.01), "twice the bytes over two cards"
    ratio = find_model("qwen3-32b").flops_per_token / find_model("llama-3.1-8b").flops_per_token
    assert moved.c1 == pytest.approx(measured.c1 * ratio / 2)
    faster = measured.scaled("llama-3.1-8b", "h100", **here)  # type: ignore[arg-type]
    assert faster.w == pytest.approx(measured.w * 1.792 / 3.35)
    assert faster.c0 == pytest.approx(measured.c0), "the host stays"
    slope = measured.scaled("llama-3.1-8b", "h100", compute_ratio=1.5, bandwidth_ratio=2.0, **here)  # type: ignore[arg-type]
    assert slope.c1 == pytest.approx(measured.c1 / 1.5)
    assert slope.c3 == pytest.approx(measured.c3 / 2.0, rel=1e-4), "slopes are whole picoseconds"
    with pytest.raises(ConfigError, match="ratio"):
        measured.scaled("llama-3.1-8b", "h100", compute_ratio=0.0, **here)  # type: ignore[arg-type]


def test_the_prior_follows_its_roofline() -> None:
    roofline = Roofline(model="qwen3-32b", hardware="rtx-pro-6000", tensor_parallel=2)
    form = Calibrated.from_roofline(roofline)
    for decoding in (8, 32, 64):
        work = StepWork(decode_seqs=decoding, context_tokens=2000 * decoding, samples=decoding)
        assert form.step_ps(work) == pytest.approx(roofline.step_ps(work), rel=0.01)
    assert form.linear(StepWork())[1] == roofline.linear(StepWork())[1]


# ---- fits ----------------------------------------------------------------------------------------------------------

TRUTH = Calibrated(c0=3.0, w=9.0, c1=35.0, c3=80.0, c4=3.0, c5=20.0, c6=11.0)


def steps(rng: random.Random, n: int) -> list[StepWork]:
    """Steps as a chunked-prefill engine makes them: some with prompts, lengths that do not follow from D."""
    works = []
    for _ in range(n):
        chunk = rng.choice([0, 0, rng.randint(1, 2048)])
        decoding = rng.randint(0 if chunk else 1, 128)
        before = rng.randint(0, 1500)
        works.append(
            StepWork(
                prefill_tokens=chunk,
                prefill_pairs=chunk * before + chunk * (chunk + 1) // 2,
                prefill_seqs=int(chunk > 0),
                decode_seqs=decoding,
                context_tokens=decoding * rng.randint(200, 4000),
                samples=decoding + int(chunk > 0),
            )
        )
    return works


@pytest.mark.parametrize("knee", ["max", "hypot"])
@pytest.mark.parametrize("mixture", [False, True])
def test_exact_steps_give_their_coefficients_back(knee: str, mixture: bool) -> None:
    rng = random.Random(1)
    more: dict[str, Any] = {"experts": 128, "experts_per_token": 8, "expert_share": 0.9} if mixture else {}
    truth = TRUTH.clone(knee=knee, **more)
    works = steps(rng, 400)
    # What is not fitted comes from the prior, whose coefficients here are far off and hardly trusted.
    vague = {"prior": truth.clone(c0=9.0, w=4.0, c1=90.0, c4=9.0), "prior_sigma": 5.0} if mixture else {}
    found = fit_steps(works, [truth.step_ps(work) for work in works], knee=knee, **vague)
    for name in Calibrated.VECTOR:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.01), name
    assert (found.experts, found.expert_share, found.knee) == (truth.experts, truth.expert_share, knee)


@settings(max_examples=examples(0.25))
@given(seed=st.integers(0, 10**6))
def test_noisy_steps_give_nearly_their_coefficients_back(seed: int) -> None:
    """1% noise, and one step in thirty disturbed by half."""
    rng = random.Random(seed)
    truth = TRUTH.clone(**{name: getattr(TRUTH, name) * rng.uniform(0.5, 2) for name in Calibrated.VECTOR})
    works = steps(rng, 600)
    durations = [
        max(1, round(truth.step_ps(work) * rng.gauss(1, 0.01) * (1.5 if rng.random() < 1 / 30 else 1)))
        for work in works
    ]
    found = fit_steps(works, durations)
    for name, tolerance in (("c1", 0.05), ("c3", 0.05), ("c6", 0.1)):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=tolerance), name
    assert found.c0 + found.w == pytest.approx(truth.c0 + truth.w, rel=0.05)
    unseen = steps(rng, 200)
    report = FitReport.of(found, unseen, [truth.step_ps(work) for work in unseen])
    assert report.mean_abs_error < 0.01
    assert report.r2 > 0.99


def test_a_prior_settles_what_the_steps_leave_open_and_yields_to_many() -> None:
    rng = random.Random(3)
    prior = TRUTH.clone(c0=2.0, w=10.0, c4=2.0, c6=8.0)
    # A decode-only run below the knee: c0 and w are one constant, c1, c4 and c6 do not show.
    works = [
        StepWork(decode_seqs=d, context_tokens=d * rng.randint(200, 4000), samples=d)
        for d in (rng.randint(1, 64) for _ in range(50))
    ]
    found = fit_steps(works, [TRUTH.step_ps(work) for work in works], prior=prior)
    assert found.c0 + found.w == pytest.approx(12.0, rel=0.01)
    assert found.w / found.c0 == pytest.approx(5.0, rel=0.1), "in the prior's proportion"
    for name in ("c1", "c4", "c6"):
        assert getattr(found, name) == pytest.approx(getattr(prior, name), rel=0.05), name
    assert found.c3 == pytest.approx(80.0, rel=0.01)
    many = steps(rng, 2000)
    durations = [max(1, round(TRUTH.step_ps(work) * rng.gauss(1, 0.01))) for work in many]
    told = fit_steps(many, durations, prior=prior)
    assert told.c6 == pytest.approx(11.0, rel=0.03)
    assert told.c0 + told.w == pytest.approx(12.0, rel=0.01)


def test_all_reduces_are_fitted_only_where_the_prior_has_some() -> None:
    rng = random.Random(4)
    works = steps(rng, 400)
    truth = TRUTH.clone(c2=50.0)
    durations = [truth.step_ps(work) for work in works]
    assert fit_steps(works, durations).c2 == 0
    assert fit_steps(works, durations, prior=truth.clone(c2=30.0)).c2 > 0


@pytest.mark.parametrize(
    ("works", "durations", "more", "words"),
    [
        ([], [], {}, "no steps"),
        ([StepWork()], [], {}, "1 steps have 0 durations"),
        ([StepWork(), StepWork()], [5, 0], {}, "step 1"),
        ([StepWork()], [5], {"knee": "soft"}, "knee"),
        ([StepWork()], [5], {"prior_sigma": 0.0}, "prior_sigma"),
    ],
)
def test_fits_that_cannot_be_are_refused(
    works: list[StepWork], durations: list[int], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        fit_steps(works, durations, **more)


def test_one_step_can_be_fitted() -> None:
    work = StepWork(decode_seqs=4, context_tokens=1000, samples=4)
    for prior in (None, TRUTH):
        found = fit_steps([work], [10**10], prior=prior)
        assert found.step_ps(work) == pytest.approx(10**10, rel=0.01)


def test_a_report_says_how_far_off_a_model_is() -> None:
    works = steps(random.Random(5), 100)
    exact = [TRUTH.step_ps(work) for work in works]
    perfect = FitReport.of(TRUTH, works, exact)
    assert (perfect.n, perfect.r2, perfect.mean_error, perfect.worst) == (100, 1.0, 0.0, 0.0)
    slow = FitReport.of(TRUTH, works, [round(ps / 1.1) for ps in exact])
    assert slow.mean_error == pytest.approx(0.1)
    assert slow.p50 == pytest.approx(slow.worst) == pytest.approx(0.1)
    assert FitReport.from_json(slow.to_json()) == slow
    assert "+10.00%" in repr(slow)
    alone = FitReport.of(TRUTH, works[:1], exact[:1])
    assert alone.r2 != alone.r2
    assert repr(FitReport.from_json(alone.to_json())) == repr(alone)
    for text in ("", "[]", '{"n": 1}', slow.to_json().replace("100", '"many"')):
        with pytest.raises(ConfigError, match="not a fit report"):
            FitReport.from_json(text)


@given(data=st.data())
def test_non_negative_least_squares_meets_its_conditions(data: st.DataObject) -> None:
    """Karush, Kuhn and Tucker: no slope where x is positive, none that would lead down where it is zero."""
    import numpy as np

    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 7))
    matrix = rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-3, 4, size=columns)
    if columns > 1 and data.draw(st.booleans()):
        matrix[:, 0] = matrix[:, 1]
    target = rng.normal(size=rows)
    x = nnls(matrix.T @ matrix, matrix.T @ target)
    assert (x >= 0).all()
    scale = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    slope = matrix.T @ (matrix @ x - target) / scale
    assert (slope >= -1e-6).all()
    assert np.abs(slope[x > 0]).max(initial=0.0) < 1e-6


# ---- logs of vLLM --------------------------------------------------------------------------------------------------

META = {
    "model": "Qwen/Qwen3-32B",
    "vllm_version": "0.19.0",
    "engine_kwargs": {"tensor_parallel_size": 2, "max_num_seqs": 128},
    "started_at": "2026-04-25T18:47:18Z",
}
STARTED = 1777142838.0


def rows(n: int = 6, *, clock: float = -1.7e9) -> list[dict[str, Any]]:
    """Requests a second apart; the second is queued fastest, after 1 ms."""
    out = []
    for i in range(n):
        arrival = STARTED + 1.0 + i
        queued = arrival + clock + (0.001 if i == 1 else 0.002 + 0.001 * i)
        out.append(
            {
                "request_id": f"r{i}",
                "input_toks": 100 + i,
                "output_toks": 11,
                "arrival_time": arrival,
                "queued_ts": queued,
                "scheduled_ts": queued + 0.1,
                "first_token_ts": queued + 0.5,
                "last_token_ts": queued + 1.5,
            }
        )
    return out


def folder(path: Path, requests: list[dict[str, Any]], **meta: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "meta.json").write_text(json.dumps({**META, **meta}))
    (path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in requests))
    ticks = "".join(f"{t}.0,10.0,{5 * t}.0,{t},0,0.0\n" for t in range(1, 9))
    (path / "timeseries.csv").write_text(
        "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct\n" + ticks
    )
    return path


def test_the_clocks_are_brought_together_by_the_quickest_request(tmp_path: Path) -> None:
    run = VllmRun.load(folder(tmp_path / "run", rows()))
    assert [r.request_id for r in run.requests] == [f"r{i}" for i in range(6)]
    assert run.alignment.offset == pytest.approx(-1.7e9 + 0.001, abs=1e-5)
    assert run.alignment.spread == pytest.approx(0.001, abs=1e-5)
    assert run.alignment.drift == pytest.approx(0.004, abs=1e-5)
    first, second = run.requests[:2]
    assert first.arrival == 1.0
    assert second.queued == pytest.approx(second.arrival, abs=1e-6)
    assert first.queued == pytest.approx(1.001, abs=1e-5)
    assert first.ttft == pytest.approx(0.501, abs=1e-5)
    assert first.tpot == pytest.approx(0.1, abs=1e-5)
    assert first.latency == pytest.approx(1.501, abs=1e-5)
    assert all(r.arrival <= r.queued + 1e-6 for r in run.requests)
    assert run.tensor_parallel == 2
    assert run.ticks[2].running == 3
    assert "6 requests" in repr(run)
    other = VllmRun.load(folder(tmp_path / "other", rows(clock=1e6)))
    assert [r.ttft for r in other.requests] == pytest.approx([r.ttft for r in run.requests], abs=1e-5)


def test_requests_come_in_order_of_arrival_and_may_lack_a_start_and_a_series(tmp_path: Path) -> None:
    path = folder(tmp_path, rows()[::-1], started_at=None)
    (path / "timeseries.csv").unlink()
    run = VllmRun.load(path)
    assert [r.request_id for r in run.requests] == [f"r{i}" for i in range(6)]
    assert run.requests[0].arrival == 0.0
    assert run.ticks == ()


@pytest.mark.parametrize("n", [1, 3, 6])
def test_what_comes_after_cannot_be_reached(tmp_path: Path, n: int) -> None:
    """Also not in how the clocks are aligned: two logs that differ only later give the same bytes."""
    one, two = rows(), rows()
    for later in two[n:]:
        later["queued_ts"] -= 0.5  # a quicker one, which would change the alignment of the whole run
        later["first_token_ts"] += 3.0
        later["last_token_ts"] += 5.0
    whole = VllmRun.load(folder(tmp_path / "one", one))
    seen = whole.before(n)
    assert seen == VllmRun.load(folder(tmp_path / "two", two)).before(n)
    assert pickle.dumps(seen) == pickle.dumps(VllmRun.load(folder(tmp_path / "two", two)).before(n))
    assert [r.request_id for r in seen.requests] == [f"r{i}" for i in range(n)]
    assert all(tick.t <= seen.requests[-1].arrival for tick in seen.ticks)
    assert len(seen.ticks) == n
    kept = folder(tmp_path / "kept", one[:n])
    lines = (kept / "timeseries.csv").read_text().splitlines()
    (kept / "timeseries.csv").write_text("\n".join(lines[: n + 1]) + "\n")
    assert seen == VllmRun.load(kept)
    seen.settings["max_num_seqs"] = 1
    assert whole.settings["max_num_seqs"] == 128
    if n < 6:
        assert f"r{n}".encode() not in pickle.dumps(seen)
        with pytest.raises(WorkloadError, match=f"from 1 to {n}"):
            seen.before(n + 1)


@pytest.mark.parametrize("n", [0, 7, -1, True, 2.0])
def test_before_takes_a_number_of_requests(tmp_path: Path, n: Any) -> None:
    with pytest.raises(WorkloadError, match="from 1 to 6"):
        VllmRun.load(folder(tmp_path, rows())).before(n)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "JSON object"),
        ({"queued_ts": None}, "queued_ts"),
        ({"queued_ts": float("nan")}, "queued_ts"),
        ({"first_token_ts": "soon"}, "first_token_ts"),
        ({"last_token_ts": 0.0}, "last_token_ts 0.0 is before first_token_ts"),
        ({"input_toks": 0}, "input_toks"),
        ({"output_toks": 1.5}, "output_toks"),
        ({"output_toks": True}, "output_toks"),
        ({"request_id": "r0"}, "also on line 1"),
    ],
)
def test_a_bad_request_is_named_by_file_and_line(tmp_path: Path, line: Any, words: str) -> None:
    path = folder(tmp_path, rows())
    lines = (path / "requests.jsonl").read_text().splitlines()
    lines[2] = line if isinstance(line, str) else json.dumps({**json.loads(lines[2]), **line})
    (path / "requests.jsonl").write_text("\n".join(lines))
    with pytest.raises(WorkloadError) as caught:
        VllmRun.load(path)
    text = one_line(caught)
    assert text.startswith(f"{path / 'requests.jsonl'}:3: ")
    assert words in text


@pytest.mark.parametrize("key", ["request_id", "arrival_time", "output_toks"])
def test_a_field_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    bad = rows()
    del bad[1][key]
    with pytest.raises(WorkloadError, match=f"requests.jsonl:2: no {key}"):
        VllmRun.load(folder(tmp_path, bad))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "timeseries.csv:1: no column t"),
        ("t,running\n", "timeseries.csv:1: no column prompt_throughput"),
        ("HEADER\n1,2,3,4,5,6\n2,2,3\n", "timeseries.csv:3: 3 fields"),
        ("HEADER\n1,2,x,4,5,6\n", "timeseries.csv:2: gen_throughput must be a number, not 'x'"),
        ("HEADER\n1,2,inf,4,5,6\n", "timeseries.csv:2: gen_throughput"),
        ("HEADER\n1,2,3,4.5,5,6\n", "timeseries.csv:2: running must be a whole number"),
        ("HEADER\n2,2,3,4,5,6\n2,2,3,4,5,6\n", "timeseries.csv:3: t 2.0 does not come after"),
    ],
)
def test_a_bad_row_of_the_series_is_named_by_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    path = folder(tmp_path, rows())
    header = "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct"
    (path / "timeseries.csv").write_text(text.replace("HEADER", header))
    with pytest.raises(WorkloadError) as caught:
        VllmRun.load(path)
    assert words in one_line(caught)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ("{", "not JSON"),
        ("[]", "one JSON object"),
        ({"model": 3}, "model"),
        ({"engine_kwargs": []}, "engine_kwargs"),
        ({"started_at": "yesterday"}, "started_at"),
        ({"num_requests": "all"}, "num_requests"),
        ({"num_requests": 7}, "6 requests, but meta.json says 7"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, meta: Any, words: str) -> None:
    path = folder(tmp_path, rows())
    (path / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps({**META, **meta}))
    with pytest.raises(WorkloadError, match=words) as caught:
        VllmRun.load(path)
    assert "meta.json" in one_line(caught)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no folder of a vLLM run"):
        VllmRun.load(tmp_path / "nowhere")
    with pytest.raises(WorkloadError, match=r"meta\.json: cannot be read"):
        VllmRun.load(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(META))
    (tmp_path / "requests.jsonl").write_text("\n")
    with pytest.raises(WorkloadError, match="no requests"):
        VllmRun.load(tmp_path)


@pytest.fixture(scope="module")
def vllm_runs() -> Path:
    named = os.environ.get("PAGEDLAB_DATA") or str(Path(__file__).resolve().parents[2] / "shared" / "data")
    path = Path(named) / "vllm_runs"
    if not path.is_dir():
        pytest.skip("no vllm_runs in the folder of real traces: set PAGEDLAB_DATA")
    return path


@pytest.mark.parametrize(
    ("name", "model", "tp", "tokens", "ticks", "ttft", "tpot", "latency"),
    [
        (
            "rtxpro6000-llama-3.1-8b",
            "meta-llama/Llama-3.1-8B",
            1,
            (257_239, 195_753),
            67,
            7.0972,
            0.0325,
            28.2007,
        ),
        ("rtxpro6000-qwen3-32b", "Qwen/Qwen3-32B", 2, (258_691, 199_486), 160, 36.9052, 0.0803, 90.4081),
    ],
)
def test_real_runs_are_read(
    vllm_runs: Path,
    name: str,
    model: str,
    tp: int,
    tokens: tuple[int, int],
    ticks: int,
    ttft: float,
    tpot: float,
    latency: float,
) -> None:
    run = VllmRun.load(vllm_runs / name)
    assert (run.model, run.vllm_version, run.tensor_parallel) == (model, "0.19.0", tp)
    assert (run.settings["max_num_seqs"], run.settings["max_num_batched_tokens"]) == (128, 2048)
    requests = run.requests
    assert len(requests) == 300
    assert (sum(r.input_tokens for r in requests), sum(r.output_tokens for r in requests)) == tokens
    # The time series counts the same tokens, second by second.
    assert len(run.ticks) == ticks
    assert (sum(t.prompt_throughput for t in run.ticks), sum(t.gen_throughput for t in run.ticks)) == tokens
    # Its sequences at work are those of the requests' stamps: so it is on the run's clock.
    off = [abs(sum(r.scheduled <= t.t < r.last_token for r in requests) - t.running) for t in run.ticks]
    assert sum(off) / len(off) < 0.5
    # Means as published with the runs; those count from `queued`, and so miss what passed before it.

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    assert mean([r.first_token - r.queued for r in requests]) == pytest.approx(ttft, abs=1e-4)
    assert mean([r.tpot for r in requests]) == pytest.approx(tpot, abs=1e-4)
    assert mean([r.last_token - r.queued for r in requests]) == pytest.approx(latency, abs=1e-4)
    assert mean([r.ttft for r in requests]) > ttft
    # The minimum is sharp, and the clocks do not drift.
    assert 0 < run.alignment.spread < 1e-3
    assert abs(run.alignment.drift) < 1e-3
    assert all(r.arrival <= r.queued <= r.scheduled < r.first_token < r.last_token for r in requests)
    assert find_model(run.model).name in ("llama-3.1-8b", "qwen3-32b")
