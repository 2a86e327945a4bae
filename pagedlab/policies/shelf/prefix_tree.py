"""Eviction that respects the tree of prefixes: leaves first, and tails that nobody would miss in time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from typing import Any, cast

from pagedlab.policies.base import param
from pagedlab.policies.block import Block, Origin
from pagedlab.policies.bounds import refuse_future
from pagedlab.policies.eviction import Eviction, Score
from pagedlab.policies.shelf.groups import Grouped
from pagedlab.registry import make, register


@register("eviction", "leaf-first")
class LeafFirst(Eviction):
    """Give up what another policy would, but a block only after all cached blocks that continue it (SGLang).

    The order is the inner policy's, taken as far as it is needed: its first n victims, then twice as many, until n can
    go one after the other, each without cached children at its turn. Children are counted by key, so losing the last
    one unlocks the parent within the same call. Exact for every inner policy whose first victims stay the same when it
    is asked for more; any other is served legally. A protected child guards all before it; if that leaves too few, the
    inner order decides alone.

    O(1) an observation beside the inner policy's; a victim costs what the inner policy takes to name it and the blocks
    with children that it would have named before, at worst O(cached).

    Zheng et al., SGLang: Efficient Execution of Structured Language Model Programs, NeurIPS 2024.
    """

    inner: str = param("lru", help="name of the eviction policy whose order it is, with default parameters")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_future([self._make_inner()])

    def _make_inner(self) -> Eviction:
        return cast(Eviction, make("eviction", self.inner))

    def reset(self, *, capacity: int) -> None:
        self._inner = self._make_inner()
        self._inner.attach(self.view)
        self._inner.reset(capacity=capacity)
        self._children: dict[Hashable, int] = {}
        """Cached blocks by the key of their parent."""
        self._idle: set[Block] = set()

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        self._inner.miss(key, readmitted)

    def insert(self, block: Block) -> None:
        self._count(block, 1)
        self._inner.insert(block)

    def hit(self, block: Block) -> None:
        self._idle.discard(block)
        self._inner.hit(block)

    def begin(self, origin: Origin) -> None:
        self._inner.begin(origin)

    def release(self, block: Block) -> None:
        self._idle.add(block)
        self._inner.release(block)

    def remove(self, block: Block) -> None:
        self._idle.discard(block)
        self._count(block, -1)
        self._inner.remove(block)

    def hit_all(self, blocks: Sequence[Block]) -> None:
        self._idle.difference_update(blocks)
        self._inner.hit_all(blocks)

    def release_all(self, blocks: Sequence[Block]) -> None:
        self._idle.update(blocks)
        self._inner.release_all(blocks)

    def remove_all(self, blocks: Sequence[Block]) -> None:
        self._idle.difference_update(blocks)
        for block in blocks:
            self._count(block, -1)
        self._inner.remove_all(blocks)

    def _count(self, block: Block, more: int) -> None:
        parent = block.parent_key
        if parent is not None:
            left = self._children.get(parent, 0) + more
            if left > 0:
                self._children[parent] = left
            else:
                self._children.pop(parent, None)

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        free = len(self._idle) - len(self._idle.intersection(protected))
        if free < n:
            return []
        asked = n
        while True:
            order = self._inner.victims(asked, protected)
            chosen = self._leaves(order, n)
            if len(chosen) == n:
                return chosen
            if asked == free:
                taken = set(chosen)
                return (chosen + [block for block in order if block not in taken])[:n]
            asked = min(2 * asked, free)

    def _leaves(self, order: list[Block], n: int) -> list[Block]:
        """Return up to ``n`` blocks of ``order``, always the first one that has no children left."""
        children = self._children
        gone: Counter[Hashable] = Counter()
        waiting: dict[Hashable, int] = {}
        chosen: list[Block] = []
        for at, block in enumerate(order):
            if len(chosen) == n:
                break
            if children.get(block.key, 0) > gone[block.key]:
                waiting[block.key] = at
                continue
            here: Block | None = block
            # Whoever this unlocks stood earlier in the order and was only waiting, so it is next.
            while here is not None and len(chosen) < n:
                chosen.append(here)
                parent, here = here.parent_key, None
                gone[parent] += 1
                if parent in waiting and gone[parent] == children.get(parent, 0):
                    here = order[waiting.pop(parent)]
        return chosen

    def stats(self) -> dict[str, Any]:
        return {"blocks with children": len(self._children), **self._inner.stats()}


@register("eviction", "t-lru")
class TailOptimizedLRU(Grouped):
    """Give up first what the next turn can recompute in time (tail-optimised LRU); then the block released longest ago.

    A conversation of L tokens that lost everything from a block of depth d on has to compute L - d tokens and its next
    prompt. As long as that is at most ``threshold`` tokens, the time to first token stays within its target without the
    block. Where conversations share a block, the longest counts. L is known without sessions: a request releases its
    blocks tail first, so each tells its parent how far the conversation reached, and is judged at its release.

    The paper counts in tokens too. The next prompt is a parameter here; the target holds for a prefill that takes as
    long for each token. O(log cached) an operation; one number for every cached block.

    Zhang et al., Tail-Optimized Caching for LLM Inference, NeurIPS 2025.
    """

    threshold: int = param(2048, help="prefill within the TTFT target", low=0, unit="tokens")
    next_prompt: int = param(256, help="expected new tokens of the next turn", low=0, unit="tokens")

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._reach: dict[Hashable, int] = {}
        """Tokens of the longest conversation through each cached block."""

    def insert(self, block: Block) -> None:
        super().insert(block)
        self._reach[block.key] = block.depth + block.fill

    def release(self, block: Block) -> None:
        parent = block.parent_key
        if parent in self._reach:
            self._reach[parent] = max(self._reach[parent], self._reach.get(block.key, 0))
        super().release(block)

    def remove(self, block: Block) -> None:
        super().remove(block)
        self._reach.pop(block.key, None)

    def group(self, block: Block) -> bool:
        """Whether the next turn meets its target without the block."""
        return self._reach.get(block.key, 0) - block.depth + self.next_prompt <= self.threshold

    def worth(self, group: bool, block: Block) -> Score:
        return 0.0 if group else 1.0
