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
    listed,
    read_cost,
    service_level,
)
from pagedlab.cli.output import print_comparison, print_json, print_table
from pagedlab.errors import ConfigError


def compare(
    workload: Annotated[
        str, typer.Argument(help="A workload (chat, mixed-lengths, ...), a trace or its file.")
    ],
    how: Annotated[
        str,
        typer.Option(
            help="run: with a real model; simulate: with a cost model on a virtual clock; replay: eviction alone."
        ),
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

    generated = workload in {row["name"] for row in workloads.list_workloads()}
    seeded: dict[str, Any] = {"seed": seed} if generated else {}
    if how == "replay":
        strange: dict[str, Any] = {
            "--preset": preset,
            "--config": config,
            "--hardware": hardware,
            "--cost": cost,
            "--slo": slo,
        }
        strange |= {"--max-tokens": max_tokens, "--report": report}
        for option, value in strange.items():
            if value is not None:
                raise ConfigError(
                    f"{option} belongs to --how run or simulate: a replay has one cache and no times"
                )
        _replayed(workload, seeded, listed(set_), num_blocks, block_size, model, requests, json)
        return
    if how not in HOW:
        raise ConfigError(f"--how must be one of {', '.join((*HOW, 'replay'))}, not {how!r}")
    if how == "run" and (hardware or cost):
        raise ConfigError(f"--{'hardware' if hardware else 'cost'} belongs to --how simulate")
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


def _replayed(
    workload: str,
    seeded: dict[str, Any],
    axes: dict[str, list[Any]],
    num_blocks: int | None,
    block_size: int | None,
    model: str | None,
    requests: int | None,
    json: bool,
) -> None:
    """Eviction policies at several sizes on one trace, with the distance to Belady's."""
    from pagedlab import workloads
    from pagedlab.lab.accesses import read_trace
    from pagedlab.lab.replay import replay
    from pagedlab.lab.replayed import MissRatioCurve
    from pagedlab.workloads import Workload

    if unknown := [name for name in axes if name not in ("eviction", "num_blocks")]:
        raise ConfigError(f"--set {unknown[0]}: a replay goes through eviction and num_blocks")
    names = axes.get("eviction", ["lru"])
    sizes = axes.get("num_blocks", [5000 if num_blocks is None else num_blocks])
    given = workloads.load(workload, **seeded) if seeded else read_trace(workload)
    if requests is not None:
        given = given.head(requests) if isinstance(given, Workload) else given[:requests]
    curve = replay(
        given,
        [*names, *(() if "belady" in names else ("belady",))],
        sizes,
        block_size=block_size,
        model=model or "llama-3.1-8b",
        jobs=None,
    )
    assert isinstance(curve, MissRatioCurve)
    counted = curve.trace
    if json:
        distance = curve.distance() if any(p.eviction == "belady" for p in curve) else {}
        rows = [
            {**row, "distance_to_belady": distance.get((row["eviction"], row["num_blocks"]))}
            for row in curve.rows
        ]
        print_json("compare", rows, workload=counted.name, how="replay", interrupted=curve.interrupted)
        return
    typer.echo(
        f"{counted.name}: hit ratio of {counted.total:,} block accesses in percent, and how far from Belady's"
    )
    print_table(*(curve.hits_table() if "belady" in curve.policies else curve.table()))
    if curve.interrupted:
        typer.echo("Interrupted: these are the caches that were finished.")
