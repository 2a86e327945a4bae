"""`check_policy`: every law of a policy's slot, tried on that policy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from pagedlab.errors import ConfigError, LawBroken, nearest
from pagedlab.testing.law import Check, Skipped, checks_for
from pagedlab.testing.subject import Subject, find_policy
from pagedlab.testing.table import CheckTable, Row

ON_FAIL = ("raise", "warn", None)


class LawWarning(UserWarning):
    """A policy broke a law, and ``on_fail="warn"``."""


def check_policy(
    policy: Any,
    *,
    expected_failed_checks: Mapping[str, str] | None = None,
    on_fail: str | None = "raise",
) -> CheckTable:
    """Try every law of its slot on a policy, and return a table with a row for each.

    ``policy`` is an object, a class, ``"slot:name"`` or a name. ``expected_failed_checks`` maps names of checks to the
    reason why they fail; such a failure has the status "xfail", and one that passes is a failure. For any other failure
    ``on_fail`` says what happens once all are tried: ``"raise"`` raises `LawBroken`, ``"warn"`` warns, None does
    nothing. The detail of a failure is the shortest story found that breaks the law. Takes a second or so; more
    with a Hypothesis profile of more examples.
    """
    if on_fail not in ON_FAIL:
        raise ConfigError(f'on_fail must be "raise", "warn" or None, not {on_fail!r}')
    subject = Subject(find_policy(policy))
    checks = checks_for(subject.slot)
    expected = dict(expected_failed_checks or {})
    names = [check.name for check in checks]
    for name in expected:
        if name not in names:
            raise ConfigError(
                f"slot {subject.slot!r} has no check {name!r}; checks: {', '.join(names)}{nearest(name, names)}"
            )
    table = CheckTable(
        subject.title, subject.slot, [try_law(check, subject, expected.get(check.name)) for check in checks]
    )
    if table.failed and on_fail is not None:
        stories = "\n".join(f"  {row.check}: {row.detail}" for row in table.failed)
        message = f"{subject.slot} policy {subject.title} breaks {len(table.failed)} of {len(table)} laws\n{stories}"
        if on_fail == "raise":
            raise LawBroken(message)
        warnings.warn(message, LawWarning, stacklevel=2)
    return table


def try_law(check: Check, subject: Subject, expected: str | None = None) -> Row:
    """Return what came of one law; ``expected`` is the reason why it is expected to fail."""
    try:
        check.run(subject)
    except LawBroken as broken:
        status, detail = ("failed", str(broken)) if expected is None else ("xfail", f"{expected}: {broken}")
        return Row(check.name, status, detail, check.summary)
    except Skipped as skipped:
        return Row(check.name, "skipped", str(skipped), check.summary)
    except Exception as error:
        # A policy may raise anywhere: also where no law expects it to be asked anything.
        return Row(check.name, "failed", f"{type(error).__name__}: {error}", check.summary)
    if expected is not None:
        return Row(check.name, "failed", f"expected to fail ({expected}), and it passed", check.summary)
    return Row(check.name, "passed", "", check.summary)
