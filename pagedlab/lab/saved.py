"""Runs as files: a folder with one Parquet file a table, and ``run.json``.

Data only: reading a run imports and unpickles nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagedlab.errors import ResultsError
from pagedlab.lab.measures import LINKS, Columns
from pagedlab.lab.results import COLUMNS, Run
from pagedlab.policies.prefetch import FATES

FORMAT = 3
"""Of what `save_run` writes. It rises when a table or the totals get something new; older ones can still be read."""
_ADDED: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "steps": ("blocks_to_host", "blocks_to_device", "blocks_copied", "recomputed_tokens"),
        "totals": ("blocks_to_host", "blocks_to_device", "blocks_copied"),
    },
    3: {
        "steps": ("blocks_to_disk", "blocks_from_disk"),
        "totals": (
            "blocks_to_disk",
            "blocks_from_disk",
            "tier_faults",
            "prefetch_late",
            "prefetch_harmful",
        ),
    },
}
"""What came with each format: what a run of an older one does not know is None."""
_NUMERIC = ("steps", "memory", "spans")
"""Tables that hold nothing but numbers."""
_JSON = "run.json"

_TOTALS = [
    "prompt_tokens",
    "hit_tokens",
    "recomputed_tokens",
    "preemptions",
    "swapped_out",
    "tier_faults",
    *(f"prefetch_{fate}" for fate in FATES),
    *(f"blocks_{link}" for link in LINKS),
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
        table = pa.table({column: pa.array(values) for column, values in run.arrays(name).items()})
        pq.write_table(table, folder / f"{name}.parquet")
    text = json.dumps(
        {"format": FORMAT, "config": run.description, "facts": run.facts, "summary": run.summary()}, indent=2
    )
    (folder / _JSON).write_text(text + "\n", encoding="utf-8")


def load_run(path: str | Path) -> Run:
    """Read a run that `Run.save` wrote. `ResultsError`, in one line, names the file that is missing or broken.

    A run of an older format can be read: columns and totals that it does not know are None. One of a newer format
    is refused.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder; a saved run is one" if folder.exists() else "no such folder"
        raise ResultsError(f"{folder}: {what}")
    stated = _read_json(folder / _JSON)
    late = _later_than(stated["format"])
    columns = {name: _read_table(folder / f"{name}.parquet", name, late.get(name, ())) for name in COLUMNS}
    if len(columns["requests"]["request_id"]) != len(columns["outputs"]["request_id"]):
        raise ResultsError(f"{folder}: outputs.parquet and requests.parquet do not belong together")
    if len(columns["steps"]["step"]) != len(columns["memory"]["step"]):
        raise ResultsError(f"{folder}: memory.parquet and steps.parquet do not belong together")
    return Run(columns=columns, description=stated["config"], facts=stated["facts"])


def _later_than(version: int) -> dict[str, tuple[str, ...]]:
    """Return what came after a format, by table (and ``"totals"``)."""
    late: dict[str, tuple[str, ...]] = {}
    for came, added in _ADDED.items():
        if came > version:
            late |= {name: (*late.get(name, ()), *names) for name, names in added.items()}
    return late


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
    if not isinstance(stated, dict):
        raise ResultsError(f"{file}: not a JSON object")
    version = stated.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ResultsError(f"{file}: format {version!r}; this version reads formats 1 to {FORMAT}")
    if version > FORMAT:
        raise ResultsError(
            f"{file}: format {version} was written by a newer pagedlab; this version reads formats 1 to {FORMAT}"
        )
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
    totals = facts["totals"] = {**dict.fromkeys(_later_than(version).get("totals", ())), **facts["totals"]}
    unknown = [key for key in _later_than(1)["totals"] if totals.get(key, 0) is None]
    for key in _TOTALS:
        if not isinstance(totals.get(key), int) and key not in unknown:
            raise ResultsError(f"{file}: 'facts.totals.{key}' is missing or is no number")
    facts["workload"].setdefault("name", "")
    for key in ("kernel", "layout", "dtype", "kv_bytes_per_block"):
        facts["used"].setdefault(key, None)
    facts.setdefault("interrupted", False)
    facts.setdefault("has_text", True)
    return stated


def _read_table(file: Path, name: str, late: Sequence[str] = ()) -> Columns:
    """Read a table; the columns ``late`` may be absent."""
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
    for column in absent:
        if column not in late:
            raise ResultsError(f"{file}: column {column!r} is missing")
    columns: Columns = {}
    for c in COLUMNS[name]:
        if c in absent:
            columns[c] = [None] * table.num_rows
        elif name in _NUMERIC and not table.column(c).null_count:
            columns[c] = table.column(c).to_numpy()
        else:
            columns[c] = table.column(c).to_pylist()
    return columns
