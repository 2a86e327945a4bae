"""Sampling: the same draw wherever a request runs, transformers' own rules, and NaN that harms nobody else."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pagedlab.engine.orders import SequenceStep
from pagedlab.engine.request import SamplingParams
from pagedlab.executors.sampling import draw_seed, greedy, processors, sample


def step(params=None, *, samples=1, index=0, history=(1, 2, 3)):
    history = list(history)
    return SequenceStep(
        seq_id=0,
        tokens=history[-1:],
        start=len(history) - 1,
        table=[0],
        table_version=0,
        num_samples=samples,
        sample_index=index,
        sampling=params or SamplingParams(),
        history=history,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab", [5, 1024, 2048, 4999])
def test_greedy_is_argmax_also_with_ties_and_nan(vocab, dtype):
    torch.manual_seed(vocab)
    # Few distinct values: most rows have ties, within a chunk and across chunks.
    logits = torch.randint(0, 6, (64, vocab)).to(dtype)
    logits[3, vocab // 2] = torch.nan
    logits[4] = -torch.inf
    logits[5, -1] = 100
    logits[6, 0] = torch.inf
    assert greedy(logits).tolist() == logits.argmax(-1).tolist()


def test_a_row_with_nan_fails_alone():
    logits = torch.randn(3, 50)
    logits[1, 7] = torch.nan
    tokens, failures = sample(logits, [step(), step(), step(SamplingParams(temperature=1.0, seed=1))])
    assert list(failures) == [1]
    assert "NaN" in failures[1]
    assert tokens[0] == [int(logits[0].argmax())]
    assert tokens[1] == []
    assert len(tokens[2]) == 1


def test_draw_depends_on_seed_sample_and_position_alone():
    logits = torch.randn(1, 500)
    params = SamplingParams(temperature=1.0, seed=3)
    alone, _ = sample(logits, [step(params)])
    company = torch.cat([torch.randn(4, 500), logits, torch.randn(2, 500)])
    among, _ = sample(
        company,
        [step(SamplingParams(temperature=2.0, seed=i)) for i in range(4)] + [step(params)] + [step()] * 2,
    )
    assert among[4] == alone[0]
    many, _ = sample(logits, [step(params, samples=8)])
    one_by_one = [sample(logits, [step(params, index=i)])[0][0][0] for i in range(8)]
    assert many[0] == one_by_one
    assert len(set(one_by_one)) > 1
    later, _ = sample(logits.expand(40, -1), [step(params, history=range(1, n + 2)) for n in range(40)])
    assert len({t[0] for t in later}) > 5


def test_draw_seed_spreads():
    seeds = {draw_seed(a, b, c) for a in range(10) for b in range(10) for c in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= s < 2**63 for s in seeds)
    assert draw_seed(2**63 - 1, 1023, 10**6) == draw_seed(2**63 - 1, 1023, 10**6)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    draws, _ = sample(logits, [step(SamplingParams(temperature=1.0, seed=5), samples=1000)])
    counts = torch.bincount(torch.tensor(draws[0]), minlength=4) / 1000
    assert torch.allclose(counts, torch.tensor([0.5, 0.2, 0.2, 0.1]), atol=0.05)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_processors_are_those_of_generate_in_its_order(params):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    wanted = GenerationConfig(do_sample=True, **{"top_k": 0, **params})
    theirs = model._get_logits_processor(wanted, input_ids_seq_length=4, device="cpu")
    history = torch.tensor([[4, 9, 9, 33]])
    scores = torch.randn(1, 64)
    ours = processors(SamplingParams(**params))
    assert [type(p) for p in ours] == [type(p) for p in theirs]
    assert torch.equal(ours(history, scores.clone()), theirs(history, scores.clone()))


def test_truncation_and_penalty_are_heeded():
    logits = torch.tensor([[0.0, 5.0, 4.9, -3.0]])
    top = SamplingParams(temperature=5.0, top_k=2, seed=1)
    drawn, _ = sample(logits, [step(top, samples=200)])
    assert set(drawn[0]) == {1, 2}
    penalised = SamplingParams(repetition_penalty=2.0)
    assert sample(logits, [step(penalised, history=[1])])[0] == [[2]]
    assert sample(logits, [step(penalised, history=[0], samples=3)])[0] == [[1, 1, 1]]


def test_low_precision_logits_are_sampled_in_float32():
    logits = torch.randn(1, 200)
    params = SamplingParams(temperature=0.5, top_p=0.9, seed=2)
    rounded = logits.to(torch.bfloat16)
    assert sample(rounded, [step(params)]) == sample(rounded.float(), [step(params)])
