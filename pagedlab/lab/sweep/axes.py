"""What the name of an axis means, and what its values are called.

A name is looked for in this order:

``workload``
    Which of several named workloads, given as a mapping. Without this axis, all of them are served.
``rate``, ``scale_rate``
    How fast requests come: so many a second on average, or so many times as fast. A workload that is given as a
    function with a parameter of that name gets it.
``seed``
    A parameter of the workload's function. (Of a `run` whose workload has none: the configuration's.)
arguments of `simulate`, `run` or `replay`
    ``hardware``, ``model``, ``cost``, ``clock``, ``semantics``, ``block_size`` (of a replay), ...
fields of the configuration
    ``eviction``, ``num_blocks``, ..., and parameters of its policies: ``swap.min_hits``. A replay has ``eviction``, its
    parameters and ``num_blocks`` alone.
other parameters of the workload's function
    ``turns``, ``num_requests``, ...
fields of `SamplingParams`
    ``temperature``, ``n``, ...

``workload.max_tokens`` and ``config.seed`` say which is meant where this order does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from pagedlab import workloads
from pagedlab.config import Config
from pagedlab.engine.request import SamplingParams
from pagedlab.errors import ConfigError, nearest
from pagedlab.lab import session
from pagedlab.lab.accesses import Accesses, accesses, read_trace
from pagedlab.lab.grid import _label
from pagedlab.lab.job import as_workload
from pagedlab.lab.replay import replay
from pagedlab.lab.simulate import simulate
from pagedlab.lab.sweep.identity import plain
from pagedlab.lab.sweep.work import Source
from pagedlab.policies.base import Policy
from pagedlab.registry import SLOTS
from pagedlab.workloads import Workload
from pagedlab.workloads.loading import GENERATORS

FUNCTIONS: dict[str, Callable[..., Any]] = {"simulate": simulate, "run": session.run, "replay": replay}
RESERVED = ("error", "seconds", "how", "config", "options", "workload_digest", "pagedlab", "python", "point")
"""Columns that no axis and no measure can be called."""
RATES = ("rate", "scale_rate")
REPLAYED = ("eviction", "num_blocks")
"""What a replay reads of a configuration."""
_NOT_OPTIONS = ("config", "workload", "trace", "eviction", "progress", "sampling_overrides")
_CONFIG = tuple(f.name for f in fields(Config))
_SAMPLING = tuple(f.name for f in fields(SamplingParams))


class Axis(NamedTuple):
    """One axis."""

    place: str
    """Where its values go: ``workload`` (its title), ``variant`` (how it is made), ``config`` or ``option``."""
    parameter: str
    """Under which name."""
    values: dict[Any, Any]
    """By what they are called."""


def axis(name: str, given: Any, how: str, sources: Mapping[str, Source]) -> Axis:
    """Return the axis ``name``; `ConfigError` with the nearest names if nothing is called so."""
    place, parameter = _place(name, how, sources)
    values = _values(name, given)
    if place == "workload":
        for title in values:
            if title not in sources:
                known = ", ".join(sources)
                raise ConfigError(f"no workload {title!r}; given: {known}{nearest(str(title), sources)}")
    return Axis(place, parameter, values)


def check_options(options: Mapping[str, Any], how: str, axes: Mapping[str, Axis]) -> None:
    """Raise `ConfigError` for an option that the function does not take, or that is an axis too."""
    known = [*options_of(how), *(_SAMPLING if how != "replay" else ())]
    for name in options:
        if name not in known:
            takes = ", ".join(dict.fromkeys(known))
            raise ConfigError(f"{how} takes no {name!r}; it takes: {takes}{nearest(name, known)}")
        if any(a.parameter == name and a.place in ("option", "config") for a in axes.values()):
            raise ConfigError(f"{name} is given twice: as an axis, and for all points")


def options_of(how: str) -> list[str]:
    """Return the arguments of `simulate`, `run` or `replay` that a sweep may set."""
    mine = REPLAYED if how == "replay" else ()
    known = inspect.signature(FUNCTIONS[how]).parameters
    return [name for name in known if name not in (*_NOT_OPTIONS, *mine)]


def _place(name: str, how: str, sources: Mapping[str, Source]) -> tuple[str, str]:
    takes = {title: source.takes for title, source in sources.items()}
    everywhere = set.intersection(*map(set, takes.values()))
    options = options_of(how)
    head, dot, rest = str(name).partition(".")
    if name == "workload":
        return "workload", name
    if name in RESERVED:
        raise ConfigError(f"an axis cannot be called {name!r}, as a column is; write 'workload.{name}'")
    if dot and head == "workload":
        if rest in RATES or rest in everywhere:
            return "variant", rest
        raise ConfigError(_not_taken(rest, takes) + nearest(rest, (*everywhere, *RATES)))
    if name in RATES:
        return "variant", name
    if name == "seed" and (how != "run" or any(name in known for known in takes.values())):
        if name in everywhere:
            return "variant", name
        raise ConfigError(f"{_not_taken(name, takes)}; give a function, as in workload=pl.workloads.chat")
    forced = bool(dot) and head == "config"
    field = rest if forced else name
    slot = field.partition(".")[0]
    # A simulation's num_blocks is its configuration's, but for "fit".
    if forced or field == "num_blocks" or slot in SLOTS or (field in _CONFIG and field not in options):
        if how == "replay" and slot not in REPLAYED:
            raise ConfigError(
                f"a replay reads nothing but {' and '.join(REPLAYED)} of a configuration, so not {field!r}"
            )
        return "config", field
    if name in options:
        return "option", name
    if name in everywhere:
        return "variant", name
    if name in _SAMPLING and how != "replay":
        return "option", name
    known = ["workload", *RATES, *options, *(_CONFIG if how != "replay" else REPLAYED), *sorted(everywhere)]
    raise ConfigError(
        f"no axis {name!r}: {how} has no such argument, its configuration no such field and the workload no such "
        f"parameter{nearest(str(name), known if how == 'replay' else [*known, *_SAMPLING])}"
    )


def _not_taken(name: str, takes: Mapping[str, tuple[str, ...]]) -> str:
    title, known = next((title, known) for title, known in takes.items() if name not in known)
    if known:
        return f"workload {title!r} takes no {name!r}; it takes: {', '.join(known)}"
    return f"workload {title!r} is given as it is and takes no {name!r}"


def _values(name: str, given: Any) -> dict[Any, Any]:
    if isinstance(given, Mapping):
        pairs = [(k if isinstance(k, bool | int | float) else str(k), plain(v)) for k, v in given.items()]
    elif isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"{name} needs a list of values to go through, not {given!r}")
    else:
        values = [plain(v) for v in given]
        pairs = [(_called(v), v) for v in values]
    if not pairs:
        raise ConfigError(f"{name} needs a list of values to go through, and this one is empty")
    if {type(label) for label, _ in pairs} == {int, float}:
        pairs = [(float(label), value) for label, value in pairs]
    named: dict[Any, Any] = {}
    for label, value in pairs:
        if label in named:
            raise ConfigError(f"{name}: {label!r} comes twice; a mapping gives values names of their own")
        named[label] = value
    return named


def _called(value: Any) -> Any:
    """Return what stands in the table for a value: itself where it is data."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, type) and issubclass(value, Policy):
        return value.name or value.__name__
    if isinstance(value, FunctionType | type):
        return value.__name__
    return _label(value)


