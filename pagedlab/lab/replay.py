"""`replay`: a trace's block accesses against one cache, for hit ratios and curves without an engine."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from pagedlab.cache.replay import ReplayView, plain, prefix
from pagedlab.costs import find_model
from pagedlab.costs.shape import ModelShape
from pagedlab.engine.clock import to_seconds
from pagedlab.errors import ConfigError, nearest
from pagedlab.lab import page
from pagedlab.lab.accesses import Accesses, TraceLike, accesses
from pagedlab.policies.eviction import Eviction
from pagedlab.registry import make

if TYPE_CHECKING:
    import pandas as pd

    from pagedlab.lab.plots import Figure

Semantics = Literal["prefix", "plain"]
TouchOrder = Literal["prefix_first", "tail_first"]
EvictionLike = str | Eviction
_BOUND_SHOWN = 1_000_000
"""Accesses up to which a notebook shows Belady's hit ratio unasked."""


# ---- results -------------------------------------------------------------------------------------------------------


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
        return _one(
            self.trace, "belady", make_eviction("belady"), self.num_blocks, self.semantics, self.touch_order
        )

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


# ---- doing it ------------------------------------------------------------------------------------------------------


@overload
def replay(
    trace: TraceLike,
    eviction: EvictionLike = ...,
    num_blocks: int = ...,
    *,
    semantics: Semantics = ...,
    touch_order: TouchOrder = ...,
    block_size: int | None = ...,
    model: str = ...,
    jobs: int | None = ...,
    progress: bool | None = ...,
) -> Replay: ...
@overload
def replay(
    trace: TraceLike,
    eviction: EvictionLike | Iterable[EvictionLike] | Mapping[str, EvictionLike],
    num_blocks: int | Iterable[int] = ...,
    *,
    semantics: Semantics = ...,
    touch_order: TouchOrder = ...,
    block_size: int | None = ...,
    model: str = ...,
    jobs: int | None = ...,
    progress: bool | None = ...,
) -> Replay | MissRatioCurve: ...
def replay(
    trace: TraceLike,
    eviction: EvictionLike | Iterable[EvictionLike] | Mapping[str, EvictionLike] = "lru",
    num_blocks: int | Iterable[int] = 5000,
    *,
    semantics: Semantics = "prefix",
    touch_order: TouchOrder = "prefix_first",
    block_size: int | None = None,
    model: str = "llama-3.1-8b",
    jobs: int | None = 1,
    progress: bool | None = None,
) -> Replay | MissRatioCurve:
    """Replay a trace's block accesses against a cache of ``num_blocks`` blocks and count hits.

    ``trace`` is a workload, its name or file, a list of requests or hashed prompts, or ids (see `accesses`).
    ``eviction`` is any policy of the slot, by name or as an object; several (a list, or a dict by title) or several
    sizes give a `MissRatioCurve`. ``semantics``: ``"prefix"`` counts as a serving engine does, ``"plain"`` as the
    literature on caches does (see `pagedlab.cache.replay`). ``touch_order`` is the order of a request's accesses for
    ``"plain"``; a prefix is always looked up from its first block and released tail first. ``model`` (of the catalogue)
    is whose work is saved, for policies that weigh it. ``jobs`` processes share the points of a curve (None: as many as
    there are cores). ``progress``: a bar; None shows one where somebody can see it. Ctrl-C keeps what there is.

    Only prompts count: traces do not say what was generated. Requests come one after the other, in the trace's order.

    >>> replay([1, 2, 3, 1, 2, 3], "lru", 2).hits, replay([1, 2, 3, 1, 2, 3], "belady", 2).hits
    (0, 2)
    """
    _check_choice("semantics", semantics, get_args(Semantics))
    _check_choice("touch_order", touch_order, get_args(TouchOrder))
    if semantics == "prefix" and touch_order != "prefix_first":
        raise ConfigError(
            f'touch_order={touch_order!r} is for semantics="plain"; a prefix is looked up from its first block '
            "and released tail first"
        )
    single = isinstance(eviction, str | Eviction) and not isinstance(num_blocks, Iterable)
    named = _policies(eviction)
    sizes = list(dict.fromkeys(map(_size, num_blocks if isinstance(num_blocks, Iterable) else [num_blocks])))
    if not sizes:
        raise ConfigError("num_blocks is empty")
    wanted = accesses(trace, block_size)
    shape = find_model(model)
    if semantics == "prefix":
        wanted.check_distinct()
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise ConfigError(f"jobs must be a whole number of at least 1, or None for all cores, not {jobs!r}")
    bar = _bar(progress, wanted.total * len(named) * len(sizes))
    work = _Curve(wanted, named, sizes, semantics, touch_order, shape)
    try:
        if single:
            return work.serve(0, bar)
        return _all_points(work, jobs, bar)
    finally:
        if bar is not None:
            bar.close()


