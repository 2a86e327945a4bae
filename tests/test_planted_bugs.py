"""The tests are tested: each planted mistake is noticed by the check that the table names."""

from __future__ import annotations

import pytest
from planted_bugs import BUGS, CHECKS, Bug


@pytest.mark.parametrize("name", sorted({b.caught_by for b in BUGS}))
def test_the_check_passes_without_the_bug(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_is_caught(bug: Bug) -> None:
    with bug.planted(), pytest.raises(Exception) as caught:
        CHECKS[bug.caught_by]()
    assert not isinstance(caught.value, NameError | ImportError | SyntaxError), (
        "the planted code does not even run"
    )


def test_there_are_enough_and_all_differ() -> None:
    assert len(BUGS) >= 14
    assert (
        len({b.name for b in BUGS}) == len({(b.owner, b.attribute, b.old, b.new) for b in BUGS}) == len(BUGS)
    )
