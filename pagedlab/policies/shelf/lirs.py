"""LIRS: keeps what is used again soon, by the distance between two uses rather than by the time since the last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Any

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.shelf.parts import choose, first
from pagedlab.registry import register


@register("eviction", "lirs")
class LIRS(Eviction):
    """Low Inter-reference Recency Set: most blocks are LIR, whose last two uses lay close together; few are HIR.

    Stack S holds what was used more recently than the LIR block used longest ago; HIR blocks, and keys of those that
    are gone, are among it. What is used while in S becomes LIR, and the LIR block at the bottom becomes HIR. Victims
    come from the queue of HIR blocks, oldest first, and from the bottom of S if they do not suffice. O(1) an
    operation, amortized. S holds at most ``stack`` times the capacity, then the keys longest gone are forgotten.

    Blocks in use stand above S and go on top when they are released. New blocks are LIR only until there are enough.

    Jiang, Zhang, LIRS: an efficient low inter-reference recency set replacement policy, SIGMETRICS 2002.
    ``variant="libcachesim"``: a hit on an HIR block that is not in S also takes the front out of the queue, and the
    bottom of S becomes HIR, as if it had been a miss; the next new block is LIR in its place.
    """

    hir: float = param(0.01, low=0.0, high=1.0, help="share of the blocks for HIR blocks (at least one)")
    stack: float = param(2.0, low=1.0, high=16.0, unit="capacities", help="blocks and keys that S holds")
    variant: str = param(
        "paper", choices=("paper", "libcachesim"), help="what a hit on an HIR block outside S does"
    )

    def reset(self, *, capacity: int) -> None:
        self._capacity = capacity
        self._most_lir = capacity - min(capacity, max(1, int(capacity * self.hir)))
        self._limit = int(capacity * self.stack)
        self._stack: OrderedDict[Hashable, Block | None] = OrderedDict()
        """Keys of released blocks, bottom first, and of blocks that are gone (None)."""
        self._gone: OrderedDict[Hashable, None] = OrderedDict()
        """Keys in S without a block, longest gone first."""
        self._lir: set[Block] = set()
        self._hir: dict[Block, bool] = {}
        """HIR blocks, and whether they are released."""
        self._queue: OrderedDict[Block, None] = OrderedDict()
        self._returning: OrderedDict[Hashable, bool] = OrderedDict()
        """Keys of misses that were in S, and whether they count as a use."""
        self._filling = True
        self._doomed: Block | None = None
        """Taken out of the queue by a hit; the next to go."""

    def _prune(self) -> None:
        """Let a LIR block be at the bottom of S."""
        stack, lir = self._stack, self._lir
        while stack:
            key, block = next(iter(stack.items()))
            if block in lir:
                return
            del stack[key]
            if block is None:
                del self._gone[key]

    def _demote(self, most: int) -> None:
        """The LIR blocks at the bottom become HIR until there are no more than ``most`` LIR."""
        while len(self._lir) > most:
            self._prune()
            if not self._stack:
                return
            _, block = self._stack.popitem(last=False)
            assert block is not None
            self._lir.discard(block)
            self._hir[block] = True
            self._queue[block] = None
            self._prune()

    def _leave_a_key(self, key: Hashable) -> None:
        if key in self._stack:
            self._stack[key] = None
            self._gone[key] = None

    def _recall(self, key: Hashable, readmitted: bool = False) -> None:
        if key in self._gone:
            del self._gone[key], self._stack[key]
            self._returning[key] = not readmitted
            if len(self._returning) > self._limit:
                self._returning.popitem(last=False)

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        self._recall(key, readmitted)

    def insert(self, block: Block) -> None:
        self._recall(block.key)
        used = self._returning.pop(block.key, False)
        if used or (len(self._lir) < self._most_lir and (self._filling or self.variant == "libcachesim")):
            self._lir.add(block)
            self._demote(self._most_lir)
        else:
            self._hir[block] = False

    def hit(self, block: Block) -> None:
        if block is self._doomed:
            self._doomed = None
            self.insert(block)
        elif block in self._lir:
            self._stack.pop(block.key, None)
            self._prune()
        elif not self._hir[block] or block.key in self._stack:
            # It is in S, or in use and so above it.
            del self._hir[block]
            self._queue.pop(block, None)
            self._stack.pop(block.key, None)
            self._lir.add(block)
            self._demote(self._most_lir)
        else:
            self._hir[block] = False
            del self._queue[block]
            if self.variant == "libcachesim":
                self._hit_outside()

    def _hit_outside(self) -> None:
        if len(self._lir) + len(self._hir) >= self._capacity and self._queue:
            self._doomed, _ = self._queue.popitem(last=False)
            del self._hir[self._doomed]
            self._leave_a_key(self._doomed.key)
        self._demote(self._most_lir - 1)

    def release(self, block: Block) -> None:
        if block in self._hir:
            self._hir[block] = True
            self._queue[block] = None
        self._stack[block.key] = block
        self._demote(self._most_lir)
        while len(self._stack) > self._limit and self._gone:
            key, _ = self._gone.popitem(last=False)
            del self._stack[key]

    def remove(self, block: Block) -> None:
        if block is self._doomed:
            self._doomed = None
        elif block in self._lir:
            self._lir.discard(block)
            self._stack.pop(block.key, None)
            self._prune()
        else:
            del self._hir[block]
            self._queue.pop(block, None)
            self._leave_a_key(block.key)
        self._filling = not self._lir and not self._hir

    def evict(self) -> Block | None:
        block = self._doomed or first(self._queue)
        if block is None:
            block = next((b for b in self._stack.values() if b is not None and b in self._lir), None)
        if block is not None:
            LIRS.remove(self, block)
        return block

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        doomed = [] if self._doomed is None else [self._doomed]
        bottom = (b for b in self._stack.values() if b is not None and b in self._lir)
        return choose(n, protected, doomed, self._queue, bottom)

    def stats(self) -> dict[str, Any]:
        return {"LIR": len(self._lir), "HIR": len(self._hir), "S": len(self._stack), "gone": len(self._gone)}
