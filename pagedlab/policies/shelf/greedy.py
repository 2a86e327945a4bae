"""Worth plus age: what was used much stays, but not for ever.

The age is the score of the last block given up; a block's score is its worth plus the age when it was last used. So
worth fades as the age grows, and nothing has to be scored again.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Score
from pagedlab.policies.shelf.groups import Grouped
from pagedlab.policies.shelf.parts import Ranked
from pagedlab.registry import register


class _Ageing(Ranked):
    """Scores of `worth` plus age; lowest goes first, ties in the order of release."""

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._age = 0.0
        self._score: dict[Block, float] = {}
        """Scores as of the last release."""

    def worth(self, block: Block) -> float:
        """Return what is added to the age."""
        raise NotImplementedError

    def release(self, block: Block) -> None:
        self._score[block] = self._age + self.worth(block)
        super().release(block)

    def priority(self, block: Block) -> Score:
        return self._score[block]

    def remove(self, block: Block) -> None:
        score = self._score.pop(block, 0.0)
        if block is self._first():
            self._age = score
        self._released.pop(block, None)

    def stats(self) -> dict[str, Any]:
        return {"age": self._age}


@register("eviction", "lfu-da")
class LFUDA(_Ageing):
    """LFU with dynamic ageing: a block's score is its uses plus the age when it was last used. O(log cached).

    Arlitt, Cherkasova, Dilley, Friedrich, Jin, Evaluating content management techniques for web proxy caches,
    Performance Evaluation Review 27(4), 2000. ``variant="libcachesim"`` adds the age anew at every use (so far it can
    be told from outside), which ages much faster.
    """

    variant: str = param(
        "paper", choices=("paper", "libcachesim"), help="whether a use adds the age once or again"
    )

    def worth(self, block: Block) -> float:
        if self.variant == "libcachesim":
            return self._score.get(block, 0.0) + 1
        return block.hits + 1


@register("eviction", "gdsf")
class GDSF(_Ageing):
    """Greedy-Dual-Size with frequency: uses times cost to fetch, divided by size, plus age. O(log cached).

    Blocks are of one size, and with ``cost="block"`` of one cost, and then it is LFU with dynamic ageing. With
    ``cost="context"`` a block costs the tokens that must be there before it can be computed, itself included.

    Cherkasova, Improving WWW proxies performance with greedy-dual-size-frequency caching policy, HP Labs report
    HPL-98-69R1, 1998.
    """

    cost: str = param("block", choices=("block", "context"), help="what it costs to fetch a block again")

    def worth(self, block: Block) -> float:
        uses = block.hits + 1
        return uses if self.cost == "block" else uses * (1 + block.depth / max(1, block.fill))


@register("eviction", "hits-per-token")
class HitsPerToken(Ranked):
    """Give up the block whose prefix earned the fewest uses per token that it takes up. O(log cached).

    A block is of use only with all before it, so its uses are divided by the tokens up to its end. Parents stay before
    their children: they have no fewer uses and fewer tokens. Nothing ages.
    """

    def priority(self, block: Block) -> Score:
        return (block.hits + 1) / max(1, block.depth + block.fill)


@register("eviction", "pgdsf")
class PGDSF(Grouped):
    """Prefix-aware GDSF: uses times the cost to recompute a token, plus age, among leaves of the tree of prefixes.

    A token deep in a prompt costs more to compute, since it attends to all before it: 1 + ``attention`` for every 1000
    tokens of context, in units of what a token costs without. The age is the score of the last block given up.
    O(log cached), amortized.

    Jin, Zhang, Jiang, Liu, Liu, Liu, Jin, RAGCache: efficient knowledge caching for retrieval-augmented generation,
    2024 (arXiv:2404.12457), where the cost comes from measured prefill times.
    """

    leaves_only: ClassVar[bool] = True
    attention: float = param(
        0.03,
        low=0.0,
        high=100.0,
        unit="per 1000 tokens",
        help="cost of context, unless the run knows its model",
    )

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        view = self.view
        known = 1000 * view.flops_per_pair / view.flops_per_token
        self._per_token = (known or self.attention) / 1000
        self._age = 0.0
        self._score: dict[Block, float] = {}
        """Scores as of the last release."""

    def release(self, block: Block) -> None:
        cost = 1 + self._per_token * (block.depth + block.fill / 2)
        self._score[block] = self._age + (block.hits + 1) * cost
        super().release(block)

    def priority(self, block: Block) -> Score:
        return self._score[block]

    def worth(self, group: None, block: Block) -> Score:
        return self._score[block]

    def _leaf(self) -> Block | None:
        """Return the leaf with the lowest score."""
        heap = self._groups.get(None)
        entry = self._first(heap) if heap else None
        return None if entry is None else entry[2]

    def remove(self, block: Block) -> None:
        score = self._score.pop(block, None)
        if score is not None and block is self._leaf():
            self._age = score
        super().remove(block)

    def evict(self) -> Block | None:
        block = self._leaf() or next(iter(self.victims(1)), None)
        if block is not None:
            self.remove(block)
        return block

    def stats(self) -> dict[str, Any]:
        return {"age": self._age}
