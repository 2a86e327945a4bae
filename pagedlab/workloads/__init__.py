"""Requests to run: synthetic workloads with seeds, published traces, and prompts of your own.

>>> from pagedlab import workloads
>>> workloads.chat(seed=0, conversations=2, turns=3)
<workload 'chat': 6 requests in 0.954 s>
"""

from pagedlab.workloads.generators import chat, mixed_lengths, parallel_samples, shared_prefix
from pagedlab.workloads.loading import list_traces, list_workloads, load
from pagedlab.workloads.synthetic import (
    agents,
    alpaca_like,
    conversations,
    rag,
    scan_loop,
    sharegpt_like,
    zipf,
)
from pagedlab.workloads.traces import read
from pagedlab.workloads.workload import Workload, prompts

__all__ = [
    "Workload",
    "agents",
    "alpaca_like",
    "chat",
    "conversations",
    "list_traces",
    "list_workloads",
    "load",
    "mixed_lengths",
    "parallel_samples",
    "prompts",
    "rag",
    "read",
    "scan_loop",
    "shared_prefix",
    "sharegpt_like",
    "zipf",
]
