"""Requests that are known and have not arrived yet, by the time at which they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, merge
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedlab.engine.sequence import Group

NEVER = 1 << 100
"""Later than any time, in steps or in picoseconds."""

Entry = tuple[int, int, "Group"]
"""Time of arrival in picoseconds, number of the request, and the request."""


class Coming:
    """A queue of those that were added in order, as traces are, and a heap of the others. Ties go by number."""

    def __init__(self) -> None:
        self._queue: deque[Entry] = deque()
        self._heap: list[Entry] = []
        self.next = NEVER
        """When the first of them comes, in picoseconds; `NEVER` if there is none."""

    def __len__(self) -> int:
        return len(self._queue) + len(self._heap)

    def add(self, group: Group) -> None:
        """Expect ``group`` at its time of arrival. O(1) in order, else O(log n)."""
        entry = group.arrival, group.order, group
        if not self._queue or self._queue[-1] < entry:
            self._queue.append(entry)
        else:
            heappush(self._heap, entry)
        if group.arrival < self.next:
            self.next = group.arrival

    def pop(self) -> Group:
        """Take the first."""
        queue, heap = self._queue, self._heap
        group = (heappop(heap) if heap and not (queue and queue[0] < heap[0]) else queue.popleft())[2]
        self._look()
        return group

    def forget(self, group: Group) -> None:
        """Expect ``group`` no longer, if it was. O(n)."""
        self._queue = deque(entry for entry in self._queue if entry[2] is not group)
        self._heap = [entry for entry in self._heap if entry[2] is not group]
        heapify(self._heap)
        self._look()

    def _look(self) -> None:
        queue, heap = self._queue, self._heap
        self.next = queue[0][0] if queue else NEVER
        if heap and heap[0][0] < self.next:
            self.next = heap[0][0]

    def __iter__(self) -> Iterator[Group]:
        """Walk over them in order and leave them as they are. O(log n) each."""
        return (entry[2] for entry in merge(self._queue, _in_order(self._heap)))


def _in_order(heap: list[Entry]) -> Iterator[Entry]:
    """Walk over a heap in order and leave it as it is; each step O(log of those taken)."""
    front = [(heap[0], 0)] if heap else []
    while front:
        entry, at = heappop(front)
        yield entry
        for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
            heappush(front, (heap[child], child))
