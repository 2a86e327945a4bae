"""Policies that draw a few released blocks at random and give up the worst of them.

Draws belong to removals: the n-th removal uses the n-th ones. So asking for victims uses up none, and several victims
are drawn as they would be one by one.
"""

from __future__ import annotations

from collections.abc import Collection
from random import Random as Generator
from typing import Any

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction
from pagedlab.registry import register

_AHEAD = 1024
"""Draws that are made at once."""


class Sampled(Eviction):
    """Keeps the released blocks in an array, from which one can draw and take out in O(1)."""

    seed: int = param(0, low=0, help="seed of the random draws")
    samples: int = param(16, low=1, high=256, unit="blocks", help="blocks that are drawn for each victim")

    def reset(self, *, capacity: int) -> None:
        self._random = Generator(self.seed)
        self._draws: list[float] = []
        self._drawn = 0
        self._array: list[Block] = []
        self._index: dict[Block, int] = {}
        """Where a released block is in the array."""

    def worst(self, candidates: list[Block]) -> Block:
        """Return which of these should go."""
        raise NotImplementedError

    def _take(self, block: Block) -> None:
        at = self._index.pop(block, None)
        if at is not None:
            last = self._array.pop()
            if last is not block:
                self._array[at] = last
                self._index[last] = at

    def hit(self, block: Block) -> None:
        self._take(block)

    def release(self, block: Block) -> None:
        self._index[block] = len(self._array)
        self._array.append(block)

    def remove(self, block: Block) -> None:
        self._take(block)
        self._drawn += self.samples
        if self._drawn >= _AHEAD:
            del self._draws[: self._drawn]
            self._drawn = 0

    def _sample(self, number: int) -> list[float]:
        """The draws for the ``number``-th removal from now on."""
        start = self._drawn + number * self.samples
        end = start + self.samples
        if len(self._draws) < end:
            random = self._random.random
            self._draws += [random() for _ in range(end + _AHEAD - len(self._draws))]
        return self._draws[start:end]

    def evict(self) -> Block | None:
        array = self._array
        if not array:
            return None
        size = len(array)
        block = self.worst([array[int(draw * size)] for draw in self._sample(0)])
        self.remove(block)
        return block

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        array, index = self._array, self._index
        left = len(array)
        if left - sum(block in index for block in set(protected)) < n:
            return []
        chosen: list[Block] = []
        swaps: list[tuple[int, Block]] = []
        try:
            for number in range(n):
                candidates = [array[int(draw * left)] for draw in self._sample(number)]
                if protected:
                    free = [block for block in candidates if block not in protected]
                    spot = index[candidates[0]]
                    while not free:
                        spot = (spot + 1) % left
                        free = [] if array[spot] in protected else [array[spot]]
                    candidates = free
                block = self.worst(candidates)
                chosen.append(block)
                # As if it were taken out: the last takes its place.
                left -= 1
                at, last = index[block], array[left]
                swaps.append((at, last))
                array[at], array[left] = last, block
                index[last], index[block] = at, left
        finally:
            for at, last in reversed(swaps):
                block = array[left]
                array[at], array[left] = block, last
                index[last], index[block] = left, at
                left += 1
        return chosen


@register("eviction", "random")
class Random(Sampled):
    """Give up any block, every released one with the same probability. O(1) an operation.

    The yardstick for policies that mean to know better.
    """

    samples: int = param(1, low=1, high=1, unit="blocks", help="a single draw decides")

    def worst(self, candidates: list[Block]) -> Block:
        return candidates[0]


@register("eviction", "hyperbolic")
class Hyperbolic(Sampled):
    """Give up the block with the fewest uses per access since it was stored, among some drawn at random.

    A new block is judged by its short life, an old one by its long one, and neither by when it was last used.
    O(samples) a victim, else O(1). The paper draws 64.

    Blankstein, Sen, Freedman, Hyperbolic caching: flexible caching for web applications, USENIX ATC 2017.
    """

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._accesses = 0
        self._since: dict[Block, int] = {}

    def insert(self, block: Block) -> None:
        self._accesses += 1
        self._since[block] = self._accesses

    def hit(self, block: Block) -> None:
        self._accesses += 1
        self._take(block)

    def worst(self, candidates: list[Block]) -> Block:
        now, since = self._accesses + 1, self._since
        rates = [(block.hits + 1) / (now - since[block]) for block in candidates]
        return candidates[rates.index(min(rates))]

    def remove(self, block: Block) -> None:
        super().remove(block)
        del self._since[block]

    def stats(self) -> dict[str, Any]:
        return {"accesses": self._accesses}
