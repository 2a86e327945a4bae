"""Tokens per second on 64 mixed requests: transformers' two ways to batch, and the executor behind our engine.

The model is a random-weight Llama of SmolLM2-135M's shape: speed does not depend on what it says, and no download is
needed. Requests have prompts of 32 to 256 tokens and a fixed number of output tokens each (16 to 128), end of sequence
off; only requested tokens count. Run as ``python benchmarks/engine_speed.py [--dtype float32] [--max-seqs 16]``.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from pagedlab.engine.orders import SequenceStep, StepOrders
from pagedlab.engine.request import Request, SamplingParams

VOCAB = 49_152


def make_model(dtype: str = "float32", seed: int = 0) -> LlamaForCausalLM:
    """Return the 135 M parameter Llama with random weights, in ``dtype``, on the CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.set_attn_implementation("sdpa")
    return model


def make_requests(seed: int = 0, num_requests: int = 64) -> list[Request]:
    """Return the workload: all there at time 0, greedy, outputs of fixed length."""
    rng = random.Random(seed)
    return [
        Request(
            request_id=f"r{i}",
            prompt=[rng.randrange(1, VOCAB) for _ in range(rng.randint(32, 256))],
            sampling=SamplingParams(max_tokens=rng.randint(16, 128), ignore_eos=True),
        )
        for i in range(num_requests)
    ]


def requested(requests: list[Request]) -> int:
    """Output tokens that the requests ask for."""
    return sum(r.sampling.max_tokens for r in requests)


def baseline_generate(model: PreTrainedModel, requests: list[Request], max_seqs: int = 16) -> float:
    """Requested tokens per second of `generate` on left-padded batches in order of arrival, each run to its longest."""
    start = time.perf_counter()
    for at in range(0, len(requests), max_seqs):
        batch = requests[at : at + max_seqs]
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
        assert out.shape[1] == longest + most
    return requested(requests) / (time.perf_counter() - start)


def baseline_generate_batch(
    model: PreTrainedModel,
    requests: list[Request],
    max_seqs: int = 16,
    page_size: int = 32,
    max_batch_tokens: int = 256,
) -> float:
    """Requested tokens per second of transformers' own continuous batching, each request with its own length.

    `generate_batch` itself takes one length for all requests, so its manager is used directly: nothing is generated
    that nobody asked for.
    """
    pages = sum(-(-(len(r.prompt) + r.sampling.max_tokens) // page_size) + 1 for r in requests)
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=pages,
        max_batch_tokens=max_batch_tokens,
        max_requests_per_batch=max_seqs,
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
    assert all(done[r.request_id] == r.sampling.max_tokens for r in requests)
    return requested(requests) / seconds


def executor_loop(
    executor: Any, requests: list[Request], max_seqs: int = 16, budget: int = 256, block_size: int = 16
) -> float:
    """Requested tokens per second of a bare loop around the executor: iteration-level batching, chunked prefill."""
    need = sum(-(-(len(r.prompt) + r.sampling.max_tokens) // block_size) for r in requests)
    executor.prepare(num_blocks=need, block_size=block_size, host_blocks=0, max_num_seqs=max_seqs)
    free = list(range(need))
    random.Random(0).shuffle(free)
    waiting = deque(enumerate(requests))
    running: list[dict[str, Any]] = []
    ended: list[int] = []
    start, step = time.perf_counter(), 0
    while waiting or running:
        while waiting and len(running) < max_seqs:
            i, r = waiting.popleft()
            running.append({"id": i, "request": r, "tokens": list(r.prompt), "done": 0, "table": []})
        left = budget - sum(len(s["tokens"]) - s["done"] == 1 for s in running)
        batch, of = [], []
        for s in running:
            todo = len(s["tokens"]) - s["done"]
            take = 1 if todo == 1 else min(todo, left)
            if not take:
                continue
            left -= take if todo > 1 else 0
            while len(s["table"]) * block_size < s["done"] + take:
                s["table"].append(free.pop())
            now = s["tokens"][s["done"] : s["done"] + take]
            sampling = s["request"].sampling
            batch.append(
                SequenceStep(
                    s["id"], now, s["done"], s["table"], 0, int(take == todo), 0, sampling, s["tokens"]
                )
            )
            of.append(s)
        result = executor.execute(StepOrders(step, deque(), batch, ended))
        step, ended = step + 1, []
        for s, order, sampled in zip(of, batch, result.samples, strict=True):
            s["done"] += len(order.tokens)
            s["tokens"] += sampled
            if len(s["tokens"]) == len(s["request"].prompt) + s["request"].sampling.max_tokens:
                ended.append(s["id"])
                free += s["table"]
        running = [s for s in running if s["id"] not in ended]
    return requested(requests) / (time.perf_counter() - start)


def measure(ways: dict[str, Callable[[], float]], repeats: int = 3) -> dict[str, float]:
    """Median of each way, all ways in turn so that a busy machine is unfair to none."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seen[name].append(way())
            print(f"  {name}: {seen[name][-1]:.1f} tokens/s", flush=True)
    return {name: statistics.median(values) for name, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-seqs", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=["generate", "generate_batch", "executor"])
    parser.add_argument("--plain", action="store_true", help="the executor without its fast path")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    requests = make_requests(num_requests=args.requests)
    baseline = make_model(args.dtype)
    ways: dict[str, Callable[[], float]] = {}
    if "generate" in args.only:
        ways["generate"] = lambda: baseline_generate(baseline, requests, args.max_seqs)
    if "generate_batch" in args.only:
        ways["generate_batch"] = lambda: baseline_generate_batch(baseline, requests, args.max_seqs)
    if "executor" in args.only:
        from pagedlab.executors.model import ModelExecutor
        from pagedlab.registry import make

        executor = ModelExecutor(
            make_model(args.dtype),
            layout=make("layout", "padded"),  # type: ignore[arg-type]
            kernel=make("kernel", "cpu-paged"),  # type: ignore[arg-type]
            fast=not args.plain,
        )
        ways["executor"] = lambda: executor_loop(executor, requests, args.max_seqs, args.budget)
    print(
        f"{args.dtype}, {args.requests} requests, {requested(requests)} tokens, at most {args.max_seqs} at once"
    )
    medians = measure(ways, args.repeats)
    for name, value in medians.items():
        ratio = medians["executor"] / value if "executor" in medians else float("nan")
        print(f"{name:15s} {value:7.1f} tokens/s   executor is {ratio:.2f} times that")


if __name__ == "__main__":
    main()
