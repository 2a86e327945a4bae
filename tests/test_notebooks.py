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
DATA = Path(os.environ.get("PAGEDLAB_DATA") or ROOT.parent / "shared" / "data").resolve()
"""Real traces and runs, which do not ship. Notebooks must do without."""
TRACES = ROOT / "notebooks" / "02_traces_and_simulation.ipynb"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def execute(path: Path, tmp_path: Path, **more: str) -> tuple[Any, str]:
    """Run a notebook from top to bottom; return it with its outputs, and what it printed."""
    notebook = nbformat.read(path, as_version=4)
    env = {
        **os.environ,
        "PAGEDLAB_FAST": "1",
        "PAGEDLAB_DATA": str(DATA),
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
        **more,
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
    streams = dict.fromkeys(("stdout", "stderr"), "")
    for output in outputs:
        if output.output_type == "stream":
            streams[output.name] += output.text
    assert not re.search(r"Traceback|Warning|Error", streams["stderr"]), streams["stderr"]
    return notebook, streams["stdout"]


def figures(notebook: Any) -> int:
    return sum(
        "image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs
    )


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p != TRACES], ids=lambda p: p.stem)
@pytest.mark.slow
def test_runs(path: Path, tmp_path: Path) -> None:
    execute(path, tmp_path)


@pytest.mark.slow
def test_traces_runs_on_real_data(tmp_path: Path) -> None:
    if not (DATA / "mooncake").is_dir() or not (DATA / "vllm_runs").is_dir():
        pytest.skip("real traces are not at hand: PAGEDLAB_DATA names no folder with them")
    notebook, said = execute(TRACES, tmp_path)
    assert "Real requests" in said
    assert "Skipped" not in said
    assert figures(notebook) == 5


@pytest.mark.slow
def test_traces_runs_without_data_and_says_so(tmp_path: Path) -> None:
    notebook, said = execute(
        TRACES, tmp_path, PAGEDLAB_DATA="nowhere", PAGEDLAB_CACHE=str(tmp_path / "cache")
    )
    assert "Made-up requests" in said
    assert "Skipped: the measured run is not at hand" in said
    assert figures(notebook) == 4


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
