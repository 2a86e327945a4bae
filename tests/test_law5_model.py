"""Law 5 on real models: whatever the policies do, greedy output equals Hugging Face `generate`, token for token.

Both sides run in float64 (softmax included), where two logits within rounding of each other are rare: such a
position counts as equal, is reported, and more than 0.1% of them fails. The cache is poisoned with NaN, so reading a
slot that nobody wrote cannot go unnoticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from strategies import Scenario, examples, mechanisms, scenarios, servable, serve, too_large  # noqa: E402
from test_law5_stub import conversation  # noqa: E402

from pagedlab.config import Config  # noqa: E402
from pagedlab.engine.engine import Engine  # noqa: E402
from pagedlab.engine.request import Request, SamplingParams  # noqa: E402
from pagedlab.executors.model import ModelExecutor  # noqa: E402
from pagedlab.registry import make  # noqa: E402

NEAR_TIE = 1e-5
"""Logits closer than this are equal: norms and rotary embeddings of the models work in float32 inside."""
CPU_KERNELS = tuple(
    name
    for name in servable("kernel")
    if "cpu" in make("kernel", name).devices and "float64" in make("kernel", name).dtypes  # type: ignore[attr-defined]
)


@contextmanager
def float64_softmax() -> Iterator[None]:
    """Transformers' eager attention takes its softmax in float32 by name; the reference must not."""
    own = torch.nn.functional.softmax

    def softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        return own(input, dim=dim, dtype=torch.float64 if input.dtype == torch.float64 else dtype)

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = own


class Reference:
    """`generate` in float64 with eager attention; answers are remembered."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.said: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self.positions = 0
        self.near_ties: list[str] = []

    @torch.inference_mode()
    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        key = tuple(prompt), num_tokens
        if key not in self.said:
            ids = torch.tensor([prompt])
            with float64_softmax():
                out = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=num_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            self.said[key] = out[0, len(prompt) :].tolist()
        return self.said[key]

    @torch.inference_mode()
    def gap(self, tokens: list[int], one: int, other: int) -> float:
        with float64_softmax():
            logits = self.model(torch.tensor([tokens])).logits[0, -1]
        return float((logits[one] - logits[other]).abs())

    def holds(self, prompt: list[int], said: list[int], num_tokens: int) -> None:
        """``said`` is what greedy decoding says, or parts from it only where two logits are equal."""
        done = 0
        while True:
            want = self.generate(prompt + said[:done], num_tokens - done)
            got = said[done:]
            if got == want:
                break
            at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
            assert at < min(len(got), len(want)), f"one of the answers ends early: {got}, {want}"
            gap = self.gap(prompt + said[: done + at], got[at], want[at])
            assert gap < NEAR_TIE, (
                f"law 5: at position {len(prompt) + done + at} it says {got[at]} and generate {want[at]}, "
                f"{gap:.3g} apart"
            )
            self.near_ties.append(f"{gap:.3g}")
            done += at + 1
            if done >= num_tokens:
                break
        self.positions += len(said)


@pytest.fixture(scope="module")
def random_model(torch_threads: int) -> Any:
    """A Llama of two layers with grouped queries; its weights are large enough that the context decides."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.6,
        eos_token_id=None,
        bos_token_id=None,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def tiny_model(tiny: Path, torch_threads: int) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        tiny, dtype=torch.float64, attn_implementation="eager"
    ).eval()


