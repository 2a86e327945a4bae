"""Eviction that weighs what a block would cost to compute again against how long it has waited.

The work of a block grows with its depth, because its tokens attend to all before them; `View.recompute_flops` says by
how much for the model at hand, and without a model all blocks cost the same. A prefix cache cannot use what lies behind
a gap, so the policies here give up leaves only: the beginning of a conversation is cheap to compute, and worth all that
follows it.

Blocks of equal cost form a group, so there is one group for every depth at which blocks are cached.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import inf, log
from typing import Any, ClassVar

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.bounds import Belady
from pagedlab.policies.eviction import Score
from pagedlab.policies.shelf.groups import PS_PER_SECOND, Grouped
from pagedlab.registry import register


class ByCost(Grouped):
    """Leaves in groups of equal recompute cost; a victim costs O(depths cached)."""

    leaves_only: ClassVar[bool] = True

    def group(self, block: Block) -> float:
        return self.view.recompute_flops(block)

    def idle(self, block: Block) -> int:
        """Picoseconds since the last release, at least 1."""
        return max(1, self._now - block.last_released)


@register("eviction", "pensieve")
class Pensieve(ByCost):
    """Give up the block with the least recompute work per second that it has waited.

    Score: FLOPs to compute the block again / time since its last release. Pensieve itself drops the beginning of a
    conversation first, because that is cheapest, and computes it again in front of what is left; it profiles costs
    where this counts FLOPs. Here only leaves go (see above).

    `victims` O(depths + n log cached), other operations O(log cached).

    Yu et al., Stateful Large Language Model Serving with Pensieve, EuroSys 2025.
    """

    def worth(self, group: float, block: Block) -> Score:
        return group / self.idle(block)


@register("eviction", "asym-cache")
class AsymCache(ByCost):
    """Give up the block with the least expected recompute work: probability of reuse times FLOPs (more with depth).

    The probability falls with the time waited, as exp(-t / lifetime) or as 1 / (1 + t / lifetime). The paper joins hit
    rate and position in this way so that what is evicted is cheap for the attention kernel, and attends over what is
    left on both sides of a gap; here only leaves go, and the work is the model's FLOPs. With a hyperbola and a
    lifetime near 0 this is `pensieve`.

    `victims` O(depths + n log cached), other operations O(log cached).

    AsymCache: Multi-Segment Attention for KV cache management, arXiv:2606.02964, 2026.
    """

    decay: str = param(
        "exponential", help="how probability falls with time", choices=("exponential", "hyperbolic")
    )
    lifetime: float = param(60.0, help="time scale of the decay", low=1e-3, high=1e6, unit="seconds")

    def worth(self, group: float, block: Block) -> Score:
        ages = self.idle(block) / (self.lifetime * PS_PER_SECOND)
        # Logarithms keep what has waited for very long apart.
        return log(group) - (ages if self.decay == "exponential" else log(1 + ages))


@register("eviction", "marconi")
class Marconi(ByCost):
    """Give up the block of the least recency + ``alpha`` · FLOP efficiency (Marconi).

    FLOP efficiency is the work that a hit saves per byte of cache. Both terms are scaled to 0..1 over all candidates at
    the time: recency from the first released to now, efficiency from the cheapest to the dearest.

    Simplified: the paper's caches also hold recurrent states, whose nodes with one child may give up theirs; attention
    alone leaves only leaves. It finds ``alpha`` by replaying the requests seen first, here it is given (0: LRU among
    leaves). Its admission policy concerns recurrent states alone.

    `victims` O(depths + n log cached), other operations O(log cached).

    Pan et al., Marconi: Prefix Caching for the Era of Hybrid LLMs, MLSys 2025.
    """

    alpha: float = param(1.0, help="weight of FLOP efficiency against recency", low=0.0, high=100.0)

    def group(self, block: Block) -> float:
        return self.view.recompute_flops(block) / (block.fill * self.view.bytes_per_token)

    def survey(self, firsts: Iterable[tuple[float, Block]]) -> None:
        pairs = list(firsts)
        self._oldest = min((block.last_released for _, block in pairs), default=0)
        self._least = min((group for group, _ in pairs), default=0.0)
        self._most = max((group for group, _ in pairs), default=0.0)

    def worth(self, group: float, block: Block) -> Score:
        span, range_ = self._now - self._oldest, self._most - self._least
        recency = (block.last_released - self._oldest) / span if span > 0 else 0.0
        efficiency = (group - self._least) / range_ if range_ > 0 else 0.0
        return recency + self.alpha * efficiency


@register("eviction", "belady-cost")
class BeladyCost(ByCost, Belady):
    """Bound: give up the leaf with the least recompute work per access until its next use. O(depths + n log cached).

    Belady's rule weighed by cost. Where costs differ, no greedy rule is the best, and this one is a heuristic: another
    policy may save more work. Where all costs are equal it is `belady-tree`.

    Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5(2), 1966.
    """

    def reset(self, *, capacity: int, future: Sequence[Hashable] | None = None) -> None:
        Belady.reset(self, capacity=capacity, future=future)
        self._empty()

    def priority(self, block: Block) -> Score:
        return -self._next_use[block.key]

    def worth(self, group: Any, block: Block) -> Score:
        at = self._next_use[block.key]
        return 0.0 if at == inf else float(group) / max(1, at - self._at)
