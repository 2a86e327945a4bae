"""Requests to run: synthetic workloads with seeds, and prompts of your own.

>>> from pagedlab import workloads
>>> workloads.chat(seed=0, conversations=2, turns=3)
<workload 'chat': 6 requests in 0.954 s>
"""

from pagedlab.workloads.generators import (
    chat,
    list_workloads,
    load,
    mixed_lengths,
    parallel_samples,
    shared_prefix,
)
from pagedlab.workloads.workload import Workload, prompts

__all__ = [
    "Workload",
    "chat",
    "list_workloads",
    "load",
    "mixed_lengths",
    "parallel_samples",
    "prompts",
    "shared_prefix",
]
