"""W-TinyLFU: a small window for what is new, and a main cache into which only the more frequent get."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterator
from itertools import chain, islice
from typing import Any

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.shelf.parts import first
from pagedlab.policies.shelf.segmented import SLRU
from pagedlab.registry import register

_MASK = (1 << 64) - 1
_HALF = bytes(i >> 1 for i in range(256))


class Sketch:
    """How often keys were asked for, about: rows of ``width`` counters up to 15, halved after ``period`` additions.

    With ``conservative`` only the lowest of a key's counters rise, and a halving halves the number of additions too.
    """

    def __init__(self, width: int, rows: int, period: int, *, conservative: bool) -> None:
        self._width = width
        self._steps = [(row, row * width) for row in range(rows)]
        self._counters = bytearray(rows * width)
        self._period = period
        self._conservative = conservative
        self._added = 0

    def cells(self, key: Hashable) -> list[int]:
        """Return where a key is counted, one place in each row."""
        # SplitMix64, then two halves as start and stride: Kirsch, Mitzenmacher, Less hashing, same performance, 2006.
        mixed = hash(key) + 0x9E3779B97F4A7C15 & _MASK
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
        mixed ^= mixed >> 31
        start, stride, width = mixed & 0xFFFFFFFF, mixed >> 32, self._width
        return [(start + row * stride) % width + offset for row, offset in self._steps]

    def count(self, cells: list[int]) -> int:
        """Return the lowest of the key's counters."""
        counters = self._counters
        return min([counters[i] for i in cells])

    def add(self, cells: list[int]) -> None:
        """Count one."""
        counters = self._counters
        lowest = min([counters[i] for i in cells]) if self._conservative else 15
        for i in cells:
            if counters[i] <= lowest and counters[i] < 15:
                counters[i] += 1
        self._added += 1
        if self._added >= self._period:
            self._added = self._added // 2 if self._conservative else 0
            self._counters = counters.translate(_HALF)


