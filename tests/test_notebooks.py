"""Every notebook runs from top to bottom within its budget, and lies in the repository without outputs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUDGET_S = 60
"""Longest that a cell may take, and so the most that a hanging one costs."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@every_notebook
@pytest.mark.slow
def test_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    env = {
        **os.environ,
        "PAGEDLAB_FAST": "1",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
    }
    client = NotebookClient(
        notebook,
        timeout=BUDGET_S,
        kernel_name="python3",
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=env)  # raises at the first cell that fails or takes too long
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    # What it writes is meant for the reader: no warnings, no progress bars left behind.
    complaints = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert not re.search(r"Traceback|Warning|Error", complaints), complaints


@every_notebook
def test_has_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    left = [cell for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None]
    assert not left, f"strip it: nbstripout {path.name}"
    assert "widgets" not in notebook.metadata


@every_notebook
def test_names_no_place_of_one_machine(path: Path) -> None:
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    found = re.findall(r"(?<![\w.:/])(?:/(?:home|root|tmp|work|usr|opt|Users|mnt)/|[A-Z]:\\)\S*", text)
    assert not found


@every_notebook
def test_is_valid_and_titled(path: Path) -> None:
    nbformat.validate(json.loads(path.read_text(encoding="utf-8")))
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
