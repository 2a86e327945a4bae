"""The shelf: eviction policies of the literature, one module for each family.

Every class gives the idea, the rule, the cost of an operation and the paper; `pagedlab.policies.shelf.parts` says what
holds for all of them. Where libCacheSim, whose numbers many papers compare with, differs from the paper, a ``variant``
follows it; our numbers are checked against its.
"""

from pagedlab.policies.shelf.arc import ARC
from pagedlab.policies.shelf.costs import AsymCache, BeladyCost, Marconi, Pensieve
from pagedlab.policies.shelf.greedy import GDSF, LFUDA, PGDSF, HitsPerToken
from pagedlab.policies.shelf.hands import Clock, Sieve
from pagedlab.policies.shelf.learned import Returning
from pagedlab.policies.shelf.lhd import LHD
from pagedlab.policies.shelf.lirs import LIRS
from pagedlab.policies.shelf.lookahead import KVFlow, QueueAware
from pagedlab.policies.shelf.prefix_tree import LeafFirst, TailOptimizedLRU
from pagedlab.policies.shelf.queues import MQ, TwoQ
from pagedlab.policies.shelf.recency import LRUK, MRU
from pagedlab.policies.shelf.s3fifo import S3FIFO
from pagedlab.policies.shelf.sampled import Hyperbolic, Random
from pagedlab.policies.shelf.segmented import SLRU
from pagedlab.policies.shelf.timed import TimeToLive, WorkloadAware
from pagedlab.policies.shelf.tinylfu import WTinyLFU

__all__ = [
    "ARC",
    "GDSF",
    "LFUDA",
    "LHD",
    "LIRS",
    "LRUK",
    "MQ",
    "MRU",
    "PGDSF",
    "S3FIFO",
    "SLRU",
    "AsymCache",
    "BeladyCost",
    "Clock",
    "HitsPerToken",
    "Hyperbolic",
    "KVFlow",
    "LeafFirst",
    "Marconi",
    "Pensieve",
    "QueueAware",
    "Random",
    "Returning",
    "Sieve",
    "TailOptimizedLRU",
    "TimeToLive",
    "TwoQ",
    "WTinyLFU",
    "WorkloadAware",
]
