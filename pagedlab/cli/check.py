"""``pagedlab check``."""

from __future__ import annotations

from typing import Annotated

import typer

from pagedlab.cli.options import Json
from pagedlab.cli.output import print_json, printable
from pagedlab.errors import ConfigError


def check(
    policy: Annotated[
        str, typer.Argument(metavar="MODULE:CLASS", help="module:Class, path/to/file.py:Class or slot:name.")
    ],
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="LAW=REASON", help="A law that the policy is known to break. May be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Try every law of its slot on a policy. Exit code 1 and the shortest story of each law that it breaks."""
    from pagedlab.testing import check_policy

    expected = {}
    for text in expect or ():
        name, equals, reason = text.partition("=")
        if not equals or not reason.strip():
            raise ConfigError(f"--expect takes LAW=REASON, not {text!r}")
        expected[name.strip()] = reason.strip()
    table = check_policy(policy, expected_failed_checks=expected, on_fail=None)
    if json:
        print_json("check", table.to_dicts(), policy=table.policy, slot=table.slot, passed=table.passed)
    else:
        typer.echo(printable(str(table)))
    if not table.passed:
        raise typer.Exit(1)