class _Curve:
    """The points of a curve as jobs: policies in the order given, each at every size."""

    def __init__(
        self,
        trace: Accesses,
        named: dict[str, Eviction],
        sizes: list[int],
        semantics: Semantics,
        touch_order: TouchOrder,
        shape: ModelShape,
    ) -> None:
        self.trace = trace
        self.named = named
        self.points = [(title, size) for title in named for size in sizes]
        self.semantics = semantics
        self.touch_order = touch_order
        self.shape = shape
        self.elsewhere = False
        """The points are for another process, which has the trace."""

    def policies(self) -> Iterable[Eviction]:
        """Return the policies."""
        return self.named.values()

    def serve(self, number: int, bar: Any = None) -> Replay:
        """Replay one point."""
        title, size = self.points[number]
        policy = self.named[title]
        done = _one(self.trace, title, policy, size, self.semantics, self.touch_order, bar, self.shape)
        if self.elsewhere:
            del done.trace
        return done


def _all_points(work: _Curve, jobs: int | None, bar: Any) -> MissRatioCurve:
    from pagedlab.lab.workers import Interrupts, cores, in_processes

    order = range(len(work.points))
    found: dict[int, Replay] = {}
    interrupted = False
    jobs = min(cores() if jobs is None else jobs, len(order))
    try:
        if jobs == 1:
            for number in order:
                found[number] = work.serve(number, bar)
                if found[number].interrupted:
                    del found[number]
                    raise KeyboardInterrupt
        else:
            work.elsewhere = True
            outcomes = in_processes(work, order, jobs)
            try:
                with Interrupts() as interrupts:
                    while True:
                        with interrupts.let_in():
                            number, done = next(outcomes, (-1, None))
                        if done is None:
                            break
                        done.trace = work.trace
                        found[number] = done
                        if bar is not None:
                            bar.update(done.accesses)
            finally:
                outcomes.close()
    except KeyboardInterrupt:
        if not found:
            raise
        interrupted = True
    return MissRatioCurve([found[number] for number in sorted(found)], interrupted=interrupted)


def make_eviction(policy: EvictionLike) -> Eviction:
    """Return the policy that a name stands for, or the object itself; `ConfigError` for anything else."""
    made = make("eviction", policy) if isinstance(policy, str) else policy
    if not isinstance(made, Eviction):
        hint = f"; pass an object: {made.__name__}()" if isinstance(made, type) else ""
        raise ConfigError(f"eviction must be a name or an eviction policy, not {made!r}{hint}")
    return made


def _policies(given: Any) -> dict[str, Eviction]:
    """Policies by title: name, or class; where two would have the same, with their parameters."""
    if isinstance(given, Mapping):
        named = {str(title): make_eviction(policy) for title, policy in given.items()}
    else:
        several = isinstance(given, Iterable) and not isinstance(given, str)
        made = [make_eviction(policy) for policy in (given if several else [given])]
        titles = [p.name or type(p).__name__ for p in made]
        titles = [repr(p) if titles.count(t) > 1 else t for t, p in zip(titles, made)]
        twice = sorted({t for t in titles if titles.count(t) > 1})
        if twice:
            raise ConfigError(f"eviction {twice[0]} comes twice; give titles: {{'first': …, 'second': …}}")
        named = dict(zip(titles, made))
    if not named:
        raise ConfigError("there is no eviction policy to replay")
    return named


def _one(
    trace: Accesses,
    title: str,
    configured: Eviction,
    num_blocks: int,
    semantics: Semantics,
    touch_order: TouchOrder,
    bar: Any = None,
    shape: ModelShape | None = None,
) -> Replay:
    """Replay a fresh clone of the policy; on Ctrl-C return what was counted until then."""
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


def _check_choice(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{what} must be {' or '.join(known)}, not {value!r}{nearest(str(value), known)}")


def _size(n: Any) -> int:
    try:
        size = operator.index(n)
    except TypeError:
        size = 0
    if size < 1 or isinstance(n, bool):
        raise ConfigError(f"num_blocks must be a whole number of at least 1, not {n!r}")
    return size


def _bar(progress: bool | None, total: int) -> Any:
    from pagedlab.lab.session import in_notebook

    notebook = in_notebook()
    if progress is False or (progress is None and not notebook and not sys.stderr.isatty()):
        return None
    module = import_module("tqdm.notebook" if notebook else "tqdm")
    return module.tqdm(total=total, unit=" accesses", unit_scale=True, leave=False, dynamic_ncols=True)
