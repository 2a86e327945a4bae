"""Laws for anyone's policy: `check_policy`, checks for pytest, strategies for Hypothesis.

>>> import pagedlab as pl
>>> pl.check_policy("eviction:lru").passed
True

Needs hypothesis; nothing else of pagedlab does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedlab.testing import strategies as strategies
    from pagedlab.testing.check import LawWarning as LawWarning
    from pagedlab.testing.check import check_policy as check_policy
    from pagedlab.testing.collect import parametrize_with_checks as parametrize_with_checks
    from pagedlab.testing.law import Check as Check
    from pagedlab.testing.law import Skipped as Skipped
    from pagedlab.testing.law import checks_for as checks_for
    from pagedlab.testing.machine import policy_machine as policy_machine
    from pagedlab.testing.table import CheckTable as CheckTable
    from pagedlab.testing.table import Row as Row

_HOME = {
    "Check": "law",
    "CheckTable": "table",
    "LawWarning": "check",
    "Row": "table",
    "Skipped": "law",
    "check_policy": "check",
    "checks_for": "law",
    "parametrize_with_checks": "collect",
    "policy_machine": "machine",
}

__all__ = sorted([*_HOME, "strategies"])


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return import_module("pagedlab.testing.strategies")
    if name not in _HOME:
        raise AttributeError(f"module 'pagedlab.testing' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"pagedlab.testing.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
