"""The ten decisions, one module each: contract on top, built-ins below."""

from pagedlab.policies import (
    allocator,
    bounds,
    eviction,
    kernel,
    layout,
    lookup,
    preemption,
    prefetch,
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
from pagedlab.policies.swap import DiskTier, Drop, HostTier, Swap

__all__ = [
    "LFU",
    "LRU",
    "Allocator",
    "Block",
    "ChainedHash",
    "ChunkedPrefill",
    "DiskTier",
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
    "Reservation",
    "Scheduler",
    "StaticBatch",
    "Swap",
    "SwapOut",
    "allocator",
    "bounds",
    "costs",
    "eviction",
    "kernel",
    "layout",
    "learned",
    "lookahead",
    "lookup",
    "param",
    "preemption",
    "prefetch",
    "prefix_tree",
    "reservation",
    "scheduler",
    "swap",
    "timed",
]
