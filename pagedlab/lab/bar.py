"""The progress bar of long work: where somebody watches, in the terminal or in JupyterLab."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None


def bar(progress: bool | None, total: int, unit: str, **looks: Any) -> Any:
    """Return a bar of tqdm's over ``total`` units, or None: ``progress`` False, or None where nobody watches.

    ``looks`` are further arguments of ``tqdm``.
    """
    notebook = in_notebook()
    if progress is False or (progress is None and not notebook and not sys.stderr.isatty()):
        return None
    module = import_module("tqdm.notebook" if notebook else "tqdm")
    return module.tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True, **looks)
