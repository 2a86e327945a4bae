"""Tokens a second on a real model: pagedlab, transformers' `generate`, and transformers' continuous batching.

The model is a random-weight Llama of SmolLM2-135M's shape. 64 requests have prompts of 32 to 256 tokens and a
fixed number of output tokens each (16 to 128), end of sequence off; at most 16 (second row: 32) sequences at
once everywhere. `generate` takes left-padded batches in order of arrival, each run to its longest; only
requested tokens count. All three take turns in one process with the same number of threads; medians are
reported. Beside it, in float64, greedy tokens are compared one by one.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from pagedlab.config import Config
from pagedlab.engine.engine import Engine
from pagedlab.engine.request import Request
from pagedlab.events import EventLog
from pagedlab.executors.model import ModelExecutor
from pagedlab.executors.shapes import SHAPES, random_model
from pagedlab.workloads import mixed_lengths

SHAPE = "smollm2-135m"
BLOCK_SIZE = 16
BUDGET = 256
"""Tokens a step of both continuous batchers."""


def make_requests(num_requests: int = 64, seed: int = 0) -> list[Request]:
    """Return the workload's requests with token ids of the model's vocabulary, all there at time 0."""
    vocab = SHAPES[SHAPE]["vocab_size"]
    requests = mixed_lengths(seed=seed, num_requests=num_requests).requests
    return [replace(r, prompt=[1 + t % (vocab - 1) for t in r.prompt], arrival=0.0) for r in requests]


def requested(requests: Iterable[Request]) -> int:
    """Output tokens that the requests ask for."""
    return sum(r.sampling.max_tokens for r in requests)


def generate_rate(model: Any, requests: list[Request], max_num_seqs: int) -> float:
    """Requested tokens per second of `generate` on left-padded batches, each run to its longest."""
    start = time.perf_counter()
    for at in range(0, len(requests), max_num_seqs):
        batch = requests[at : at + max_num_seqs]
        longest = max(len(r.prompt) for r in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        most = max(r.sampling.max_tokens for r in batch)
        config = GenerationConfig(
            max_new_tokens=most, min_new_tokens=most, do_sample=False, use_cache=True, pad_token_id=0
        )
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, generation_config=config)
        if out.shape[1] != longest + most:
            raise RuntimeError(f"generate made {out.shape[1] - longest} tokens instead of {most}")
    return requested(requests) / (time.perf_counter() - start)


def generate_batch_rate(model: Any, requests: list[Request], max_num_seqs: int) -> float:
    """Requested tokens per second of transformers' continuous batching, each request with its own length.

    `generate_batch` takes one length for all requests, so its manager is used directly.
    """
    page = 32
    config = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=sum(-(-(len(r.prompt) + r.sampling.max_tokens) // page) + 1 for r in requests),
        max_batch_tokens=BUDGET,
        max_requests_per_batch=max_num_seqs,
        allow_block_sharing=False,
        use_cuda_graph=False,
        use_async_batching=False,
    )
    generation = GenerationConfig(do_sample=False, max_new_tokens=128, eos_token_id=-1, pad_token_id=0)
    done: dict[str, int] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, warmup=False
    ) as manager:
        start = time.perf_counter()
        for r in requests:
            manager.add_request(list(r.prompt), request_id=r.request_id, max_new_tokens=r.sampling.max_tokens)
        while len(done) < len(requests):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done[result.request_id] = len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped early")
        seconds = time.perf_counter() - start
    if any(done[r.request_id] != r.sampling.max_tokens for r in requests):
        raise RuntimeError("transformers' continuous batching made other lengths than requested")
    return requested(requests) / seconds


def make_engine(executor: ModelExecutor, requests: list[Request], max_num_seqs: int) -> Engine:
    """Return our engine with the default policies and room for all that can run at once."""
    longest = max(len(r.prompt) + r.sampling.max_tokens for r in requests)
    config = Config(
        model="random:" + SHAPE,
        num_blocks=max_num_seqs * -(-longest // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=BUDGET,
    )
    return Engine(config, executor, events=EventLog())


def pagedlab_rate(executor: ModelExecutor, requests: list[Request], max_num_seqs: int) -> float:
    """Requested tokens per second of the engine with its default policies, prefix caching and event log
    on.
    """
    engine = make_engine(executor, requests, max_num_seqs)
    start = time.perf_counter()
    for request in requests:
        engine.add(request)
    engine.run()
    seconds = time.perf_counter() - start
    if engine.totals.output_tokens != requested(requests):
        raise RuntimeError(f"{engine.totals.output_tokens} tokens made, {requested(requests)} requested")
    return requested(requests) / seconds


def make_executor(dtype: torch.dtype) -> ModelExecutor:
    """Return a model executor of the shape with the default layout and kernel."""
    policies = Config().policies()
    return ModelExecutor(random_model(SHAPE, dtype), layout=policies.layout, kernel=policies.kernel)


def measure(
    *,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    sizes: tuple[int, ...] = (16, 32),
    num_requests: int = 64,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """Run the three contenders in turn and return a row for each dtype, batch size and contender."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    requests = make_requests(num_requests)
    rows: list[dict[str, Any]] = []
    for name in dtypes:
        dtype = getattr(torch, name)
        baseline, executor = random_model(SHAPE, dtype), make_executor(dtype)
        baseline.set_attn_implementation("sdpa")
        for size in sizes:
            contenders: dict[str, Callable[[], float]] = {
                "pagedlab": partial(pagedlab_rate, executor, requests, size),
                "generate": partial(generate_rate, baseline, requests, size),
                "generate_batch": partial(generate_batch_rate, baseline, requests, size),
            }
            pagedlab_rate(executor, requests[:4], size)  # compiles the kernels
            generate_rate(baseline, requests[:1], size)
            rates: dict[str, list[float]] = {who: [] for who in contenders}
            for _ in range(repeats):
                for who, run in contenders.items():
                    rates[who].append(run())
            medians = {who: statistics.median(r) for who, r in rates.items()}
            rows += [
                {
                    "contender": who,
                    "dtype": name,
                    "max_num_seqs": size,
                    "tokens_per_s": round(median, 1),
                    "best": round(max(rates[who]), 1),
                    "worst": round(min(rates[who]), 1),
                    "ratio_generate": round(median / medians["generate"], 2),
                    "ratio_generate_batch": round(median / medians["generate_batch"], 2),
                    "requests": num_requests,
                    "requested_tokens": requested(requests),
                    "repeats": repeats,
                    "threads": torch.get_num_threads(),
                }
                for who, median in medians.items()
            ]
    return rows


