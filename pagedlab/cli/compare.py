"""``pagedlab compare``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pagedlab.cli.options import (
    BlockSize,
    Json,
    MaxModelLen,
    MaxNumSeqs,
    NumBlocks,
    grid,
    read_cost,
    service_level,
)
from pagedlab.cli.output import print_comparison, print_json
from pagedlab.errors import ConfigError


def compare(
    workload: Annotated[
        str, typer.Argument(help="A workload (chat, mixed-lengths, ...), a trace or its file.")
    ],
    how: Annotated[
        str, typer.Option(help="run: with a real model; simulate: with a cost model on a virtual clock.")
    ] = "run",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=A,B,...",
            help="Values to go through: every combination is run. May be repeated.",
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(metavar="A,B,...", help="Presets to go through.")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="PRESET|FILE", help="The configuration to vary.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help='"tiny", a model folder or a hub name [default: tiny]; to simulate, a name of the catalogue.'
        ),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="To simulate: a name of the catalogue (h100, l4, ...).")
    ] = None,
    cost: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="To simulate: a cost model that calibrate wrote.")
    ] = None,
    num_blocks: NumBlocks = None,
    block_size: BlockSize = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens computed in one step at most.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Only the workload's first N requests.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens per request at most [default: the workload's].")
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ttft=S|tpot=S",
            help="Service level in seconds, by which goodput is counted. May be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the workload.")] = 0,
    report: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Write a report that needs no other file.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a workload under several configurations and set the results side by side."""
    from pagedlab import workloads
    from pagedlab.lab.compare import HOW
    from pagedlab.lab.compare import compare as compare_configs

    if how not in HOW:
        raise ConfigError(f"--how must be one of {', '.join(HOW)}, not {how!r}")
    if how == "run" and (hardware or cost):
        raise ConfigError(f"--{'hardware' if hardware else 'cost'} belongs to --how simulate")
    generated = workload in {row["name"] for row in workloads.list_workloads()}
    seeded: dict[str, Any] = {"seed": seed} if generated else {}
    given = workloads.load(workload, **seeded)
    if requests is not None:
        given = given.head(requests)
    sizes = {
        "num_blocks": num_blocks,
        "block_size": block_size,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    options: dict[str, Any] = {"max_tokens": max_tokens}
    if how == "simulate":
        fit = (
            "fit" if num_blocks is None and not any(v.startswith("num_blocks=") for v in set_ or ()) else None
        )
        if cost is not None:
            fit = None  # a fitted cost model knows no memory
        options |= {
            "model": model,
            "hardware": hardware,
            "cost": None if cost is None else read_cost(cost),
            "num_blocks": fit,
            "events": False,
        }
    configs = grid(preset, config, model if how == "run" else None, sizes, set_)
    comparison = compare_configs(configs, given, how=how, slo=service_level(slo), **options)
    if report is not None:
        comparison.to_html(report)
    if json:
        print_json(
            "compare",
            comparison.rows,
            workload=given.name,
            how=how,
            same_output=comparison.same_output,
            interrupted=comparison.interrupted,
        )
        return
    print_comparison(comparison)
    if report is not None:
        typer.echo(f"report: {report}")
