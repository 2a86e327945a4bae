"""Slot `eviction`: which unused cached block to give up.

The protocol, one observation per admission and block::

    miss(key) ──▶ insert(block) ─┐
                  hit(block)  ───┴─▶ in use ──release(block)──▶ may be a victim ──▶ remove(block)

`miss` tells of a block that a prompt wanted and nobody had (ghost lists learn here), `insert` that its
content is now cached, `hit` that an admission found it. From `insert` or `hit` until `release` a block is in
use and must not be named. `remove` says that it is gone, evicted or forgotten, whoever chose it. A finished
request releases its blocks tail first, so that children go before parents. Looking (`match`) is not using: it
is not reported. A failed admission reports nothing.

Two ways to write one:

* simple: give `priority(block)`, lowest goes first, ties in the order of release. The library keeps a heap;
  the score is read at release (set ``dynamic = True`` for one that changes with time: it is then read again for
  every candidate whenever a victim is needed, O(cached)).
* full: override the observations and `victims`. `evict`, `hit_all`, `release_all` and `remove_all` are short cuts for
  callers that count nanoseconds; who overrides a plain method gets short cuts that follow from it.

A policy that divides the tier among tenants says so by `partitioned`: it is then asked for whom the room is
(`victims_for`), and `limit` says how much one request can ever have.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count, islice, repeat
from typing import Any, ClassVar, Literal

from pagedlab.policies.base import Policy
from pagedlab.policies.block import Block, Origin
from pagedlab.policies.view import NOTHING_KNOWN, View
from pagedlab.registry import register

Score = float | tuple[float, ...]

_INSTANCES = count(1)
"""Numbers the policies whose marks must not be confused."""


class Eviction(Policy):
    """Contract, and the order that a `priority` implies."""

    slot: ClassVar[str] = "eviction"
    dynamic: ClassVar[bool] = False
    growth: ClassVar[Literal["constant", "log", "linear"]] = "log"
    """How the work of a call may grow with the number of cached blocks, amortised; `pagedlab.testing` measures it. With
    ``dynamic = True`` it is linear whatever is said here.
    """
    counts_hits: ClassVar[bool] = False
    """Says that a block that was hit often outlives one that never was, all else being equal."""
    needs_future: ClassVar[bool] = False
    """`reset` wants ``future``: the keys of all accesses to come, in the order in which `hit` and `miss` will tell of
    them. Only `replay` can give that; see `pagedlab.policies.bounds`.
    """

    _view = NOTHING_KNOWN

    @property
    def view(self) -> View:
        """The time, the queue and the costs, as far as this run knows them."""
        return self._view

    def attach(self, view: View) -> None:
        """See the world through ``view`` from the next `reset` on."""
        self._view = view

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # An inherited short cut knows nothing of the plain methods written below it.
        for short_cut, plain in _SHORT_CUTS.items():
            if _depth(cls, short_cut) > min(_depth(cls, method) for method in plain):
                setattr(cls, short_cut, getattr(Eviction, short_cut))

    def reset(self, *, capacity: int) -> None:
        """Start empty, for a tier of ``capacity`` blocks."""
        self._released: dict[Block, int] = {}
        self._heap: list[tuple[Score, int, Block]] = []
        self._front: list[tuple[Score, int, Block]] = []
        """What earlier looks took from the heap, lowest first: victims are looked for twice before they are gone."""
        self._clock = 0

    def priority(self, block: Block) -> Score:
        """Return the block's worth; the lowest is given up first."""
        raise NotImplementedError(f"{type(self).__name__} defines neither priority() nor victims()")

    def begin(self, origin: Origin) -> None:
        """The hits and misses that follow are those of one admission, of a request that comes from ``origin``."""

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        """A prompt wanted this content and it was not cached. ``readmitted``: asked before, then
        preempted.
        """

    def insert(self, block: Block) -> None:
        """The block's content is cached from now on; it is in use."""

    def hit(self, block: Block) -> None:
        """An admission uses the cached block; it is in use."""
        self._released.pop(block, None)

    def release(self, block: Block) -> None:
        """Nobody uses the block any more; it may be named as a victim. O(log cached)."""
        score = self.priority(block)
        self._clock = now = self._clock + 1
        self._released[block] = now
        heap = self._heap
        heappush(heap, (score, now, block))
        if len(heap) > 2 * len(self._released) + 64:
            self._tidy()

    def _tidy(self) -> None:
        """Drop the entries of blocks that have been used or removed since."""
        released = self._released
        self._heap[:] = [entry for entry in self._heap if released.get(entry[2]) == entry[1]]
        heapify(self._heap)

    def remove(self, block: Block) -> None:
        """The block's content is gone."""
        self._released.pop(block, None)

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        """Return ``n`` released blocks to give up, none of them protected; all or nothing (an empty list).

        Changes nothing that another call could see: `remove` follows for each block that was really given up.
        """
        # An entry counts as long as its block has not been used since: the number of the release says so.
        released, heap, front = self._released, self._heap, self._front
        if self.dynamic:
            front.clear()
            heap[:] = [(self.priority(block), at, block) for block, at in released.items()]
            heapify(heap)
        self._forget_the_past()
        chosen: list[Block] = []
        i = 0
        while len(chosen) < n:
            if i < len(front) and not (heap and heap[0] < front[i]):
                entry = front[i]
                if released.get(entry[2]) != entry[1]:
                    del front[i]
                    continue
            elif heap:
                entry = heappop(heap)
                if released.get(entry[2]) != entry[1]:
                    continue
                front.insert(i, entry)
            else:
                return []
            i += 1
            if entry[2] not in protected:
                chosen.append(entry[2])
        return chosen

    def _forget_the_past(self) -> None:
        """Drop what is at the head of the front and no longer counts."""
        released, front = self._released, self._front
        past = 0
        for entry in front:
            if released.get(entry[2]) == entry[1]:
                break
            past += 1
        del front[:past]

    @property
    def partitioned(self) -> bool:
        """Whether it matters for whom room is made; read after `reset`."""
        return False

    @property
    def reserves(self) -> bool:
        """Whether some blocks are out of reach for some requests whatever happens; `Config` asks before any `reset`."""
        return False

    def limit(self, origin: Origin) -> int:
        """Return how many blocks of the tier a request from ``origin`` can have if nothing else runs."""
        raise NotImplementedError(f"{type(self).__name__} is not partitioned")

    def obtainable(self, origin: Origin, protected: Collection[Block] = ()) -> int:
        """Return how many released blocks may be given up for ``origin``. Changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} is not partitioned")

    def victims_for(
        self, origin: Origin, n: int, free: int, protected: Collection[Block] = ()
    ) -> list[Block] | None:
        """Return what to give up before ``n`` blocks are taken for ``origin``, with ``free`` of them free now.

        It may be more than is needed (a share that is used up), but no more than `obtainable`; None if that is not
        enough. Changes nothing, like `victims`.
        """
        raise NotImplementedError(f"{type(self).__name__} is not partitioned")

    def evict(self) -> Block | None:
        """Name one victim and take it as removed: `victims` (1) and `remove` in one call. None if there is none."""
        chosen = self.victims(1)
        if not chosen:
            return None
        self.remove(chosen[0])
        return chosen[0]

    def hit_all(self, blocks: Sequence[Block]) -> None:
        """`hit` each of ``blocks``, in this order."""
        for block in blocks:
            self.hit(block)

    def release_all(self, blocks: Sequence[Block]) -> None:
        """`release` each of ``blocks``, in this order."""
        for block in blocks:
            self.release(block)

    def remove_all(self, blocks: Sequence[Block]) -> None:
        """`remove` each of ``blocks``."""
        for block in blocks:
            self.remove(block)

    def stats(self) -> dict[str, Any]:
        """Return what the policy wants shown of its inner state (sizes of its lists, say)."""
        return {}


_SHORT_CUTS = {
    "evict": ("victims", "remove"),
    "hit_all": ("hit",),
    "release_all": ("release",),
    "remove_all": ("remove",),
}
"""Methods that a policy may give to save calls, and the plain ones that they stand for."""


def _depth(cls: type, method: str) -> int:
    """How far up its bases ``cls`` finds ``method``; 0 for itself."""
    return next(i for i, base in enumerate(cls.__mro__) if method in vars(base))


@register("eviction", "lru")
class LRU(Eviction):
    """Give up the block released longest ago (vLLM). O(1) an operation, amortised.

    One list of releases, oldest first, and in step with it the marks that they gave their blocks. An entry counts as
    long as the block has that mark: a hit or removal wipes it off, the next release gives another. So the list grows
    at its end and is read from its head; what does not count any more is passed over there, and cleared out when the
    list is twice as long as the tier.
    """

    growth = "constant"

    def reset(self, *, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: list[Block] = []
        self._marks: list[int] = []
        self._head = 0
        """What comes before it is past."""
        self._mark = next(_INSTANCES) << 48
        """The last mark given; no other policy gives the same, and they rise as the list grows."""
        self._due = self._mark + capacity + 64
        """The mark at which it is time to look after the list."""
        self._named: list[Block] = []
        """The victims named last."""
        self._beyond = 0
        """Where the head will be when they are gone."""

    def hit(self, block: Block) -> None:
        block.mark = 0

    def release(self, block: Block) -> None:
        self._mark = block.mark = mark = self._mark + 1
        self._blocks.append(block)
        self._marks.append(mark)
        if mark > self._due:
            self._tidy()

    def remove(self, block: Block) -> None:
        block.mark = 0

    def _tidy(self) -> None:
        """Drop what is past, and, where that is not enough, all that does not count any more."""
        blocks, marks = self._blocks, self._marks
        del blocks[: self._head], marks[: self._head]
        self._head, self._named = 0, []
        if len(blocks) > 2 * self._capacity + 64:
            blocks[:] = [b for b, mark in zip(blocks, marks) if b.mark == mark]
            marks[:] = [b.mark for b in blocks]
        self._due = self._mark + self._capacity // 2 + 64

    def order(self) -> Iterator[Block]:
        """Yield the released blocks, the oldest first."""
        blocks, marks = self._blocks, self._marks
        return (blocks[i] for i in range(self._head, len(blocks)) if blocks[i].mark == marks[i])

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        blocks, marks = self._blocks, self._marks
        if protected:
            chosen = list(islice((b for b in self.order() if b not in protected), n))
            return chosen if len(chosen) == n else []
        at, length = self._head, len(blocks)
        while at < length and blocks[at].mark != marks[at]:
            at += 1
        self._head = at
        end = at + n
        chosen, given = blocks[at:end], marks[at:end]
        if [b.mark for b in chosen] != given:
            chosen = [b for b, mark in zip(chosen, given) if b.mark == mark]
        while len(chosen) < n:
            if end >= length:
                return []
            block = blocks[end]
            if block.mark == marks[end]:
                chosen.append(block)
            end += 1
        self._named, self._beyond = chosen[:], end
        return chosen

    def evict(self) -> Block | None:
        at, blocks, marks = self._head, self._blocks, self._marks
        while at < len(blocks):
            block = blocks[at]
            if block.mark == marks[at]:
                self._head = at + 1
                block.mark = 0
                return block
            at += 1
        self._head = at
        return None

    def hit_all(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.mark = 0

    def release_all(self, blocks: Sequence[Block]) -> None:
        n = len(blocks)
        self._mark = mark = self._mark + n
        for block in blocks:
            block.mark = mark
        self._blocks += blocks
        self._marks += repeat(mark, n)
        if mark > self._due:
            self._tidy()

    def remove_all(self, blocks: Sequence[Block]) -> None:
        if blocks == self._named:
            # Their marks stay: what gave them is past.
            self._head = self._beyond
            self._named = []
        else:
            for block in blocks:
                block.mark = 0


@register("eviction", "fifo")
class FIFO(Eviction):
    """Give up the block stored longest ago, however often it was used. O(1) an operation.

    One queue in the order of storing; a flag says who may go. A search for victims that meets blocks in use at the
    head takes them out of its way: they are older than the rest of the queue, so when they are released they wait
    before it, in a heap of their own. Each block is passed over once.
    """

    growth = "constant"

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._queue: OrderedDict[Block, bool] = OrderedDict()

    def priority(self, block: Block) -> Score:
        return block.born

    def insert(self, block: Block) -> None:
        self._queue[block] = False

    def hit(self, block: Block) -> None:
        if block in self._queue:
            self._queue[block] = False
        else:
            super().hit(block)

    def release(self, block: Block) -> None:
        if block in self._queue:
            self._queue[block] = True
        else:
            super().release(block)

    def remove(self, block: Block) -> None:
        if self._queue.pop(block, None) is None:
            super().remove(block)

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        queue = self._queue
        while queue and not queue[head := next(iter(queue))]:
            del queue[head]
        early = len(self._released) - len(self._released.keys() & protected)
        chosen = super().victims(min(n, early), protected)
        if len(chosen) < n:
            rest = (block for block, idle in queue.items() if idle and block not in protected)
            chosen += islice(rest, n - len(chosen))
        return chosen if len(chosen) == n else []

    def evict(self) -> Block | None:
        if not self._released and self._queue:
            block, idle = self._queue.popitem(last=False)
            if idle:
                return block
        return super().evict()


@register("eviction", "lfu")
class LFU(Eviction):
    """Give up the block with the fewest hits; among equals the one stored first. O(log cached)."""

    counts_hits: ClassVar[bool] = True

    def priority(self, block: Block) -> Score:
        return block.hits, block.born
