"""``pagedlab sweep``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pagedlab.cli.options import Json, _assignment, _value, config_of, read_cost, service_level
from pagedlab.cli.output import print_json, print_table, printable, save_figure
from pagedlab.errors import ConfigError


def sweep(
    workload: Annotated[
        str, typer.Argument(help="A workload (chat, mixed-lengths, ...), a trace or its file.")
    ],
    how: Annotated[
        str,
        typer.Option(
            help="simulate: with a cost model on a virtual clock; run: with a real model; replay: the cache alone."
        ),
    ] = "simulate",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="AXIS=A,B,...",
            help="Values to go through: of the configuration (eviction, num_blocks), of the workload (rate, seed), of "
            "the simulation (hardware, model) or the replay (semantics). Every combination is a point. Repeatable.",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="PRESET|FILE", help="The configuration to vary.")
    ] = None,
    cost: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="To simulate: a cost model that calibrate wrote.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the workload's first N requests.")] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ttft=S|tpot=S", help="A service level in seconds: adds goodput. May be repeated."
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes [default: as many as cores; of run: 1].")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A .parquet or .json file to keep the rows in; what it has is not done again.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with what FILE has, or begin anew.")] = True,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw a measure over an axis.")] = None,
    measure: Annotated[
        str | None, typer.Option(help="The measure to draw [default: tokens_per_s; of replay: miss_ratio].")
    ] = None,
    json: Json = False,
) -> None:
    """Serve a workload under every combination of values, on all cores, and set the results side by side."""
    from pagedlab import workloads
    from pagedlab.lab.accesses import read_trace
    from pagedlab.lab.sweep import sweep as sweep_over
    from pagedlab.workloads import Workload

    axes: dict[str, list[Any]] = {}
    for name, text in map(_assignment, set_ or ()):
        if name in axes:
            raise ConfigError(f"--set {name} comes twice; write {name}=A,B")
        axes[name] = [_value(name, v) for v in text.split(",")]
    given: Any = workload
    if requests is not None:
        read = read_trace(workload) if how == "replay" else workloads.load(workload)
        given = read.head(requests) if isinstance(read, Workload) else read[:requests]
    options: dict[str, Any] = {}
    if cost is not None:
        options["cost"] = read_cost(cost)
    elif how == "simulate" and config is None and "num_blocks" not in axes:
        options["num_blocks"] = "fit"
    done = sweep_over(
        config_of(config, model=None, sizes={}),
        axes,
        given,
        how,
        jobs=jobs,
        path=out,
        resume=resume,
        slo=service_level(slo),
        **options,
    )
    if plot is not None:
        save_figure(done.plot(measure or ("miss_ratio" if how == "replay" else "tokens_per_s")), plot)
    if json:
        facts = {key: done.facts[key] for key in ("how", "axes", "workloads", "points", "interrupted")}
        print_json("sweep", done.rows, **facts)
        return
    headings, rows = done.table()
    print_table(headings, [[printable(cell) for cell in row] for row in rows])
    typer.echo(f"{', '.join(done.facts['workloads'])}, {how}: {done.verdict()}")
    if done.interrupted and out is not None:
        typer.echo("The same command goes on with the others.")
    for label, file in (("rows", out), ("figure", plot)):
        if file is not None:
            typer.echo(f"{label}: {file}")
