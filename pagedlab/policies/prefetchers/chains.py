"""Prefetchers that follow chains: the block that continues a block, the prefix that follows a prefix."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from math import inf
from typing import ClassVar, NamedTuple

from pagedlab.policies.base import param
from pagedlab.policies.block import Block
from pagedlab.policies.prefetch import Load, Prefetch, Residency, Waiting
from pagedlab.registry import register


@register("prefetch", "next-block")
class NextBlock(Prefetch):
    """When a prefix is hit, load what continues its last block, then what continues that. O(degree · children).

    The children of a block are tried latest first, so of several continuations the one stored last comes up first.
    Sequential prefetching, one block ahead, as in Smith, Cache Memories, ACM Computing Surveys 14(3), 1982.
    """

    degree: int = param(4, low=1, unit="blocks", help="how many blocks to bring up after a hit")
    evict: bool = param(True, help="take the place of cached blocks when none is free")

    recent: ClassVar[int] = 64
    """Hits since the last plan that are remembered at most."""

    def reset(self) -> None:
        self._used: OrderedDict[Block, int] = OrderedDict()
        """The last block of each hit since the last plan, and its serial then."""
        self._planned: float | None = None
        """When a plan was made for these."""

    def _forget_before(self, now: float) -> None:
        if self._planned is not None and self._planned < now:
            self._used.clear()
            self._planned = None

    def used(self, sequence: Waiting, blocks: Sequence[Block]) -> None:
        self._forget_before(inf)
        if blocks:
            self._used[blocks[-1]] = blocks[-1].serial
            if len(self._used) > self.recent:
                self._used.popitem(last=False)

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        # Asked twice at one time it says the same twice.
        self._forget_before(self.now)
        self._planned = self.now
        found: dict[Block, Load] = {}
        for last, serial in self._used.items():
            if last.serial != serial:
                continue
            line = residency.children(last)
            start = len(found)
            for block in line:  # grows while it is walked
                if len(found) - start == self.degree:
                    break
                if block not in found:
                    found[block] = Load(block, evict=self.evict)
                    line += residency.children(block)
        return list(found.values())


class Chain(NamedTuple):
    """A prefix that was hit: the first ``num_blocks`` blocks of a sequence."""

    sequence: Waiting
    num_blocks: int


@register("prefetch", "markov")
class Markov(Prefetch):
    """Learn which prefix is hit after which, and load the likely successors of the one hit last.

    A prefix is named by its last block's key. For each, the table counts what was hit next, by any request or by one
    of the same session; up to ``lookahead`` requests later counts as well, as Mithril pairs what comes soon after and
    not only next. A successor is loaded if it came ``support`` times and in ``confidence`` of all cases. The tables
    forget what was hit longest ago. O(fanout + lookahead) a hit, O(fanout · blocks of a prefix) a plan.

    Yang et al., Mithril: Mining Sporadic Associations for Cache Prefetching, SoCC 2017.
    """

    capacity: int = param(4096, low=1, unit="prefixes", help="size of the table")
    fanout: int = param(8, low=1, unit="prefixes", help="successors remembered for each prefix")
    lookahead: int = param(
        1, low=1, unit="requests", help="how soon after it another prefix must be hit to count"
    )
    support: int = param(2, low=1, unit="times", help="how often a successor must have come")
    confidence: float = param(0.2, low=0.0, high=1.0, help="and in what share of the cases")
    within: str = param(
        "all", choices=("all", "session"), help="whose next request: anybody's, or the session's"
    )
    evict: bool = param(True, help="take the place of cached blocks when none is free")

    def reset(self) -> None:
        self._chains: OrderedDict[int, Chain] = OrderedDict()
        self._after: dict[int, Counter[int]] = {}
        self._times: Counter[int] = Counter()
        """How often each prefix was hit, and so how often something could follow."""
        self._recent: OrderedDict[str | None, list[int]] = OrderedDict()
        """The last prefixes hit, by session if ``within`` says so."""
        self._current: int | None = None

    def used(self, sequence: Waiting, blocks: Sequence[Block]) -> None:
        if not blocks or blocks[-1].key is None:
            return
        key = blocks[-1].key
        who = sequence.session if self.within == "session" else None
        recent = self._recent.setdefault(who, [])
        self._recent.move_to_end(who)
        for before in dict.fromkeys(recent):
            self._count(before, key)
        recent.append(key)
        del recent[: -self.lookahead]
        self._chains[key] = Chain(sequence, len(blocks))
        self._chains.move_to_end(key)
        self._times[key] += 1
        self._current = key
        self._forget()

    def _count(self, before: int, key: int) -> None:
        if before not in self._chains:
            return
        after = self._after.setdefault(before, Counter())
        if key not in after and len(after) == self.fanout:
            del after[min(after, key=after.__getitem__)]
        after[key] += 1

    def _forget(self) -> None:
        while len(self._chains) > self.capacity:
            old, _ = self._chains.popitem(last=False)
            self._after.pop(old, None)
            del self._times[old]
        while len(self._recent) > self.capacity:
            self._recent.popitem(last=False)

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        at, self._current = self._current, None
        if at is None:
            return []
        found: dict[int, Load] = {}
        times = self._times[at]
        for key, count in self._after.get(at, Counter[int]()).most_common():
            if count < self.support or count < self.confidence * times:
                break
            chain = self._chains.get(key)
            if chain is not None:
                for block in residency.prefix(chain.sequence)[: chain.num_blocks]:
                    if block.tier:
                        found.setdefault(block.serial, Load(block, evict=self.evict))
        return list(found.values())
