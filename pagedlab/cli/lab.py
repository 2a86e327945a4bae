"""``pagedlab lab``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

import pagedlab
from pagedlab.errors import ConfigError


def lab(ctx: typer.Context) -> None:
    """Open JupyterLab on the notebooks; further arguments go to JupyterLab. Loopback only, with its token."""
    folder = notebooks_folder()
    command = lab_command(folder, ctx.args)
    raise typer.Exit(subprocess.call(command))


def notebooks_folder() -> Path:
    """Return the checkout's notebooks, or a copy of the packaged ones in the current folder."""
    package = Path(pagedlab.__file__).parent
    checkout = package.parent / "notebooks"
    if any(checkout.glob("*.ipynb")):
        return checkout
    target = Path.cwd() / "pagedlab-notebooks"
    packaged = sorted((package / "notebooks").glob("*.ipynb"))
    if not packaged and not target.is_dir():
        raise ConfigError(
            "this installation has no notebooks; clone the repository, or start jupyter lab yourself"
        )
    target.mkdir(exist_ok=True)
    for notebook in packaged:
        copy = target / notebook.name
        if not copy.exists():
            copy.write_bytes(notebook.read_bytes())
    return target


def lab_command(folder: Path, extra: list[str]) -> list[str]:
    """Return the command that starts JupyterLab on ``folder``; the address comes last, so nothing overrides it."""
    command = [sys.executable, "-m", "jupyterlab"]
    quickstart = sorted(folder.glob("*quickstart*.ipynb"))
    command += [str(quickstart[0])] if quickstart else []
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return [*command, *extra, f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1"]
