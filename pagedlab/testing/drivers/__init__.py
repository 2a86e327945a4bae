"""What stands around a policy while it is checked: a module a slot that is driven alone, and one with the engine."""

from __future__ import annotations

from importlib import import_module

from pagedlab.errors import ConfigError
from pagedlab.testing.driver import Driver

_HOMES = {
    "allocator": "allocator:Pool",
    "eviction": "eviction:Tier",
    "lookup": "lookup:Index",
    "layout": "layout:Tables",
    "reservation": "engine:Serving",
    "swap": "engine:Serving",
    "preemption": "engine:Serving",
    "prefetch": "engine:Serving",
    "scheduler": "engine:Serving",
}


def driver_class(slot: str) -> type[Driver]:
    """Return the driver of a slot's policies; `ConfigError` for a slot whose policies have no state."""
    if slot not in _HOMES:
        raise ConfigError(f"policies of slot {slot!r} have no state to drive; drivers: {', '.join(_HOMES)}")
    module, _, name = _HOMES[slot].partition(":")
    found: type[Driver] = getattr(import_module(f"pagedlab.testing.drivers.{module}"), name)
    return found


def has_driver(slot: str) -> bool:
    """Whether policies of this slot have state that operations change."""
    return slot in _HOMES
