"""``pagedlab calibrate``."""

from __future__ import annotations

from typing import Annotated

import typer

from pagedlab.cli.options import (
    GENERATE_BLOCKS,
    BlockSize,
    Json,
    MaxNumSeqs,
    NumBlocks,
    Set,
    config_of,
    with_set,
)
from pagedlab.cli.output import print_json, write_text


def calibrate(
    workload: Annotated[str, typer.Argument(help="What to serve while steps are timed.")] = "mixed-lengths",
    against: Annotated[
        str, typer.Option(help="Another workload, to see how well the fit holds where it was not made.")
    ] = "shared-prefix",
    model: Annotated[
        str | None, typer.Option(help='"tiny", a model folder or a hub name [default: tiny].')
    ] = None,
    set_: Set = None,
    num_blocks: NumBlocks = None,
    block_size: BlockSize = None,
    max_num_seqs: MaxNumSeqs = None,
    requests: Annotated[int | None, typer.Option(help="Only the workloads' first N requests.")] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Serve both so often, by turns, for a machine that is not always as fast [default: 7].",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Write the cost model, for compare --cost.")
    ] = None,
    json: Json = False,
) -> None:
    """Fit a cost model to this machine's own engine, and try it on another workload."""
    from pagedlab import workloads
    from pagedlab.lab import page
    from pagedlab.lab.calibrate import ROUNDS, in_turn, report, try_on
    from pagedlab.lab.calibrate import calibrate as fit
    from pagedlab.lab.session import warm_up

    sizes = {"num_blocks": num_blocks, "block_size": block_size, "max_num_seqs": max_num_seqs}
    cfg = with_set(config_of(None, model=model, sizes=sizes, default_blocks=GENERATE_BLOCKS), set_)
    both = [workloads.load(name) for name in (workload, against)]
    if requests is not None:
        both = [given.head(requests) for given in both]
    warm_up(cfg, both[0])
    fitted_on, others = in_turn(cfg, both, rounds=ROUNDS if rounds is None else rounds)
    cost = fit(fitted_on)
    trial = try_on(cost, cfg, both[1], others)
    if out is not None:
        write_text(out, cost.to_json() + "\n")
    result = {
        "cost": cost.get_params(),
        "fitted_on": vars(report(cost, fitted_on)),
        "against": vars(report(cost, others)),
        "rounds": len(others),
        "mean_step_simulated": trial.simulated,
        "mean_step": trial.measured,
        "mean_step_error": trial.error,
        "mean_step_by_round": trial.by_run,
        "steps": trial.steps,
        "steps_simulated": trial.steps_simulated,
    }
    if json:
        print_json("calibrate", result)
        return
    typer.echo(str(cost))
    typer.echo(f"on {workload}: {report(cost, fitted_on)}")
    typer.echo(f"on {against}: {report(cost, others)}")
    lowest, highest = (page.seconds(pick(trial.by_run)) for pick in (min, max))
    typer.echo(
        f"{against} simulated: mean step {page.seconds(trial.simulated)}, measured {page.seconds(trial.measured)} "
        f"({trial.error:+.1%}; rounds from {lowest} to {highest})"
    )
    if out is not None:
        typer.echo(f"cost model: {out}")