@pytest.fixture(params=["random_model", "tiny_model"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def run(model: Any, scenario: Scenario, *, check: bool = True) -> Engine:
    """Serve a scenario with the layout and the kernel that it names; the model is given back as it was."""
    executor = ModelExecutor(
        model,
        layout=scenario.config.policy("layout").clone(),  # type: ignore[arg-type]
        kernel=scenario.config.policy("kernel").clone(),  # type: ignore[arg-type]
        poison=True,
    )
    try:
        return serve(scenario, executor, check=check)
    finally:
        executor.release()


def says_what_generate_says(engine: Engine, scenario: Scenario, reference: Reference) -> None:
    for request in scenario.requests:
        group = engine.groups[request.request_id]
        for seq in group.sequences:
            prompt = list(request.prompt)
            if seq.finish_reason == "refused":
                assert too_large(engine, seq)
            elif seq.finish_reason == "cancelled":
                if seq.output:
                    reference.holds(prompt, seq.output, len(seq.output))
            else:
                assert seq.finish_reason in ("stop", "length"), seq.error
                room = engine.max_model_len - len(prompt)
                reference.holds(prompt, seq.output, min(request.sampling.max_tokens, room))


def few_near_ties(reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    share = len(reference.near_ties) / max(1, reference.positions)
    with capsys.disabled():
        if reference.near_ties:
            print(
                f"\n{len(reference.near_ties)} near-ties at {reference.positions} positions: {reference.near_ties}"
            )
    assert share <= 0.001 or len(reference.near_ties) <= 1


SMALL = {"max_requests": 5, "max_prompt": 14, "max_output": 8, "max_samples": 2}


def test_policies_never_change_what_a_model_says(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reference = Reference(model)

    @settings(max_examples=examples(0.3))
    @given(scenarios(choose={"kernel": CPU_KERNELS}, **SMALL))
    def check(scenario: Scenario) -> None:
        says_what_generate_says(run(model, scenario), scenario, reference)

    check()
    few_near_ties(reference, capsys)


@pytest.mark.parametrize("layout", servable("layout"))
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_every_kernel_with_every_layout(random_model: Any, kernel: str, layout: str) -> None:
    """One run full of swapping, prefetching, copying and preemption for each pair."""
    scenario = conversation()
    scenario.config = scenario.config.replace(kernel=kernel, layout=layout)
    reference = Reference(random_model)
    engine = run(random_model, scenario)
    says_what_generate_says(engine, scenario, reference)
    assert not reference.near_ties
    seen = mechanisms(engine)
    for what in ("preempted by swap", "prefix loaded from host", "SequenceForked", "evicted from device"):
        assert seen[what], f"{what} did not happen"

    start = [3, 1, 0, 2, 2, 1, 3]
    apart = [
        Request(request_id=str(i), prompt=[*start[: 5 + i], i, i, i], arrival=12.0 * i) for i in range(3)
    ]
    apart = [replace(r, sampling=SamplingParams(max_tokens=6, n=2)) for r in apart]
    config = scenario.config.replace(num_blocks=40, block_size=4, swap="drop", preemption="recompute")
    scenario = Scenario(config, apart)
    engine = run(random_model, scenario)
    says_what_generate_says(engine, scenario, reference)
    assert mechanisms(engine)["partial hit"] >= 2
    assert mechanisms(engine)["BlocksCopied"] > 2


@settings(max_examples=examples(0.2))
@given(data=st.data())
def test_chunks_of_any_size_say_the_same(random_model: Any, data: st.DataObject) -> None:
    scenario = data.draw(
        scenarios(choose={"kernel": CPU_KERNELS, "scheduler": ("chunked-prefill",)}, **SMALL)
    )
    outputs = []
    for budget in (2, 64):
        scenario.config = scenario.config.replace(max_num_batched_tokens=budget)
        scenario.cancels, scenario.clears = {}, frozenset()
        engine = run(random_model, scenario, check=False)
        outputs.append(
            {
                (s.request_id, s.sample_index): s.output
                for s in engine.finished
                if s.finish_reason != "refused"
            }
        )
    assert outputs[0] == outputs[1]


def test_the_reference_depends_on_its_context(random_model: Any) -> None:
    """Not vacuous: a wrong, a missing or a moved token early on changes what is said."""
    reference = Reference(random_model)
    prompt = [3, 1, 0, 2, 2, 1, 3, 0]
    said = reference.generate(prompt, 8)
    changed = 0
    for at in range(len(prompt)):
        other = list(prompt)
        other[at] = (other[at] + 1) % 4
        changed += reference.generate(other, 8) != said
    changed += reference.generate(prompt[1:], 8) != said
    assert changed >= len(prompt), f"only {changed} changes were noticed"
    assert len(Counter(said)) > 2


def test_a_wrong_block_would_be_noticed(random_model: Any) -> None:
    """Not vacuous either: a table that names one block twice changes the output."""
    scenario = conversation()
    scenario.config = Config(num_blocks=64, block_size=2, max_model_len=64)
    scenario.requests = scenario.requests[:4]
    executor = ModelExecutor(
        random_model,
        layout=make("layout", "padded"),  # type: ignore[arg-type]
        kernel=make("kernel", CPU_KERNELS[0]),  # type: ignore[arg-type]
        poison=True,
    )
    own = executor.execute

    def muddled(orders: Any) -> Any:
        for entry in orders.batch:
            if entry.start > 4:
                entry.table = [entry.table[1], *entry.table[1:]]
                entry.table_version += 1000
        return own(orders)

    executor.execute = muddled  # type: ignore[method-assign]
    try:
        engine = serve(scenario, executor)
    finally:
        executor.release()
    reference = Reference(random_model)
    with pytest.raises(AssertionError, match="law 5"):
        says_what_generate_says(engine, scenario, reference)
