"""``pagedlab demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from pagedlab.cli.output import print_comparison


def demo(
    out: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Where to write the report.")
    ] = "report.html",
) -> None:
    """The quickstart without a browser: three ways to manage one small cache, compared, and a report."""
    from pagedlab import workloads
    from pagedlab.config import Config
    from pagedlab.lab.compare import compare as compare_configs

    small = Config(num_blocks=96, max_model_len=512)
    configs = {
        "contiguous (orca-max)": Config.preset("orca-max", num_blocks=96, max_model_len=512),
        "paged": small.replace(lookup="none"),
        "paged, prefixes shared": small.replace(lookup="radix"),
    }
    typer.echo(
        "64 turns of 16 conversations, served by a 2 M-parameter model from a cache of 96 blocks of 16 tokens.\n"
    )
    comparison = compare_configs(configs, workloads.chat(seed=0))
    print_comparison(comparison)
    if out is not None:
        comparison.to_html(out)
        typer.echo(f"report: {out}")
