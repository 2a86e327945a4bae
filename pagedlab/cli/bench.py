"""``pagedlab bench``."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import typer

from pagedlab.cli.options import Json
from pagedlab.cli.output import print_json, print_table
from pagedlab.errors import ConfigError, nearest

BENCHMARKS = ("engine", "cache", "kernel", "kernel-resources", "layouts", "replay", "simulate")


def bench(
    name: Annotated[
        str, typer.Argument(help="engine, cache, kernel, kernel-resources, layouts, replay or simulate.")
    ],
    json: Json = False,
) -> None:
    """Measure one part against what else there is, in one process, alternating."""
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark {name!r}; known: {', '.join(BENCHMARKS)}{nearest(name, BENCHMARKS)}")
    module = f"pagedlab.bench.{name.replace('-', '_')}"
    if find_spec(module) is None:
        raise ConfigError(f"benchmark {name!r} is not part of this installation")
    rows = import_module(module).main(json=json)
    if json:
        print_json(f"bench {name}", rows)
    elif rows:
        from pagedlab.lab import page

        headings = list(dict.fromkeys(key for row in rows for key in row))
        print_table(headings, [[page.number(row.get(key)) for key in headings] for row in rows])
