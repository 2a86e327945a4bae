"""Eviction that looks ahead: into the waiting queue, and into the steps of an agent's workflow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
from itertools import islice
from math import inf
from typing import NamedTuple

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction, Score
from pagedlab.policies.shelf.groups import Grouped
from pagedlab.registry import register

_NOT_ASKED = object()


@register("eviction", "queue-aware")
class QueueAware(Eviction):
    """Give up the block released longest ago that no waiting request will use; then the one wanted by the last in line.

    Looks at the first ``window`` requests of the queue. Of what one request wants its end goes first. Where nothing
    waits, as in a replay, this is LRU.

    The keys of the queue are gathered once for each of its states, O(blocks wanted); a victim passes over the cached
    blocks that are wanted and older than itself, all other operations are O(1). Memory for the keys in the window.

    Gao et al., Cost-Efficient Large Language Model Serving for Multi-turn Conversations with CachedAttention, USENIX
    ATC 2024.
    """

    window: int = param(32, help="waiting requests looked at", low=0, high=4096, unit="requests")

    def reset(self, *, capacity: int) -> None:
        self._order: OrderedDict[Block, None] = OrderedDict()
        self._wanted: dict[Hashable, tuple[int, int]] = {}
        """For each key wanted: the first request in line that wants it, and which of its blocks it is."""
        self._gathered: Hashable = _NOT_ASKED

    def hit(self, block: Block) -> None:
        self._order.pop(block, None)

    def release(self, block: Block) -> None:
        self._order[block] = None

    def remove(self, block: Block) -> None:
        self._order.pop(block, None)

    def _gather(self) -> dict[Hashable, tuple[int, int]]:
        state = self.view.queue_state
        if state != self._gathered:
            self._gathered = state
            wanted = self._wanted = dict[Hashable, tuple[int, int]]()
            if state is not None:
                for place, keys in enumerate(self.view.coming(self.window)):
                    for i, key in enumerate(keys):
                        wanted.setdefault(key, (place, i))
        return self._wanted

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        wanted = self._gather()
        later: list[Block] = []
        chosen = list(islice(self._unwanted(wanted, protected, later), n))
        if len(chosen) < n:
            later.sort(key=lambda block: wanted[block.key], reverse=True)
            chosen += later[: n - len(chosen)]
        return chosen if len(chosen) == n else []

    def _unwanted(
        self, wanted: dict[Hashable, tuple[int, int]], protected: Collection[Block], later: list[Block]
    ) -> Iterator[Block]:
        """Yield the free choices in the order of release, and put the others into ``later``."""
        for block in self._order:
            if block in protected:
                continue
            if block.key in wanted:
                later.append(block)
            else:
                yield block


class Step(NamedTuple):
    """Where in which workflow a block was stored, and when it is needed next, as far as somebody said."""

    session: str | None
    at: int
    next_at: int | None


@register("eviction", "kvflow")
class KVFlow(Grouped):
    """Give up the block whose agent has the most steps to its next execution; among equals the oldest.

    Assumed: a session is one workflow, and `Hints.agent_step` counts its steps, one agent at each. The request may say
    at which step its agent runs again (`Hints.next_step`); without, the agents take turns, and each runs again after
    ``cycle`` steps (1: every step builds on all before it). The session's current step is the latest for which
    a block was stored. A block of no workflow, or whose announced step has passed, is not expected back and goes first.
    A block that sessions share counts for the one that stored it.

    The paper derives the steps from the agents' graph and gives a shared node the least of its agents; it also brings
    up what runs next (slot `prefetch`).

    `victims` O(steps with cached blocks + n log cached), other operations O(log cached); a number for each session that
    has cached blocks.

    Pan et al., KVFlow: Efficient Prefix Caching for Accelerating LLM-Based Multi-Agent Workflows, NeurIPS 2025.
    """

    cycle: int = param(1, help="steps after which an agent has its turn again", low=1, unit="steps")

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._steps: dict[str | None, int] = {}
        """The current step of each session that has cached blocks."""
        self._blocks: dict[str | None, int] = {}

    def insert(self, block: Block) -> None:
        super().insert(block)
        session, step = block.session, block.origin.agent_step
        if step is not None:
            self._blocks[session] = self._blocks.get(session, 0) + 1
            self._steps[session] = max(step, self._steps.get(session, step))

    def remove(self, block: Block) -> None:
        super().remove(block)
        session = block.session
        if block.origin.agent_step is not None and session in self._blocks:
            self._blocks[session] -= 1
            if not self._blocks[session]:
                del self._blocks[session], self._steps[session]

    def group(self, block: Block) -> Step | None:
        at, next_at = block.origin.agent_step, block.origin.next_step
        if at is None:
            return None
        return Step(block.session, at % self.cycle if next_at is None else at, next_at)

    def worth(self, group: Step | None, block: Block) -> Score:
        return -inf if group is None else -self._steps_to_execution(group)

    def _steps_to_execution(self, step: Step) -> float:
        now = self._steps.get(step.session, step.at)
        if step.next_at is not None:
            return step.next_at - now if step.next_at > now else inf
        return self.cycle - (now - step.at) % self.cycle
