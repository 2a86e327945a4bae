"""A law as a check: a name, a slot, one line that says what must hold, and a function that looks for a counterexample.

>>> from pagedlab.testing import checks_for
>>> [check.name for check in checks_for("swap")][:2]
['parameters_are_legal', 'parameters_round_trip']
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

from pagedlab.errors import ConfigError, nearest
from pagedlab.registry import SLOTS

if TYPE_CHECKING:
    from pagedlab.testing.subject import Subject

EVERY_SLOT = "policy"
"""Stands for all slots in the names of checks and modules."""


class Skipped(SkipTest):
    """The law says nothing about this policy, or cannot be tried here; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """One law. ``run`` returns if it holds, raises `LawBroken` with a counterexample, or `Skipped` with a reason."""

    name: str
    slot: str
    summary: str
    run: Callable[[Subject], None]

    def __call__(self, policy: Any) -> None:
        """Try the law on what `check_policy` takes, as a test: unittest and pytest know what `Skipped` means."""
        from pagedlab.testing.subject import Subject, find_policy

        self.run(Subject(find_policy(policy)))


_checks: dict[str, list[Check]] = {slot: [] for slot in (EVERY_SLOT, *SLOTS)}


@contextmanager
def _same_dice() -> Iterator[None]:
    """Laws seed everybody's random numbers and policies draw them; afterwards all go on as if nothing had been."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)


def law(slot: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Decorator: the function ``check_<slot>_<name>`` is a law of that slot, and its docstring says what must hold."""

    def decorate(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        name = function.__name__.removeprefix(f"check_{slot}_")
        summary = " ".join((function.__doc__ or "").split("\n\n")[0].split())

        def run(subject: Subject) -> None:
            with _same_dice():
                function(subject)

        _checks[slot].append(Check(name, slot, summary, run))
        return function

    return decorate


def checks_for(slot: str) -> list[Check]:
    """Return the checks of a slot in the order in which they run: those of every slot, then its own."""
    if slot not in SLOTS:
        raise ConfigError(
            f"no slot {slot!r} has laws; the slots are {', '.join(SLOTS)}{nearest(slot, SLOTS)}"
        )
    for name in (EVERY_SLOT, slot):
        import_module(f"pagedlab.testing.laws.{name}")
    return _checks[EVERY_SLOT] + _checks[slot]
