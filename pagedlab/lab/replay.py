"""`replay`: a trace's block accesses against one cache, for hit ratios and curves without an engine."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, overload

from pagedlab.costs import find_model
from pagedlab.costs.shape import ModelShape
from pagedlab.errors import ConfigError, nearest
from pagedlab.lab.accesses import Accesses, TraceLike, accesses
from pagedlab.lab.bar import bar
from pagedlab.lab.replayed import MissRatioCurve, Replay, Semantics, TouchOrder, replay_one
from pagedlab.policies.eviction import Eviction
from pagedlab.registry import make

EvictionLike = str | Eviction


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
    watch = bar(progress, wanted.total * len(named) * len(sizes), " accesses", unit_scale=True)
    work = _Curve(wanted, named, sizes, semantics, touch_order, shape)
    try:
        if single:
            return work.serve(0, watch)
        return _all_points(work, jobs, watch)
    finally:
        if watch is not None:
            watch.close()


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

    def serve(self, number: int, watch: Any = None) -> Replay:
        """Replay one point."""
        title, size = self.points[number]
        policy = self.named[title]
        done = replay_one(
            self.trace, title, policy, size, self.semantics, self.touch_order, watch, self.shape
        )
        if self.elsewhere:
            del done.trace
        return done


def _all_points(work: _Curve, jobs: int | None, watch: Any) -> MissRatioCurve:
    from pagedlab.lab.workers import Interrupts, cores, in_processes

    order = range(len(work.points))
    found: dict[int, Replay] = {}
    interrupted = False
    jobs = min(cores() if jobs is None else jobs, len(order))
    try:
        if jobs == 1:
            for number in order:
                found[number] = work.serve(number, watch)
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
                        if watch is not None:
                            watch.update(done.accesses)
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
