"""Laws as test items of pytest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pagedlab.testing.law import checks_for
from pagedlab.testing.subject import Subject, find_policy


def parametrize_with_checks(
    policies: Iterable[Any], *, expected_failed_checks: Mapping[str, str] | None = None
) -> Any:
    """Decorator: one test for every law of every policy, with ids like ``lru-victims_are_resident``.

    ``policies`` are what `check_policy` takes. ``expected_failed_checks`` maps names of checks to reasons; these tests
    are marked as strict expected failures.

    >>> @parametrize_with_checks([Mine(), "eviction:lru"])
    ... def test_laws(policy, check):
    ...     check(policy)
    """
    import pytest

    expected = dict(expected_failed_checks or {})
    cases = []
    for given in policies:
        subject = Subject(find_policy(given))
        for check in checks_for(subject.slot):
            reason = expected.get(check.name)
            marks = () if reason is None else (pytest.mark.xfail(reason=reason, strict=True),)
            cases.append(pytest.param(subject.policy, check, marks=marks, id=f"{subject.title}-{check.name}"))
    return pytest.mark.parametrize(("policy", "check"), cases)
