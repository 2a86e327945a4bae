"""The engine as its eviction and preemption policies see it."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as ReadOnly
from itertools import islice

from pagedlab.costs.shape import ModelShape
from pagedlab.engine.sequence import Sequence
from pagedlab.events import EventLog
from pagedlab.policies.view import View


class EngineView(View):
    """The clock, the queue, and the model's shape; without a shape every token costs the same."""

    def __init__(
        self, events: EventLog, waiting: deque[Sequence], shape: ModelShape | None, block_size: int
    ) -> None:
        self._events, self._waiting, self._block_size = events, waiting, block_size
        if shape is not None:
            self.flops_per_token = float(shape.flops_per_token)
            self.flops_per_pair = float(shape.pair_flops)
            self.bytes_per_token = float(shape.kv_bytes_per_token)

    @property
    def now(self) -> int:
        """When the step at hand began, in picoseconds."""
        return self._events.time

    @property
    def queue_state(self) -> Hashable:
        """Length, head and tail: whoever comes or goes changes one of them."""
        queue = self._waiting
        return (len(queue), queue[0].seq_id, queue[-1].seq_id) if queue else None

    def coming(self, n: int) -> Iterator[ReadOnly[int]]:
        """For each of the next ``n`` waiting sequences: the keys of the blocks that it will look for."""
        for seq in islice(self._waiting, n):
            full = (seq.num_tokens - 1) // self._block_size
            yield seq.table.prefix.keys(full)[:full]
