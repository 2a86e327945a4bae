"""``pagedlab reproduce``."""

from __future__ import annotations

from typing import Annotated

import typer

from pagedlab.cli.options import Json, NumBlocks
from pagedlab.cli.output import print_json, print_table, save_figure
from pagedlab.errors import ConfigError

app = typer.Typer(help="Published measurements, reproduced.", no_args_is_help=True)


@app.command("vllm-run")
def vllm_run(
    folder: Annotated[str, typer.Argument(help="The run: requests.jsonl, timeseries.csv, meta.json.")],
    workload: Annotated[
        str, typer.Option("--workload", help="Its requests with token ids: a file or a name.")
    ],
    model: Annotated[
        str | None, typer.Option(help="The catalogue's name for its model [default: the run's own].")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="The catalogue's name for its card [default: what the run says, or rtx-pro-6000]."),
    ] = None,
    fit_on: Annotated[
        int | None,
        typer.Option(help="Requests whose measurements the fit may read [default: 100; 20 with --from]."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="Another run, of any model and card: the fit starts from that run's own, moved by the catalogue.",
        ),
    ] = None,
    source_workload: Annotated[
        str | None, typer.Option("--from-workload", metavar="FILE", help="That run's requests.")
    ] = None,
    source_model: Annotated[
        str | None,
        typer.Option("--from-model", help="The catalogue's name for its model [default: its own]."),
    ] = None,
    source_hardware: Annotated[
        str | None,
        typer.Option("--from-hardware", help="The catalogue's name for its card [default: as above]."),
    ] = None,
    num_blocks: NumBlocks = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw running and waiting over the measured ones.")
    ] = None,
    json: Json = False,
) -> None:
    """Fit a cost model to the first requests of a real vLLM run, and simulate all of it.

    With --from and --from-workload the fit starts from what was fitted to another run, on another card or model, and
    needs fewer requests; --fit-on 0 then shows how far the catalogue alone carries it.
    """
    from pagedlab.lab.vllm_run import reproduce

    other = None
    if source is not None and source_workload is not None:
        other = reproduce(source, source_workload, model=source_model, hardware=source_hardware)
    elif any(given is not None for given in (source, source_workload, source_model, source_hardware)):
        raise ConfigError("--from and --from-workload belong together: another run, and its requests")
    done = reproduce(
        folder, workload, model=model, hardware=hardware, fit_on=fit_on, source=other, num_blocks=num_blocks
    )
    if plot is not None:
        save_figure(done.plot(), plot)
    if json:
        result = done.as_dict()
        if other is not None:
            result["from"] = other.as_dict()
        print_json("reproduce vllm-run", result, error=result["error"])
        return
    typer.echo(f"{done.run.model}, {len(done.run.requests)} requests: simulated against measured")
    if other is not None:
        typer.echo(
            f"starting from {other.run.model}, fitted on its first {other.fitted_on} requests, moved here"
        )
    print_table(*done.table())
    typer.echo(f"prefix hits: {done.hit_tokens:,} of {done.prompt_tokens:,} prompt tokens")
    typer.echo(
        f"fit on the first {done.fitted_on}: {done.fit.simulations} simulations in {done.fit.seconds:.1f} s; "
        f"one simulation of the run: {done.seconds:.2f} s"
    )
    if done.pool != "ample":
        config, ranks = done.served.config, len(done.served.engines)
        typer.echo(
            f"pool: {f'{ranks} x ' if ranks > 1 else ''}{config.num_blocks:,} blocks of {config.block_size} "
            f"({done.pool}), {done.served.preemptions} preemptions"
        )
    typer.echo(f"{done.fit.cost}")
