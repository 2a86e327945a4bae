"""``pagedlab data``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pagedlab.cli.options import Json
from pagedlab.cli.output import print_json, print_table

app = typer.Typer(help="Published traces: which are known, and fetching them.", no_args_is_help=True)


@app.command("list")
def list_(json: Json = False) -> None:
    """List the published traces: which are here, where, under which licence, and where they come from."""
    from pagedlab.workloads.data import list_data

    rows = list_data()
    if json:
        print_json("data list", rows)
        return
    headings = ["trace", "what it is", "size", "where", "licence", "source"]
    print_table(
        headings,
        [
            [
                r["name"],
                r["summary"],
                "—" if r["size"] is None else f"{r['size'] / 1e6:.1f} MB",
                r["where"] or (f"pagedlab data fetch {r['name']}" if r["fetch"] else "not here"),
                r["licence"],
                r["source"].removeprefix("https://"),
            ]
            for r in rows
        ],
    )


@app.command("fetch")
def fetch_(
    name: Annotated[str, typer.Argument(help="A trace of `pagedlab data list`.")],
    to: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to put it into [default: the download cache].")
    ] = None,
) -> None:
    """Fetch a trace from its authors' repository and check its SHA-256. What is there already is not fetched again."""
    from pagedlab.workloads.data import fetch

    path, fetched = fetch(name, to, progress=sys.stderr.isatty())
    typer.echo(f"{path}{'' if fetched else ' (was there)'}")
