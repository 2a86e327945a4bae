"""LHD: the hits that a block can still hope for, per access that it stays."""

from __future__ import annotations

from typing import Any

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.shelf.sampled import Sampled
from pagedlab.registry import register

_BINS = 128
"""Ages that are told apart."""
_CLASSES = 8
"""Kinds of blocks that are told apart, by the age at which they were last hit."""
_KEPT = 0.9
"""What each period leaves of the counts before it."""


@register("eviction", "lhd")
class LHD(Sampled):
    """Least Hit Density: give up, among some drawn at random, the block with the fewest expected hits per access.

    For each age (accesses since the last use) and class (the age at that use) it counts hits and evictions, and once a
    ``period`` makes densities of them: hits at this age and later, divided by the accesses that blocks of this age
    went on to stay. Until the first period is over, old blocks of a poor class go first. O(samples) a victim, else
    O(1), amortized. Ages end at eight capacities. The paper draws 32.

    Beckmann, Chen, Cidon, LHD: improving cache hit rate by maximizing hit density, NSDI 2018.
    """

    period: float = param(
        4.0, low=0.1, high=1000.0, unit="capacities", help="accesses between two looks at the counts"
    )

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._accesses = 0
        self._grain = max(1, 8 * capacity // _BINS)
        self._due = self._period = max(1024, int(self.period * capacity))
        self._used: dict[Block, int] = {}
        """The access of the last use."""
        self._class: dict[Block, int] = {}
        self._hits = [[0.0] * _BINS for _ in range(_CLASSES)]
        self._evictions = [[0.0] * _BINS for _ in range(_CLASSES)]
        self._density = [[(kind + 1) / (age + 1) for age in range(_BINS)] for kind in range(_CLASSES)]

    def _age(self, block: Block) -> int:
        return min(_BINS - 1, (self._accesses - self._used[block]) // self._grain)

    def _access(self, block: Block) -> None:
        self._accesses += 1
        self._used[block] = self._accesses
        if self._accesses >= self._due:
            self._due += self._period
            self._learn()

    def _learn(self) -> None:
        for kind, density in enumerate(self._density):
            hits, evictions = self._hits[kind], self._evictions[kind]
            expected = stay = events = 0.0
            for age in range(_BINS - 1, -1, -1):
                expected += hits[age]
                events += hits[age] + evictions[age]
                stay += events
                if stay:
                    density[age] = expected / stay
            self._hits[kind] = [count * _KEPT for count in hits]
            self._evictions[kind] = [count * _KEPT for count in evictions]

    def insert(self, block: Block) -> None:
        self._access(block)
        self._class[block] = 0

    def hit(self, block: Block) -> None:
        self._take(block)
        age = self._age(block)
        self._hits[self._class[block]][age] += 1
        # Class 1 for ages near the end, then each half as old.
        self._class[block] = min(_CLASSES - 1, (_BINS - 1).bit_length() - age.bit_length() + 1)
        self._access(block)

    def worst(self, candidates: list[Block]) -> Block:
        now, grain, used, kinds, density = self._accesses, self._grain, self._used, self._class, self._density
        last = _BINS - 1
        worth = [
            density[kinds[b]][age if (age := (now - used[b]) // grain) < last else last] for b in candidates
        ]
        return candidates[worth.index(min(worth))]

    def remove(self, block: Block) -> None:
        super().remove(block)
        self._evictions[self._class.pop(block)][self._age(block)] += 1
        del self._used[block]

    def stats(self) -> dict[str, Any]:
        return {"accesses": self._accesses, "density": [round(density[0], 6) for density in self._density]}