@register("eviction", "w-tinylfu")
class WTinyLFU(Eviction):
    """New blocks pass through a small LRU window; its oldest then displaces the main SLRU's victim, or goes itself.

    It displaces it if it was asked for more often, as a sketch remembers of keys here and gone. Victims are the losers
    of such contests; where more go at once than the window holds, the rest comes from the main cache. O(rows of the
    sketch) an operation. The sketch has four rows of as many counters as there are blocks, and every use counts.

    Einziger, Friedman, Manes, TinyLFU: a highly efficient cache admission policy, ACM Transactions on Storage 13(4),
    2017. ``variant="libcachesim"`` comes near that simulator: a main SLRU of four equal segments, hits in the window
    not counted, and in place of the sketch a counting Bloom filter for 0.1% false positives, halved
    every 32 capacities.
    """

    window: float = param(0.01, low=0.0, high=1.0, help="share of the blocks for the window (at least one)")
    protected: float = param(0.8, low=0.0, high=1.0, help="share of the main cache for its protected segment")
    sample: float = param(
        10.0, low=1.0, high=1000.0, unit="capacities", help="uses after which counts are halved"
    )
    variant: str = param(
        "paper", choices=("paper", "libcachesim"), help="which uses count, and how counts age"
    )

    def reset(self, *, capacity: int) -> None:
        self._share = min(capacity, max(1, int(capacity * self.window)))
        self._room = capacity - self._share
        self._window: dict[Block, None] = {}
        """Released blocks of the window, LRU first."""
        self._new: set[Block] = set()
        """Blocks of the window, in use or not."""
        if self.variant == "paper":
            self._main = SLRU.from_params({"protected": self.protected})
            self._sketch = Sketch(max(16, capacity), 4, int(self.sample * capacity), conservative=True)
        else:
            self._main = SLRU.from_params({"segments": 4, "protected": 0.75, "variant": "libcachesim"})
            self._sketch = Sketch(max(16, int(1.44 * capacity)), 10, 32 * capacity, conservative=False)
        self._main.reset(capacity=self._room)
        self._cells: dict[Block, list[int]] = {}
        self._missed: dict[Hashable, list[int]] = {}
        """Cells of what was missed and will perhaps be inserted."""
        self._plan: list[tuple[Block, Block | None]] = []
        """Contests that `victims` held, the last first: who loses, and who wins a place."""

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        self._plan.clear()
        if not readmitted:
            cells = self._sketch.cells(key)
            self._sketch.add(cells)
            if len(self._missed) > self._room:
                self._missed.clear()
            self._missed[key] = cells

    def insert(self, block: Block) -> None:
        self._plan.clear()
        self._cells[block] = self._missed.pop(block.key, []) or self._sketch.cells(block.key)
        self._new.add(block)
        self._move_on()

    def hit(self, block: Block) -> None:
        self._plan.clear()
        if block not in self._new:
            self._main.hit(block)
        else:
            self._window.pop(block, None)
            if self.variant != "paper":
                return
        self._sketch.add(self._cells[block])

    def release(self, block: Block) -> None:
        self._plan.clear()
        if block in self._new:
            self._window[block] = None
            self._move_on()
        else:
            self._main.release(block)

    def _move_on(self) -> None:
        """While the main cache has room, what is too much in the window goes there."""
        while len(self._new) > self._share and self._window and len(self._main) < self._room:
            block = next(iter(self._window))
            self._main.insert(block)
            self._enter_main(block)

    def _promote(self, winner: Block) -> None:
        self._main.store(winner, 0)
        self._enter_main(winner)

    def _enter_main(self, block: Block) -> None:
        del self._window[block]
        self._new.discard(block)
        self._main.release(block)

    def _displaces(self, candidate: Block, victim: Block) -> bool:
        count, cells = self._sketch.count, self._cells
        return count(cells[candidate]) > count(cells[victim])

    def _contest(self) -> tuple[Block | None, Block | None]:
        """Return the next to go, and the block of the window that takes its place in the main cache."""
        candidate = next(iter(self._window), None)
        victim = next(filter(None, map(first, self._main.order())), None)
        if candidate is None or victim is None:
            return candidate or victim, None
        return (victim, candidate) if self._displaces(candidate, victim) else (candidate, None)

    def evict(self) -> Block | None:
        self._plan.clear()
        block, winner = self._contest()
        if winner is not None:
            self._promote(winner)
        if block is not None:
            self._forget(block)
        return block

    def _forget(self, block: Block) -> None:
        del self._cells[block]
        if block in self._new:
            self._new.discard(block)
            self._window.pop(block, None)
        else:
            self._main.remove(block)

    def remove(self, block: Block) -> None:
        if not self._plan or self._plan[-1][0] is not block:
            self._plan.clear()
            named, winner = self._contest()
            if block is not named:
                winner = None
        else:
            _, winner = self._plan.pop()
        if winner is not None:
            self._promote(winner)
        self._forget(block)

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        contests = list(islice(self._contests(protected), n))
        self._plan = [] if protected else contests[::-1]
        return [loser for loser, _ in contests] if len(contests) == n else []

    def _contests(self, protected: Collection[Block]) -> Iterator[tuple[Block, Block | None]]:
        """Who would lose contest after contest, and who would win, if protected blocks took no part."""
        lowest, *upper = ((b for b in queue if b not in protected) for queue in self._main.order())
        winners: deque[Block] = deque()

        def next_victim() -> Block | None:
            block = next(lowest, None)
            if block is None:
                block = winners.popleft() if winners else next(higher, None)
            return block

        higher = chain(*upper)
        victim = next_victim()
        for candidate in self._window:
            if candidate in protected:
                continue
            if victim is not None and self._displaces(candidate, victim):
                yield victim, candidate
                winners.append(candidate)
                victim = next_victim()
            else:
                yield candidate, None
        while victim is not None:
            yield victim, None
            victim = next_victim()

    def stats(self) -> dict[str, Any]:
        return {"window": len(self._new), "main": len(self._main)}
