"""Sweeps as files: one Parquet or JSON file, all or nothing, readable at any time.

Data only: reading one imports and unpickles nothing. In a Parquet file what is no row is JSON in the schema's metadata;
a column of values of several kinds is JSON text, and its field says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagedlab.errors import ResultsError

FORMAT = 1
KIND = "sweep"
_SUFFIXES = (".parquet", ".json")
_KEY = b"pagedlab"
_AS_JSON = {b"pagedlab": b"json"}
_NOT_ONE = "it is left alone"

Row = dict[str, Any]


def check_path(path: str | Path) -> Path:
    """Return ``path``; `ResultsError` unless it ends in .parquet or .json."""
    file = Path(path)
    if file.suffix not in _SUFFIXES:
        raise ResultsError(f"{file}: a sweep is written to a file that ends in {' or '.join(_SUFFIXES)}")
    return file


def write(path: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write rows, all with the same columns, and facts; `ResultsError` if that cannot be done."""
    stated = {"format": FORMAT, "kind": KIND, **facts}
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix == ".json":
                text = json.dumps({**stated, "rows": list(rows)}, indent=1)
                draft.write_text(text + "\n", encoding="utf-8")
            else:
                _write_parquet(draft, rows, stated)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written: {error.strerror or error}") from None


def read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return rows and facts; `ResultsError`, in one line, for a file that is broken or no sweep."""
    rows, stated = _read_json(path) if path.suffix == ".json" else _read_parquet(path)
    if not isinstance(stated, dict) or stated.get("kind") != KIND:
        raise ResultsError(f"{path}: holds no sweep; {_NOT_ONE}")
    if stated.get("format") != FORMAT:
        raise ResultsError(f"{path}: format {stated.get('format')!r}; this version reads format {FORMAT}")
    for key, kind in (("axes", dict), ("workloads", dict), ("how", str)):
        if not isinstance(stated.get(key), kind):
            raise ResultsError(f"{path}: {key!r} is missing or is no {kind.__name__}; {_NOT_ONE}")
    if not all(isinstance(values, list) for values in stated["axes"].values()):
        raise ResultsError(f"{path}: 'axes' must name lists of values; {_NOT_ONE}")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "point" in r for r in rows):
        raise ResultsError(f"{path}: its rows are no points of a sweep; {_NOT_ONE}")
    return rows, stated


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> tuple[Any, Any]:
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path}: not a text file; {_NOT_ONE}") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ResultsError(f"{path}:{line}: not valid JSON; {_NOT_ONE}") from None
    return (stated.pop("rows", None), stated) if isinstance(stated, dict) else (None, stated)


# ---- Parquet -------------------------------------------------------------------------------------------------------


def _write_parquet(path: Path, rows: Sequence[Row], stated: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(rows[0]) if rows else ["point"]
    arrays: list[Any] = []
    columns: list[Any] = []
    for name in names:
        values = [row[name] for row in rows]
        kinds = {type(v) for v in values if v is not None}
        text = not (len(kinds) <= 1 or kinds == {int, float})
        try:
            array = pa.array(values) if not text else None
        except (pa.ArrowException, OverflowError):  # whole numbers of more than 64 bits
            array, text = None, True
        if text:
            array = pa.array([None if v is None else json.dumps(v) for v in values])
        arrays.append(array)
        columns.append(pa.field(name, arrays[-1].type, metadata=_AS_JSON if text else None))
    schema = pa.schema(columns, metadata={_KEY: json.dumps(stated).encode()})
    pq.write_table(pa.table(arrays, schema=schema), path)


def _read_parquet(path: Path) -> tuple[Any, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file") from None
    except (OSError, pa.ArrowException, ValueError) as error:
        why = (str(error).splitlines() or [""])[0][:120]
        raise ResultsError(f"{path}: not a readable Parquet file ({why}); {_NOT_ONE}") from None
    columns: dict[str, list[Any]] = {}
    try:
        stated = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
        for name in table.column_names:
            values = table.column(name).to_pylist()
            if (table.schema.field(name).metadata or {}).get(b"pagedlab") == b"json":
                values = [None if v is None else json.loads(v) for v in values]
            columns[name] = values
    except (ValueError, TypeError, RecursionError) as error:
        raise ResultsError(f"{path}: holds no sweep ({str(error)[:120]}); {_NOT_ONE}") from None
    return [dict(zip(columns, row)) for row in zip(*columns.values())], stated
