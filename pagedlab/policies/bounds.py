"""Bounds: what an eviction policy that knew the future would do. Yardsticks for `replay`; no engine can serve them.

The future is the list of keys of all accesses to come, handed to `reset`, in the order in which `hit` and `miss` will
tell of them. A class that wants it says ``needs_future = True``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import ClassVar

from pagedlab.errors import ConfigError, PolicyError
from pagedlab.policies.base import Policy
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction, Score
from pagedlab.registry import register


def refuse_future(policies: Iterable[Policy], *, knows_arrivals: bool = False) -> None:
    """Raise `ConfigError` if one of ``policies`` must know a future that is not known.

    ``knows_arrivals``: the whole workload was handed in, which is enough for a prefetcher. What blocks will be asked
    for, as bounds of eviction want it, depends on the run.
    """
    for policy in policies:
        if getattr(policy, "needs_future", False) and not (policy.slot == "prefetch" and knows_arrivals):
            raise ConfigError(_needs_future(policy))


def _needs_future(policy: Policy) -> str:
    title = policy.name or type(policy).__name__
    if policy.slot == "prefetch":
        return (
            f"prefetch {title!r} needs the future: run and simulate know it, which are handed the whole workload; "
            "an engine that takes requests as they come does not"
        )
    return (
        f"{policy.slot} {title!r} needs the future: use replay(trace, {policy.slot}={title!r}), which knows it; "
        "no run can"
    )


def next_uses(keys: Sequence[Hashable]) -> list[float]:
    """Return, for each access, the number of the next access to the same key; infinity if there is none.

    >>> next_uses("abca")
    [3, inf, inf, inf]
    """
    following: dict[Hashable, int] = {}
    uses: list[float] = [inf] * len(keys)
    for at in range(len(keys) - 1, -1, -1):
        key = keys[at]
        uses[at] = following.get(key, inf)
        following[key] = at
    return uses


@register("eviction", "belady")
class Belady(Eviction):
    """Bound: give up the block whose next use is farthest away. O(log cached).

    With ``semantics="plain"`` no policy that stores every miss can miss less. Among blocks that are never used again
    the one released first goes; the number of misses does not depend on it.

    Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5(2), 1966.
    """

    needs_future: ClassVar[bool] = True

    def reset(self, *, capacity: int, future: Sequence[Hashable] | None = None) -> None:
        if future is None:
            raise ConfigError(_needs_future(self))
        super().reset(capacity=capacity)
        self._future = future
        self._next_uses = next_uses(future)
        self._at = 0
        self._next_use: dict[Hashable, float] = {}

    def _see(self, key: Hashable) -> None:
        at = self._at
        if at == len(self._future) or self._future[at] != key:
            raise PolicyError(
                f"access {at} to {key!r} is not in the future that {self.name or 'belady'!r} was given"
            )
        self._next_use[key] = self._next_uses[at]
        self._at = at + 1

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        self._see(key)

    def hit(self, block: Block) -> None:
        super().hit(block)
        self._see(block.key)

    def priority(self, block: Block) -> Score:
        return -self._next_use[block.key]


@register("eviction", "belady-tree")
class BeladyTree(Belady):
    """Bound: as `belady`, but only among blocks without resident children, as a tree of prefixes is pruned.

    O(log cached). The rule gives way where it leaves too few: keys that are no chained hashes may form rings in which
    every block has a child, and a protected child would guard all before it.
    """

    def reset(self, *, capacity: int, future: Sequence[Hashable] | None = None) -> None:
        super().reset(capacity=capacity, future=future)
        self._resident: dict[Hashable, Block] = {}
        self._children: dict[Hashable, int] = {}
        """Resident blocks by the key of their parent, whether that is resident or not."""

    def insert(self, block: Block) -> None:
        self._resident[block.key] = block
        self._children[block.parent_key] = self._children.get(block.parent_key, 0) + 1

    def release(self, block: Block) -> None:
        self._clock += 1
        self._released[block] = self._clock
        if block.key not in self._children:
            heappush(self._heap, self._entry(block))

    def remove(self, block: Block) -> None:
        super().remove(block)
        del self._resident[block.key]
        siblings = self._children[block.parent_key] - 1
        if siblings:
            self._children[block.parent_key] = siblings
            return
        del self._children[block.parent_key]
        parent = self._resident.get(block.parent_key)
        if parent in self._released:
            heappush(self._heap, self._entry(parent))

    def _entry(self, block: Block) -> tuple[Score, int, Block]:
        return -self._next_use[block.key], self._released[block], block

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        released, heap, children = self._released, self._heap, self._children
        if len(heap) > 2 * len(released) + 64:
            heap[:] = [self._entry(block) for block in released if block.key not in children]
            heapify(heap)
        chosen: dict[Block, None] = {}
        gone: Counter[Hashable] = Counter()
        kept: list[tuple[Score, int, Block]] = []
        while heap and len(chosen) < n:
            entry = heappop(heap)
            block, parent_key = entry[2], entry[2].parent_key
            # An entry is stale once its block was used or got a child; losing the last child will make a new one.
            if (
                released.get(block) != entry[1]
                or block in chosen
                or children.get(block.key, 0) > gone[block.key]
            ):
                continue
            kept.append(entry)
            if block in protected:
                continue
            chosen[block] = None
            gone[parent_key] += 1
            parent = self._resident.get(parent_key)
            if parent in released and gone[parent_key] == children[parent_key]:
                heappush(heap, self._entry(parent))
        for entry in kept:
            heappush(heap, entry)
        if len(chosen) < n:
            rest = (
                self._entry(block) for block in released if block not in chosen and block not in protected
            )
            chosen.update((block, None) for _, _, block in sorted(rest)[: n - len(chosen)])
        return list(chosen) if len(chosen) == n else []
