"""Runs as files: a folder with one Parquet file a table, and ``run.json``.

Data only: reading a run imports and unpickles nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pagedlab.errors import ResultsError
from pagedlab.lab.measures import Columns
from pagedlab.lab.results import COLUMNS, Run

FORMAT = 1
_JSON = "run.json"

_TOTALS = [
    "prompt_tokens",
    "hit_tokens",
    "recomputed_tokens",
    "preemptions",
    "swapped_out",
    "prefetch_done",
    "prefetch_refused",
    "prefetch_useful",
    "prefetch_useless",
]


def save_run(run: Run, path: str | Path) -> Path:
    """Write ``run`` to the folder ``path``, all or nothing; raises `ResultsError` if that cannot be done."""
    folder = Path(path)
    if folder.exists() and not (
        folder.is_dir() and ((folder / _JSON).is_file() or not any(folder.iterdir()))
    ):
        raise ResultsError(f"{folder}: exists and is no saved run; it is left alone")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(run, draft)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise ResultsError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return folder


def _write(run: Run, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.chmod(0o755)  # mkdtemp makes it the owner's alone
    for name in COLUMNS:
        table = pa.table({column: pa.array(values) for column, values in run.columns(name).items()})
        pq.write_table(table, folder / f"{name}.parquet")
    text = json.dumps(
        {"format": FORMAT, "config": run.description, "facts": run.facts, "summary": run.summary()}, indent=2
    )
    (folder / _JSON).write_text(text + "\n", encoding="utf-8")


def load_run(path: str | Path) -> Run:
    """Read a run that `Run.save` wrote. `ResultsError`, in one line, names the file that is missing or broken."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder; a saved run is one" if folder.exists() else "no such folder"
        raise ResultsError(f"{folder}: {what}")
    stated = _read_json(folder / _JSON)
    columns = {name: _read_table(folder / f"{name}.parquet", name) for name in COLUMNS}
    if len(columns["requests"]["request_id"]) != len(columns["outputs"]["request_id"]):
        raise ResultsError(f"{folder}: outputs.parquet and requests.parquet do not belong together")
    if len(columns["steps"]["step"]) != len(columns["memory"]["step"]):
        raise ResultsError(f"{folder}: memory.parquet and steps.parquet do not belong together")
    return Run(columns=columns, description=stated["config"], facts=stated["facts"])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{file}: missing; this folder holds no saved run") from None
    except OSError as error:
        raise ResultsError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{file}: not a text file") from None
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ResultsError(f"{file}:{line}: not valid JSON") from None
    if not isinstance(stated, dict) or stated.get("format") != FORMAT:
        found = stated.get("format") if isinstance(stated, dict) else None
        raise ResultsError(f"{file}: format {found!r}; this version reads format {FORMAT}")
    facts, config = stated.get("facts"), stated.get("config")
    if not isinstance(config, dict) or not isinstance(facts, dict):
        raise ResultsError(f"{file}: 'config' and 'facts' must be objects")
    for key, kind in (
        ("workload", dict),
        ("totals", dict),
        ("used", dict),
        ("versions", dict),
        ("hardware", dict),
    ):
        if not isinstance(facts.get(key), kind):
            raise ResultsError(f"{file}: 'facts.{key}' is missing or is no object")
    for key in _TOTALS:
        if not isinstance(facts["totals"].get(key), int):
            raise ResultsError(f"{file}: 'facts.totals.{key}' is missing or is no number")
    facts["workload"].setdefault("name", "")
    for key in ("kernel", "layout", "dtype"):
        facts["used"].setdefault(key, None)
    facts.setdefault("interrupted", False)
    facts.setdefault("has_text", True)
    return stated


def _read_table(file: Path, name: str) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read()
    except FileNotFoundError:
        raise ResultsError(f"{file}: missing") from None
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ResultsError(
            f"{file}: not a readable Parquet file ({str(error).splitlines()[0][:120]})"
        ) from None
    absent = [c for c in COLUMNS[name] if c not in table.column_names]
    if absent:
        raise ResultsError(f"{file}: column {absent[0]!r} is missing")
    return {c: table.column(c).to_pylist() for c in COLUMNS[name]}
