"""The ten decisions, one module each: contract on top, built-ins below."""

from pagedlab.policies import (
    allocator,
    bounds,
    eviction,
    fair,
    kernel,
    layout,
    lookup,
    ordering,
    preemption,
    prefetch,
    quota,
    reservation,
    scheduler,
    swap,
)
from pagedlab.policies.allocator import Allocator
from pagedlab.policies.base import Policy, param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import LFU, LRU, Eviction
from pagedlab.policies.kernel import Kernel
from pagedlab.policies.layout import Layout
from pagedlab.policies.lookup import ChainedHash, Lookup, RadixTree
from pagedlab.policies.preemption import Preemption, Recompute, SwapOut
from pagedlab.policies.prefetch import Prefetch, QueueLookahead
from pagedlab.policies.reservation import Reservation
from pagedlab.policies.scheduler import ChunkedPrefill, IterationLevel, Scheduler, StaticBatch
from pagedlab.policies.shelf import costs, learned, lookahead, prefix_tree, timed
from pagedlab.policies.swap import Drop, HostTier, Swap
from pagedlab.policies.wrappers import Recorded, Timed

__all__ = [
    "LFU",
    "LRU",
    "Allocator",
    "Block",
    "ChainedHash",
    "ChunkedPrefill",
    "Drop",
    "Eviction",
    "HostTier",
    "IterationLevel",
    "Kernel",
    "Layout",
    "Lookup",
    "Policy",
    "Preemption",
    "Prefetch",
    "QueueLookahead",
    "RadixTree",
    "Recompute",
    "Recorded",
    "Reservation",
    "Scheduler",
    "StaticBatch",
    "Swap",
    "SwapOut",
    "Timed",
    "allocator",
    "bounds",
    "costs",
    "eviction",
    "fair",
    "kernel",
    "layout",
    "learned",
    "lookahead",
    "lookup",
    "ordering",
    "param",
    "preemption",
    "prefetch",
    "prefix_tree",
    "quota",
    "reservation",
    "scheduler",
    "swap",
    "timed",
]
