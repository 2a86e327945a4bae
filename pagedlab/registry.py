"""Names of policies: who answers to ``eviction="lru"``.

A policy class is registered under ``(slot, name)`` by the decorator `register`, by an entry point of an
installed package (group ``pagedlab.policies``, entry name ``slot.name``), or not at all: an object can always be
passed where a name can. Built-ins register themselves when their package is imported; entry points are loaded one
by one, when their name is first asked for.

Besides the ten decisions that a `Config` holds (`SLOTS`) there is slot ``cost``: a cost model is registered, made and
listed in the same way, but decides nothing, so no configuration has one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, TypeVar

from pagedlab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pagedlab.policies.base import Policy

SLOTS: tuple[str, ...] = (
    "allocator",
    "reservation",
    "lookup",
    "eviction",
    "swap",
    "preemption",
    "prefetch",
    "scheduler",
    "layout",
    "kernel",
)
"""The ten decisions, in the order of `Config`'s fields."""
ENTRY_POINT_GROUP = "pagedlab.policies"

_HOMES: dict[str, str] = {**dict.fromkeys(SLOTS, "pagedlab.policies"), "cost": "pagedlab.costs"}
"""Each slot's package, whose import registers the built-ins."""
_classes: dict[str, dict[str, type[Policy]]] = {slot: {} for slot in _HOMES}
_entry_points: dict[tuple[str, str], metadata.EntryPoint] | None = None

P = TypeVar("P", bound="type[Policy]")


def check_slot(slot: str) -> str:
    """Return ``slot``, or raise `ConfigError` naming those that exist: the ten and ``cost``."""
    if slot not in _HOMES:
        raise ConfigError(f"no slot {slot!r}; the slots are {', '.join(_HOMES)}{nearest(slot, _HOMES)}")
    return slot


def register(slot: str, name: str) -> Callable[[P], P]:
    """Class decorator: make a policy selectable by name. Registering a name again replaces it silently.

    >>> import pagedlab as pl
    >>> @pl.register("eviction", "biggest-depth-first")
    ... class DepthFirst(pl.policies.Eviction):
    ...     def priority(self, block):
    ...         return -block.depth
    >>> pl.make("eviction", "biggest-depth-first")
    DepthFirst()
    """
    check_slot(slot)

    def decorate(cls: P) -> P:
        declared = getattr(cls, "slot", None)
        if declared != slot:
            raise ConfigError(f"{cls.__name__} is a policy for slot {declared!r}, not {slot!r}")
        cls.name = name
        _classes[slot][name] = cls
        return cls

    return decorate


def _scan_entry_points() -> dict[tuple[str, str], metadata.EntryPoint]:
    global _entry_points
    if _entry_points is None:
        _entry_points = {}
        for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
            slot, _, name = point.name.partition(".")
            if slot in _HOMES and name:
                _entry_points[slot, name] = point
    return _entry_points


def lookup_class(slot: str, name: str) -> type[Policy]:
    """Return the class registered under ``(slot, name)``, or raise `ConfigError` with the nearest names."""
    check_slot(slot)
    import_module(_HOMES[slot])
    known = _classes[slot]
    if name not in known and (point := _scan_entry_points().get((slot, name))) is not None:
        register(slot, name)(point.load())
    if name not in known:
        names = policy_names(slot)
        raise ConfigError(f"no {slot} policy {name!r}; known: {', '.join(names)}{nearest(name, names)}")
    return known[name]


def policy_names(slot: str) -> list[str]:
    """Return every selectable name of a slot, built-in, registered and installed, in alphabetical order."""
    check_slot(slot)
    import_module(_HOMES[slot])
    return sorted(set(_classes[slot]) | {name for s, name in _scan_entry_points() if s == slot})


def is_registered(policy: Policy) -> bool:
    """True if ``policy``'s class is the one that its slot and name stand for."""
    return _classes[policy.slot].get(policy.name) is type(policy)


def make(slot: str, name: str, /, **params: Any) -> Policy:
    """Build a policy by name: ``make("eviction", "lru")``.

    Raises `ConfigError` for an unknown slot, name or parameter, and for a value outside its declared range.
    """
    return lookup_class(slot, name).from_params(params)


def list_policies(slot: str | None = None) -> list[dict[str, Any]]:
    """One row per policy: ``slot``, ``name``, ``summary`` (first docstring line) and ``params``.

    Without ``slot`` the ten decisions of a `Config`; ``list_policies("cost")`` lists the cost models.
    """
    slots = SLOTS if slot is None else (check_slot(slot),)
    rows = []
    for s in slots:
        for name in policy_names(s):
            cls = lookup_class(s, name)
            rows.append(
                {
                    "slot": s,
                    "name": name,
                    "summary": (cls.__doc__ or "").strip().split("\n")[0],
                    "params": [p.describe() for p in cls.params()],
                }
            )
    return rows
