"""``pagedlab replay``."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from pagedlab.cli.options import BlockSize, Json, whole_number
from pagedlab.cli.output import print_json, print_table, save_figure


def replay(
    trace: Annotated[
        str,
        typer.Argument(
            help="A trace file or the name of a workload; FILE.txt[.gz] with one id a line is a plain stream."
        ),
    ],
    eviction: Annotated[
        str, typer.Option(metavar="A,B,...", help="Eviction policies; belady is the bound.")
    ] = "lru,belady",
    num_blocks: Annotated[
        str, typer.Option(metavar="N,M,...", help="Sizes of the cache in blocks.")
    ] = "5000",
    semantics: Annotated[
        str, typer.Option(help="prefix: as a serving engine counts; plain: every access alone.")
    ] = "prefix",
    touch_order: Annotated[
        str, typer.Option(help="Order of a request's accesses for plain: prefix_first or tail_first.")
    ] = "prefix_first",
    block_size: BlockSize = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the trace's first N requests.")] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Write the curve as a picture.")
    ] = None,
    json: Json = False,
) -> None:
    """Replay a trace's block accesses against one cache, without an engine: miss ratios per policy and size."""
    from pagedlab.lab import page
    from pagedlab.lab.accesses import read_trace
    from pagedlab.lab.replay import replay as replay_trace
    from pagedlab.lab.replayed import MissRatioCurve, Semantics, TouchOrder
    from pagedlab.workloads import Workload

    given: str | Workload | list[int] = trace
    if requests is not None:
        read = read_trace(trace)
        given = read.head(requests) if isinstance(read, Workload) else read[:requests]
    curve = replay_trace(
        given,
        [name.strip() for name in eviction.split(",")],
        [whole_number(n, "--num-blocks") for n in num_blocks.split(",")],
        semantics=cast("Semantics", semantics),
        touch_order=cast("TouchOrder", touch_order),
        block_size=block_size,
    )
    assert isinstance(curve, MissRatioCurve)
    if plot is not None:
        save_figure(curve.plot(), plot)
    counted = curve.trace
    if json:
        print_json(
            "replay",
            curve.rows,
            trace=counted.name,
            semantics=semantics,
            touch_order=touch_order,
            block_size=counted.block_size,
            accesses=counted.total,
            unique=counted.unique,
            interrupted=curve.interrupted,
        )
        return
    typer.echo(f"{counted.name}: miss ratio of {counted.total:,} block accesses ({semantics})")
    print_table(*curve.table(digits=6))
    ever = page.percent(1 - counted.unique / counted.total)
    typer.echo(f"{counted.unique:,} different blocks: a cache without end would hit {ever} of the accesses.")
    if plot is not None:
        typer.echo(f"figure: {plot}")
    if curve.interrupted:
        typer.echo("Interrupted: these are the caches that were finished.")
