"""``pagedlab bench``."""

from __future__ import annotations

import os
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from pagedlab.cli.options import Json
from pagedlab.cli.output import json_object, print_json, print_table, save_figure, write_text
from pagedlab.errors import ConfigError, nearest

BENCHMARKS = ("engine", "cache", "kernel", "kernel-resources", "layouts", "replay", "simulate")


def bench(
    name: Annotated[
        str, typer.Argument(help="engine, cache, kernel, kernel-resources, layouts, replay or simulate.")
    ],
    json: Json = False,
    out: Annotated[
        str | None,
        typer.Option(help="Write the JSON object to this file; a picture beside it, if there is one."),
    ] = None,
) -> None:
    """Measure one part against what else there is, in one process, alternating."""
    if out is not None:
        _writable(out)
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark {name!r}; known: {', '.join(BENCHMARKS)}{nearest(name, BENCHMARKS)}")
    module = f"pagedlab.bench.{name.replace('-', '_')}"
    if find_spec(module) is None:
        raise ConfigError(f"benchmark {name!r} is not part of this installation")
    benchmark = import_module(module)
    start = time.perf_counter()
    rows = benchmark.main(json=json)
    more: dict[str, Any] = {"seconds": round(time.perf_counter() - start)}
    more |= {"settings": {k: v for k, v in os.environ.items() if k.startswith("PAGEDLAB_BENCH_")}}
    if hasattr(benchmark, "summary"):
        more["summary"] = benchmark.summary(rows)
    if out is not None:
        write_text(out, json_object(f"bench {name}", rows, **more) + "\n")
        if hasattr(benchmark, "draw"):
            save_figure(benchmark.draw(rows), str(Path(out).with_suffix(".png")))
    if json:
        print_json(f"bench {name}", rows, **more)
    elif rows:
        from pagedlab.lab import page

        headings = list(dict.fromkeys(key for row in rows for key in row))
        print_table(headings, [[page.number(row.get(key)) for key in headings] for row in rows])
        if summary := more.get("summary"):
            headings = list(summary[0])
            print_table(headings, [[page.number(row[key]) for key in headings] for row in summary])


def _writable(path: str) -> None:
    """Refuse a file that cannot be written, or is no JSON file, before minutes are spent on what goes there."""
    if Path(path).suffix != ".json":
        raise ConfigError(f"--out writes a file that ends in .json, not {path!r}")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"{path}: there is no such directory")
