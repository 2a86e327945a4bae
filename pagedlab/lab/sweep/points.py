"""Every combination of the axes' values, with what identifies it and what it serves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pagedlab.config import Config
from pagedlab.errors import ConfigError, PagedLabError
from pagedlab.lab.grid import with_values
from pagedlab.lab.sweep.axes import RATES, REPLAYED, RESERVED, Axis, axis, check_options, sources_of
from pagedlab.lab.sweep.identity import code_of, described, described_config, digest, of_workload
from pagedlab.lab.sweep.work import Job, Measure, Source, Variant, Work
from pagedlab.registry import SLOTS
from pagedlab.workloads import Workload


@dataclass(frozen=True)
class Point:
    """One combination of values."""

    at: dict[str, Any]
    """What its value is called on each axis."""
    id: str
    """Digest of everything that its numbers depend on."""
    job: int | None
    """Its number among the jobs; None if there is no such configuration."""
    error: str | None
    """What is wrong with the configuration."""
    facts: dict[str, Any]
    """Columns that are known beforehand."""

    def __str__(self) -> str:
        return " ".join(f"{name}={label}" for name, label in self.at.items()) or "the only point"


@dataclass(frozen=True)
class Grid:
    """All points of a sweep in order, and the work that they are."""

    axes: dict[str, list[Any]]
    """What the values of each axis are called."""
    points: list[Point]
    work: Work
    workloads: dict[str, str]
    """Digest of each workload that was given, by title; of a function, of its name."""


def lay_out(
    config: Config,
    axes: Mapping[str, Any],
    workload: Any,
    how: str,
    options: Mapping[str, Any],
    measures: Mapping[str, Measure],
    slo: dict[str, float] | None = None,
) -> Grid:
    """Return every combination of the axes' values, the last axis running fastest.

    Raises `ConfigError` for an axis or option that nobody takes, with the nearest names, for a value with which no
    combination makes a configuration, and for two points that are the same. A single combination that contradicts
    itself is a point with an error.
    """
    sources = sources_of(workload, how)
    if isinstance(workload, Mapping) and "workload" not in axes:
        axes = {**axes, "workload": list(sources)}
    laid = {name: axis(name, values, how, sources) for name, values in axes.items()}
    check_options(options, how, laid)
    for name in measures:
        if name in laid or name in RESERVED:
            raise ConfigError(f"a measure cannot be called {name!r}, as another column is")
    making = _Making(config, laid, sources, how, options, {"measures": measures, "slo": slo})
    points = [
        making.point(dict(zip(laid, at))) for at in itertools.product(*(a.values for a in laid.values()))
    ]
    _check(points, laid)
    work = Work(how, making.jobs, making.variants, measures, slo)
    return Grid({name: list(a.values) for name, a in laid.items()}, points, work, making.digests)


class _Made(NamedTuple):
    config: Config
    description: dict[str, Any]
    code: dict[str, str]


class _Making:
    """Points in the making. What many of them share is made once."""

    def __init__(
        self,
        config: Config,
        axes: dict[str, Axis],
        sources: dict[str, Source],
        how: str,
        options: Mapping[str, Any],
        counted: Mapping[str, Any],
    ) -> None:
        self.jobs: list[Job] = []
        self.variants: list[Variant] = []
        self.digests = {title: _identity(source) for title, source in sources.items()}
        self._base, self._axes, self._sources, self._how = config, axes, sources, how
        self._options = dict(options) if how == "replay" else {"events": False, **options}
        self._counted = {name: described(value) for name, value in counted.items()}
        self._read = REPLAYED if how == "replay" else tuple(config.describe())
        self._configs: dict[tuple[Any, ...], _Made | PagedLabError] = {}
        self._variants: dict[tuple[Any, ...], tuple[int, str]] = {}
        self._described: dict[int, Any] = {}

    def point(self, at: dict[str, Any]) -> Point:
        """Return the point of these labels."""
        options = dict(self._options)
        on: dict[str, list[str]] = {"config": [], "variant": [], "workload": []}
        for name, label in at.items():
            place, parameter, values = self._axes[name]
            fitted = parameter == "num_blocks" and values[label] == "fit" and self._how == "simulate"
            if place == "option" or fitted:
                options[parameter] = values[label]
            else:
                on[place].append(name)
        number, content = self._variant(at, on["workload"], on["variant"])
        variant = self.variants[number]
        made = self._config(at, on["config"])
        facts = {
            "workload": variant.source.title,
            "workload_digest": content,
            "seed": variant.seed,
            "options": {name: self._describe(value) for name, value in options.items()},
            "config": None,
        }
        known = {"how": self._how, "options": facts["options"], "workload": content, **self._counted}
        if isinstance(made, PagedLabError):
            error = " ".join(f"{type(made).__name__}: {made}".split())
            labels = {name: repr(label) for name, label in at.items()}
            return Point(at, digest(known | {"no configuration": labels}), None, error, facts)
        self.jobs.append(Job(made.config, options, number))
        facts["config"] = made.description
        if variant.seed is None:
            facts["seed"] = made.config.seed
        known |= {"config": made.description, "code": made.code}
        return Point(at, digest(known), len(self.jobs) - 1, None, facts)

    def _config(self, at: dict[str, Any], names: list[str]) -> _Made | PagedLabError:
        key = tuple(at[name] for name in names)
        if key not in self._configs:
            values = {self._axes[name].parameter: self._axes[name].values[at[name]] for name in names}
            try:
                config = with_values(self._base, values)
            except PagedLabError as error:
                self._configs[key] = error
            else:
                slots = [slot for slot in SLOTS if slot in self._read]
                self._configs[key] = _Made(
                    config, described_config(config, self._read), code_of(config, slots)
                )
        return self._configs[key]

    def _variant(self, at: dict[str, Any], titled: list[str], names: list[str]) -> tuple[int, str]:
        title = at[titled[0]] if titled else next(iter(self._sources))
        key = (title, *(at[name] for name in names))
        if key not in self._variants:
            source = self._sources[title]
            params = {self._axes[name].parameter: self._axes[name].values[at[name]] for name in names}
            rates = {p: params.pop(p) for p in RATES if p in params and p not in source.takes}
            variant = Variant(source, params, **rates)
            as_given = isinstance(source.given, Workload) and not rates
            content = self.digests[title] if as_given else of_workload(variant.make())
            self.variants.append(variant)
            self._variants[key] = len(self.variants) - 1, content
        return self._variants[key]

    def _describe(self, value: Any) -> Any:
        if id(value) not in self._described:  # all of them live longer than this
            self._described[id(value)] = described(value)
        return self._described[id(value)]


def _identity(source: Source) -> str:
    """Return what says whether a file is about the same workload."""
    if not callable(source.given):
        return of_workload(source.given)
    found = described(source.given)
    while isinstance(found.get("function"), dict):
        found = found["function"]
    return digest(found.get("function", found.get("type")))


def _check(points: list[Point], axes: Mapping[str, Axis]) -> None:
    """Raise `ConfigError` for two points that are the same, and for a value that never makes a configuration."""
    known: dict[str, Point] = {}
    for point in points:
        if point.id in known:
            raise ConfigError(f"two points are the same: {known[point.id]}, and {point}")
        known[point.id] = point
    possible = {(name, label) for p in points if p.job is not None for name, label in p.at.items()}
    for point in points:
        for name, label in point.at.items():
            if axes[name].place == "config" and (name, label) not in possible:
                raise ConfigError(str(point.error).partition(": ")[2])