def compare_tokens(num_requests: int = 8, max_tokens: int = 24) -> dict[str, Any]:
    """Greedy tokens in float64, ours against `generate`, one by one, on the first requests cut to
    ``max_tokens``.
    """
    requests = [
        replace(r, sampling=replace(r.sampling, max_tokens=min(max_tokens, r.sampling.max_tokens)))
        for r in make_requests(num_requests)
    ]
    engine = make_engine(make_executor(torch.float64), requests, num_requests)
    for request in requests:
        engine.add(request)
    engine.run()
    model: Any = random_model(SHAPE, torch.float64)
    model.set_attn_implementation("sdpa")
    equal = total = 0
    for request in requests:
        ids = torch.tensor([list(request.prompt)])
        config = GenerationConfig(max_new_tokens=request.sampling.max_tokens, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        want = out[0, len(request.prompt) :].tolist()
        got = engine.groups[request.request_id].sequences[0].output
        equal += sum(a == b for a, b in zip(want, got))
        total += len(want)
    return {"contender": "pagedlab", "dtype": "float64", "tokens": total, "equal_to_generate": equal}


def main(json: bool = False) -> list[dict[str, Any]]:
    """Measure and return the rows. ``PAGEDLAB_BENCH_REPEATS`` sets the rounds (3)."""
    repeats = int(os.environ.get("PAGEDLAB_BENCH_REPEATS", "3"))
    return [*measure(repeats=repeats), compare_tokens()]
