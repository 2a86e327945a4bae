"""A law's driver as a state machine of Hypothesis, for those who want to look for counterexamples at length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from pagedlab.errors import ConfigError, LawBroken
from pagedlab.policies.base import Policy
from pagedlab.testing.driver import TOP, Broke, Driver
from pagedlab.testing.drivers import driver_class
from pagedlab.testing.search import SIZES

_OPTIONS: dict[str, dict[str, Any]] = {
    "eviction": {"forget": True, "look": True},
    "allocator": {},
    "lookup": {},
}
"""Slots that have a machine, and what their drivers do besides the ordinary."""


def policy_machine(slot: str, factory: Callable[[], Policy]) -> type[RuleBasedStateMachine]:
    """Return a state machine whose rules are what the cache does with a policy of ``slot``.

    ``factory`` makes the policy for every run. A broken law, whichever it is, raises `LawBroken` with the story.

    >>> from pagedlab.policies import LRU
    >>> TestMine = policy_machine("eviction", LRU).TestCase  # pytest runs it
    """
    if slot not in _OPTIONS:
        raise ConfigError(f"slot {slot!r} has no machine; those with one: {', '.join(_OPTIONS)}")
    made = factory()
    if not isinstance(made, Policy) or made.slot != slot:
        raise ConfigError(f"the factory made {made!r}, which is no policy of slot {slot!r}")
    if getattr(made, "needs_future", False):
        raise ConfigError(
            f"{type(made).__name__} needs the future, which a machine does not know: use check_policy"
        )
    kind = driver_class(slot)

    def start(self: Any, size: int) -> None:
        self.driver = kind(factory(), size, **_OPTIONS[slot])

    def teardown(self: Any) -> None:
        if hasattr(self, "driver") and not self.driver.over:
            _guard(self.driver, "finish")

    namespace: dict[str, Any] = {
        "start": initialize(size=SIZES)(start),
        "teardown": teardown,
        "__doc__": f"{type(made).__name__} under everything that the cache may do with it.",
    }
    arguments = st.integers(0, TOP // len(kind.operations))
    for operation in dict.fromkeys(kind.operations):
        namespace[operation] = rule(argument=arguments)(_doing(operation))
    return type(f"{type(made).__name__}Machine", (RuleBasedStateMachine,), namespace)


def _doing(operation: str) -> Callable[[Any, int], None]:
    def do(self: Any, argument: int) -> None:
        _guard(self.driver, operation, argument)

    do.__name__ = operation
    return do


def _guard(driver: Driver, operation: str, *arguments: int) -> None:
    try:
        getattr(driver, operation)(*arguments)
    except Broke as broke:
        driver.over = True
        raise LawBroken(f"{broke.law}: {broke.story}") from None
