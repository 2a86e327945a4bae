"""A yardstick: the prefetcher that knows who comes next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

from pagedlab.errors import ConfigError
from pagedlab.policies.base import param
from pagedlab.policies.prefetch import Future, Load, Prefetch, Residency, Waiting, loads_of
from pagedlab.registry import register


@register("prefetch", "oracle")
class Oracle(Prefetch):
    """Yardstick: load the prefixes of the requests that arrive next, in the order in which they will come.

    It knows arrivals, not what serving them will do to the cache: it shows what predicting *who comes next* can give,
    and is no bound for every prefetcher. The waiting come first, then arrivals, ``depth`` in all; the blocks of
    one are not given up for those of another. A follower is known as soon as its predecessor has ended.
    O(depth · blocks of a prompt).

    Works where the whole workload is handed in: `run`, `simulate`, `compare`.
    """

    needs_future: ClassVar[bool] = True

    depth: int = param(8, low=1, unit="requests", help="how many requests to look ahead")
    evict: bool = param(True, help="take the place of cached blocks when none is free")

    def reset(self, *, future: Future | None = None) -> None:
        if future is None:
            raise ConfigError(f"prefetch {self.name or 'oracle'!r} needs the future, and was given none")
        self._future = future

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        coming = (arrival.sequence for arrival in self._future.coming(self.depth))
        wanted = [*islice(waiting, self.depth), *coming][: self.depth]
        return loads_of(wanted, residency, self.evict)
