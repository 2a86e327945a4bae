"""Eviction by time: how soon a class of requests comes back, and how long somebody asked for a block to be kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from math import exp, expm1, inf
from typing import Any, NamedTuple

from pagedlab.errors import ConfigError
from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Score
from pagedlab.policies.shelf.groups import PS_PER_SECOND, Grouped
from pagedlab.registry import register


class _Reuse:
    """What has been seen of the blocks of one class, with less weight the longer ago."""

    def __init__(self) -> None:
        self.uses = 0.0
        """Releases: occasions to come back."""
        self.reuses = 0.0
        self.waited = 0.0
        """Picoseconds that the reused blocks had waited, in all."""

    def fade(self) -> None:
        self.uses /= 2
        self.reuses /= 2
        self.waited /= 2

    def probability(self, age: float, life: float) -> float:
        """Return the chance of a reuse from now until the block will have waited ``life`` longer than ``age``."""
        if not self.reuses:
            return 0.0
        mean = max(1.0, self.waited / self.reuses)
        return min(1.0, self.reuses / self.uses) * exp(-age / mean) * -expm1(-life / mean)


@register("eviction", "workload-aware")
class WorkloadAware(Grouped):
    """Give up the block least likely to be reused, judged by its request class; among equals the oldest, then deepest.

    The time from release to reuse is taken as exponential, fitted for each class (`Block.request_class`) to what was
    observed. A block that has waited t is worth P(reused within its expected life) = share · (F(t + life) - F(t)):
    ``life`` is how long evicted blocks had waited on average, and ``share`` the part of its class's uses that another
    use followed. Reuse of a block that is already gone counts if it is among the last ``capacity`` evicted, or short
    waits alone would be seen. The paper adds the turn of the conversation to the class.

    Observations fade: they are halved every ``window`` releases. `victims` O(classes + n log cached), other operations
    O(log cached); memory for ``capacity`` evicted keys and ``max_classes`` classes (all further ones share one fit).

    Wang et al., KVCache Cache in the Wild, USENIX ATC 2025.
    """

    window: int = param(20_000, help="releases after which observations count half", low=1, unit="releases")
    max_classes: int = param(64, help="classes that are told apart", low=1, high=4096)

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._capacity = capacity
        self._classes: dict[Hashable, _Reuse] = {}
        self._gone: OrderedDict[Hashable, tuple[_Reuse, int]] = OrderedDict()
        """Keys of evicted blocks, with when they had been released."""
        self._life = inf

    def group(self, block: Block) -> _Reuse:
        name: Hashable = block.request_class
        if name not in self._classes and len(self._classes) >= self.max_classes:
            name = "all others"
        return self._classes.setdefault(name, _Reuse())

    def priority(self, block: Block) -> Score:
        return block.last_released, -block.depth

    def worth(self, group: _Reuse, block: Block) -> Score:
        age = max(0, self._now - block.last_released)
        return group.probability(age, self._life), block.last_released, -block.depth

    def release(self, block: Block) -> None:
        super().release(block)
        self.group(block).uses += 1
        if self._clock % self.window == 0:
            for reuse in self._classes.values():
                reuse.fade()

    def hit(self, block: Block) -> None:
        if block in self._released:
            self._reused(self.group(block), block.last_released)
        super().hit(block)

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        known = self._gone.pop(key, None)
        if known is not None and not readmitted:
            self._reused(*known)

    def _reused(self, reuse: _Reuse, since: int) -> None:
        reuse.reuses += 1
        reuse.waited += max(0, self.view.now - since)

    def remove(self, block: Block) -> None:
        if block in self._released:
            waited = float(max(0, self.view.now - block.last_released))
            self._life = waited if self._life == inf else 0.99 * self._life + 0.01 * waited
            self._gone[block.key] = self.group(block), block.last_released
            if len(self._gone) > self._capacity:
                self._gone.popitem(last=False)
        super().remove(block)

    def stats(self) -> dict[str, Any]:
        return {
            f"reuse of {name or 'no class'}": {
                "share": min(1.0, r.reuses / r.uses) if r.uses else 0.0,
                "mean wait (s)": r.waited / r.reuses / PS_PER_SECOND if r.reuses else None,
            }
            for name, r in self._classes.items()
        }


class Retention(NamedTuple):
    """For how long a block has which priority."""

    priority: int
    lasts: float
    """Picoseconds; infinite if for ever."""


@register("eviction", "ttl")
class TimeToLive(Grouped):
    """Give up the block of the lowest retention priority (0 to 100); among equals the one released longest ago.

    A priority lasts for a time from the block's last release and then falls to ``default``; one below that stays what
    it is. A request says its own (`Hints.retention_priority`, `Hints.retention_seconds`); for one that does not, the
    table by request class counts: ``classes="system=90, agent=80:30"`` keeps class "agent" at 80 for 30 seconds.

    In TensorRT-LLM a request gives priorities to ranges of its tokens, and one that has lapsed becomes the default even
    if it was lower.

    `victims` O(pairs of priority and duration + n log cached), other operations O(log cached).

    NVIDIA TensorRT-LLM, KvCacheRetentionConfig (2025).
    """

    default: int = param(35, help="priority of blocks for which nobody asked anything", low=0, high=100)
    classes: str = param(
        "", help="priorities by request class: 'name=priority' or 'name=priority:seconds', …"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._parse()

    def _parse(self) -> dict[str | None, Retention]:
        table: dict[str | None, Retention] = {}
        for item in filter(None, (part.strip() for part in self.classes.split(","))):
            name, _, value = item.rpartition("=")
            priority, _, seconds = value.partition(":")
            try:
                kept = Retention(int(priority), float(seconds) * PS_PER_SECOND if seconds else inf)
            except ValueError:
                kept = Retention(-1, -1)
            if not name or not 0 <= kept.priority <= 100 or not kept.lasts >= 0:
                raise ConfigError(
                    f"TimeToLive.classes: {item!r} should be 'class=priority' or 'class=priority:seconds', "
                    "with a priority from 0 to 100"
                )
            table[name.strip()] = kept
        return table

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._table = self._parse()
        self._plain = Retention(self.default, inf)

    def group(self, block: Block) -> Retention:
        asked = block.origin.retention_priority
        if asked is None:
            return self._table.get(block.request_class, self._plain)
        seconds = block.origin.retention_seconds
        return Retention(asked, inf if seconds is None else seconds * PS_PER_SECOND)

    def worth(self, group: Retention, block: Block) -> Score:
        lapsed = self._now - block.last_released >= group.lasts
        return float(min(group.priority, self.default) if lapsed else group.priority)
