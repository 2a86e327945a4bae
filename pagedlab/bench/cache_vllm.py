"""The work of the cache benchmark, done by vLLM's own `KVCacheManager`. Tested with vLLM 0.33.

Prefix caching and KV events are on, hashes are vLLM's default (SHA-256 of the pickled block), and one group
of full-attention layers takes the whole pool. Every call is one that vLLM's scheduler makes for a request
that runs alone; the sampled tokens and the sampling parameters are there beforehand.
"""

from __future__ import annotations

import time

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from pagedlab.bench.cache import BLOCK_SIZE, NUM_BLOCKS


def make_manager(max_tokens: int) -> KVCacheManager:
    """Return a manager of `NUM_BLOCKS` usable blocks for requests of at most ``max_tokens`` tokens."""
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float16)
    config = KVCacheConfig(
        num_blocks=NUM_BLOCKS + 1,  # vLLM keeps one for itself, the null block
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    return KVCacheManager(
        config,
        max_model_len=max_tokens,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        enable_caching=True,
        enable_kv_cache_events=True,
    )


def vllm_seconds(prompts: list[list[int]], decode: int) -> float:
    """Time vLLM's manager over ``prompts``, each extended by ``decode`` tokens one at a time.

    Making and hashing the requests is counted. Events are drained once a request.
    """
    manager = make_manager(max(map(len, prompts)) + decode)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    sampling = SamplingParams(max_tokens=max(decode, 1))
    start = time.perf_counter()
    for number, tokens in enumerate(prompts):
        request = Request(str(number), tokens, sampling, None, block_hasher=hasher)
        blocks, num_hit, *_ = manager.get_computed_blocks(request)
        num_prompt = len(tokens)
        if manager.allocate_slots(request, num_prompt - num_hit, num_hit, blocks) is None:
            raise RuntimeError("the pool is too small for one prompt")
        request.num_computed_tokens = num_prompt
        for token in range(decode):
            request.append_output_token_ids(token)
            if manager.allocate_slots(request, 1) is None:
                raise RuntimeError("the pool is too small for one prompt")
            request.num_computed_tokens += 1
        manager.free(request)
        manager.take_events()
    return time.perf_counter() - start
