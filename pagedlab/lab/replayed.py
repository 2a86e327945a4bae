"""What replays find: `Replay`, one policy in a cache of one size, and `MissRatioCurve`, several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pagedlab.cache.replay import ReplayView, plain, prefix
from pagedlab.costs.shape import ModelShape
from pagedlab.engine.clock import to_seconds
from pagedlab.errors import ConfigError
from pagedlab.lab import page
from pagedlab.lab.accesses import Accesses
from pagedlab.policies.bounds import Belady
from pagedlab.policies.eviction import Eviction

if TYPE_CHECKING:
    import pandas as pd

    from pagedlab.lab.plots import Figure

Semantics = Literal["prefix", "plain"]
TouchOrder = Literal["prefix_first", "tail_first"]
_BOUND_SHOWN = 1_000_000
"""Accesses up to which a notebook shows Belady's hit ratio unasked."""


class Replay:
    """What one policy made of a trace in a cache of one size. Ratios are shares of all accesses."""

    def __init__(
        self,
        trace: Accesses,
        *,
        eviction: str,
        params: dict[str, Any],
        num_blocks: int,
        semantics: Semantics,
        touch_order: TouchOrder,
        request_hits: list[int],
        is_bound: bool,
        stats: dict[str, Any],
    ) -> None:
        self.trace = trace
        self.eviction = eviction
        """The policy's name or title."""
        self.params = params
        self.num_blocks = num_blocks
        self.semantics = semantics
        self.touch_order = touch_order
        self.request_hits = request_hits
        """Hits of each request, in the order of the trace."""
        self.is_bound = is_bound
        """The policy knew the future."""
        self.stats = stats
        """What the policy shows of its state at the end."""
        self.hits = sum(request_hits)
        self.accesses = sum(len(r.keys) for r in trace.requests[: len(request_hits)])

    @property
    def misses(self) -> int:
        """Accesses that found nothing, the first of each block among them."""
        return self.accesses - self.hits

    @property
    def hit_ratio(self) -> float:
        """Hits / accesses."""
        return self.hits / self.accesses

    @property
    def miss_ratio(self) -> float:
        """Misses / accesses."""
        return self.misses / self.accesses

    @property
    def interrupted(self) -> bool:
        """True if somebody stopped it; the numbers are those of the requests before."""
        return len(self.request_hits) < len(self.trace.requests)

    @cached_property
    def bound(self) -> Replay:
        """The same with `belady`: the least that a policy which stores every miss can miss, knowing the future.

        Holds for ``"plain"``; for ``"prefix"``, where ids are chained and every request fits the cache.
        """
        return replay_one(self.trace, "belady", Belady(), self.num_blocks, self.semantics, self.touch_order)

    @property
    def row(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "eviction": self.eviction,
            "num_blocks": self.num_blocks,
            "semantics": self.semantics,
            "touch_order": self.touch_order,
            "block_size": self.trace.block_size,
            "accesses": self.accesses,
            "hits": self.hits,
            "misses": self.misses,
            "hit_ratio": self.hit_ratio,
            "miss_ratio": self.miss_ratio,
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row, with the columns of a curve's frame."""
        import pandas as pd

        return pd.DataFrame([self.row])

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request: request_id, time (s), session, blocks wanted and found, hit_ratio.

        A stream of ids is counted in runs of 4,096 accesses, named after their first.
        """
        import pandas as pd

        wanted = self.trace.requests[: len(self.request_hits)]
        frame = pd.DataFrame(
            {
                "request_id": self.trace.request_ids[: len(wanted)],
                "time": [to_seconds(w.time) for w in wanted],
                "session": [w.origin.session for w in wanted],
                "blocks": [len(w.keys) for w in wanted],
                "hits": self.request_hits,
            }
        )
        frame["hit_ratio"] = frame["hits"] / frame["blocks"]
        return frame

    def __repr__(self) -> str:
        state = ", interrupted" if self.interrupted else ""
        return (
            f"<replay of {self.trace.name!r}: {self.eviction}, {self.num_blocks} blocks, "
            f"{100 * self.hit_ratio:.2f}% of {self.accesses} accesses hit{state}>"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("hits", f"{page.percent(self.hit_ratio)} of {self.accesses:,} accesses"),
            ("cache", f"{self.num_blocks:,} blocks, {self.eviction}"),
            ("counted", f"{self.semantics}, {self.touch_order.replace('_', ' ')}"),
            ("endless cache", page.percent(1 - self.trace.unique / self.trace.total)),
        ]
        if not self.interrupted and self.accesses <= _BOUND_SHOWN:
            rows.insert(1, ("Belady, who knows the future", page.percent(self.bound.hit_ratio)))
        state = " (interrupted)" if self.interrupted else ""
        return page.table(("", ""), rows, caption=f"replay of {self.trace.name}{state}")


def replay_one(
    trace: Accesses,
    title: str,
    configured: Eviction,
    num_blocks: int,
    semantics: Semantics,
    touch_order: TouchOrder,
    bar: Any = None,
    shape: ModelShape | None = None,
) -> Replay:
    """Replay a fresh clone of ``configured``; on Ctrl-C return what was counted until then.

    ``shape`` is whose work is saved, for policies that weigh it. ``bar`` is told how many accesses are done.
    """
    policy = configured.clone()
    if shape is not None:
        policy.attach(ReplayView(shape.flops_per_token, shape.pair_flops, shape.kv_bytes_per_token))
    tail_first = touch_order == "tail_first"
    more = {"future": trace.future(tail_first)} if policy.needs_future else {}
    policy.reset(capacity=num_blocks, **more)
    # Single ids have no prefix: a request of one block is what plain counts.
    if semantics == "plain" or not trace.requests[0].chained:
        parts = plain(trace.requests, policy, num_blocks, block_size=trace.block_size, tail_first=tail_first)
    else:
        parts = prefix(trace.requests, policy, num_blocks, block_size=trace.block_size)
    hits: list[int] = []
    try:
        for part in parts:
            if bar is not None:
                bar.update(sum(len(r.keys) for r in trace.requests[len(hits) : len(hits) + len(part)]))
            hits += part
    except KeyboardInterrupt:
        if not hits:
            raise
    return Replay(
        trace,
        eviction=title,
        params=policy.get_params(),
        num_blocks=num_blocks,
        semantics=semantics,
        touch_order=touch_order,
        request_hits=hits,
        is_bound=policy.needs_future,
        stats=policy.stats(),
    )


class MissRatioCurve:
    """Miss ratios of several policies, or sizes of the cache, on one trace; ``curve["lru", 5000]`` is one `Replay`."""

    def __init__(self, points: Sequence[Replay], *, interrupted: bool = False) -> None:
        self.points = list(points)
        self.interrupted = interrupted
        """True if somebody stopped it: the points are those that were finished."""

    @property
    def trace(self) -> Accesses:
        """The accesses that were replayed."""
        return self.points[0].trace

    def __getitem__(self, at: tuple[str, int]) -> Replay:
        for point in self.points:
            if (point.eviction, point.num_blocks) == at:
                return point
        raise KeyError(at)

    def __iter__(self) -> Iterator[Replay]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per policy and size, as plain data."""
        return [point.row for point in self.points]

    @property
    def policies(self) -> list[str]:
        """Names of the policies, in the order given."""
        return list(dict.fromkeys(point.eviction for point in self.points))

    @property
    def sizes(self) -> list[int]:
        """Blocks of the caches, in the order given."""
        return list(dict.fromkeys(point.num_blocks for point in self.points))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per policy and size: accesses, hits, misses and their ratios."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def distance(self, to: str = "belady") -> dict[tuple[str, int], float]:
        """Return what each point hits less than the policy ``to`` at its size, as a share of all accesses.

        Raises `ConfigError` if ``to`` is not on the curve.
        """
        best = {p.num_blocks: p.hit_ratio for p in self.points if p.eviction == to}
        if not best:
            raise ConfigError(f"{to!r} was not replayed; there are {', '.join(self.policies)}")
        return {
            (p.eviction, p.num_blocks): best[p.num_blocks] - p.hit_ratio
            for p in self.points
            if p.num_blocks in best
        }

    def ranked(self, to: str = "belady") -> list[str]:
        """Return the policies by their mean `distance`, nearest first."""
        distances: dict[str, list[float]] = {name: [] for name in self.policies}
        for (name, _), distance in self.distance(to).items():
            distances[name].append(distance)
        return sorted(self.policies, key=lambda name: sum(distances[name]) / max(1, len(distances[name])))

    def hits_table(self, to: str = "belady") -> tuple[list[str], list[list[str]]]:
        """Return headings and rows of text: hit ratios with the distance to ``to`` behind, in percent; best first."""
        distance = self.distance(to)
        cells = {
            (
                p.eviction,
                p.num_blocks,
            ): f"{100 * p.hit_ratio:.2f}  {-100 * distance[p.eviction, p.num_blocks] or 0:+.2f}"
            for p in self.points
            if (p.eviction, p.num_blocks) in distance
        }
        rows = [[name, *(cells.get((name, n), "–") for n in self.sizes)] for name in self.ranked(to)]
        return ["eviction", *(f"{n:,} blocks" for n in self.sizes)], rows

    def table(self, digits: int = 4) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows of text: miss ratios, a row per policy and a column per size."""
        ratio = {(p.eviction, p.num_blocks): f"{p.miss_ratio:.{digits}f}" for p in self.points}
        rows = [[name, *(ratio.get((name, n), "–") for n in self.sizes)] for name in self.policies]
        return ["eviction", *(f"{n:,} blocks" for n in self.sizes)], rows

    def plot(self) -> Figure:
        """Return the miss ratios over the size of the cache (log); bounds are dashed."""
        from pagedlab.lab.curves import of_miss_ratios

        return of_miss_ratios(self)

    def plot_distance(self, to: str = "belady") -> Figure:
        """Return how many points of hit ratio each policy misses of what ``to`` hits: rows policies, columns sizes."""
        from pagedlab.lab.curves import of_distances

        return of_distances(self, to)

    def __repr__(self) -> str:
        state = ", interrupted" if self.interrupted else ""
        return f"<miss ratios of {', '.join(self.policies)} at {len(self.sizes)} sizes{state}>"

    def _repr_html_(self) -> str:
        trace = self.trace
        state = " (interrupted)" if self.interrupted else ""
        caption = f"{trace.name}: share of {trace.total:,} block accesses missed{state}"
        headings, rows = self.table()
        return page.table(headings, rows, caption=caption)
