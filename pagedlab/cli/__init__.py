"""The command line, ``pagedlab``.

Commands: list, generate, replay, compare, sweep, calibrate, check, bench, demo, lab, reproduce, data.

One module per command; none imports what it runs before it is called. What a person got wrong comes back as one line
on stderr and exit code 2.
"""

from pagedlab.cli import (
    bench,
    calibrate,
    check,
    compare,
    data,
    demo,
    generate,
    lab,
    listing,
    replay,
    reproduce,
    sweep,
)
from pagedlab.cli.root import app

# `pagedlab --help` names the commands in this order.
app.command("list")(listing.list_command)
app.command("generate")(generate.generate)
app.command("replay")(replay.replay)
app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("calibrate")(calibrate.calibrate)
app.command("check")(check.check)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)
app.command("lab", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(lab.lab)
app.add_typer(reproduce.app, name="reproduce")
app.add_typer(data.app, name="data")


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