# ---- workloads -----------------------------------------------------------------------------------------------------


def sources_of(given: Any, how: str) -> dict[str, Source]:
    """Return the workloads that were given, by title: one of its own name, or several by the mapping's keys.

    Each is a workload, the name of one or of a file, a function that makes one, or anything else that `run` (or
    `replay`) takes. `ConfigError` or `WorkloadError` if it is none.
    """
    if isinstance(given, Mapping):
        if not given:
            raise ConfigError("there is no workload to serve")
        return {str(title): _source(one, how, str(title)) for title, one in given.items()}
    source = _source(given, how, None)
    return {source.title: source}


def _source(given: Any, how: str, title: str | None) -> Source:
    if isinstance(given, str) and given in GENERATORS:
        title, given = title or given, GENERATORS[given]
    if callable(given):
        parameters = inspect.signature(given).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        called = getattr(getattr(given, "func", given), "__name__", type(given).__name__)
        return Source(
            title or called,
            given,
            tuple(p.name for p in named),
            {p.name: p.default for p in named if p.default is not p.empty},
        )
    if isinstance(given, str | Path):
        given = read_trace(given) if how == "replay" else workloads.load(given)
    if not isinstance(given, Workload | Accesses):
        given = accesses(given) if how == "replay" else as_workload(given)
    return Source(title or given.name, given)
