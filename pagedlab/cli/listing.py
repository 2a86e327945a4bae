"""``pagedlab list``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pagedlab.cli.options import Json
from pagedlab.cli.output import print_json, print_table


def list_command(
    slot: Annotated[
        str | None, typer.Argument(help="One of the ten slots, e.g. eviction; all if left out.")
    ] = None,
    json: Json = False,
) -> None:
    """List the policies of every slot with their parameters."""
    from pagedlab.registry import list_policies

    rows = list_policies(slot)
    if json:
        print_json("list", rows)
        return
    table = [[r["slot"], r["name"], _one_line(r["summary"]), _parameters(r["params"])] for r in rows]
    print_table(["slot", "name", "what it does", "parameters"], table)


def _parameters(params: list[dict[str, Any]]) -> str:
    return "\n".join(f"{p['name']}={p['default']!r}: {p['help']}" for p in params)


def _one_line(text: str) -> str:
    return text.replace("``", "").replace("`", "")
