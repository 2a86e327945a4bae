"""The link from the host to the device, as far as a simulation's prefetching keeps it busy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from pagedlab.policies.block import Block


class Link:
    """Loads on their way, one after the other; what a step itself loads goes before them.

    A load has a place on a time line of the link's own, which stands still while the link does other work::

        ready at = place + shift          shift grows while the link is idle, or serves a step
    """

    def __init__(self, load_ps: Callable[[int, int], int]) -> None:
        self._load_ps = load_ps
        self._on_the_way: deque[tuple[int, Block]] = deque()
        self._places: dict[Block, int] = {}
        """The place of the last load into each block."""
        self._end = 0
        self._shift = 0

    def send(self, blocks: Sequence[Block], now: int, from_disk: int = 0) -> None:
        """Begin to load ``blocks``, so many of them from the disk, after all that are on their way."""
        self.settle(now)
        if not self._on_the_way:
            self._shift = now - self._end
        start, total = self._end, self._load_ps(len(blocks), from_disk)
        for i, block in enumerate(blocks, 1):
            place = start + total * i // len(blocks)
            self._on_the_way.append((place, block))
            self._places[block] = place
        self._end = start + total

    def serve(self, num_blocks: int, now: int) -> None:
        """A step loads so many blocks itself: what is on its way stands still meanwhile."""
        self.settle(now)
        if self._on_the_way:
            self._shift += self._load_ps(num_blocks, 0)

    def settle(self, now: int) -> None:
        """Take note of what has arrived by ``now``."""
        queue, until = self._on_the_way, now - self._shift
        while queue and queue[0][0] <= until:
            place, block = queue.popleft()
            if self._places[block] == place:
                del self._places[block]

    def under_way(self, now: int) -> int:
        """Return how many blocks are on their way."""
        self.settle(now)
        return len(self._on_the_way)

    def ready_at(self, block: Block) -> int | None:
        """Return when the load of ``block`` will be complete if no step comes between; None if none is on its way."""
        place = self._places.get(block)
        return None if place is None else place + self._shift

    @property
    def next_ready(self) -> int | None:
        """When the next load will be complete."""
        return self._on_the_way[0][0] + self._shift if self._on_the_way else None
