"""Reading files that others wrote: lines with their numbers, values that are checked, errors that name the place.

Nothing that a file holds raises anything but `WorkloadError`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from pagedlab.engine.request import Request
from pagedlab.errors import WorkloadError
from pagedlab.workloads.parts import MAX_TOKENS
from pagedlab.workloads.workload import Workload

T = TypeVar("T")

_GZIP, _ZSTD, _BOM = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"
_KEPT = 10
"""How many of the skipped lines a workload remembers."""


class Bad(ValueError):
    """What is wrong with one line (or one entry of a JSON file)."""


class Reader:
    """One trace being read: it opens files, skips what is bad if told to, and makes the workload.

    ``limit`` ends the reading after so many good lines.
    """

    def __init__(self, path: str | Path, *, skip_bad: bool = False, limit: int | None = None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise WorkloadError(f"limit must be None or a whole number of at least 1, not {limit!r}")
        self.path = Path(path)
        self.skip_bad = skip_bad
        self.limit = limit
        self.skipped: list[tuple[int, str]] = []
        self.num_skipped = 0
        self.line = 0
        """The line that is being parsed."""

    def refuse(self, line: int, why: object, place: str | None = None) -> None:
        """Raise `WorkloadError` with the place (the file's line, unless said otherwise), or skip and count it."""
        message = f"{place or f'{self.path}:{line}'}: {why}"
        if not self.skip_bad:
            raise WorkloadError(message)
        self.num_skipped += 1
        if len(self.skipped) < _KEPT:
            self.skipped.append((line, message))

    def each(
        self,
        parse: Callable[[str], T | None],
        lines: Iterable[tuple[int, bytes]] | None = None,
        name: str | None = None,
    ) -> Iterator[tuple[int, T]]:
        """Yield the line number and what ``parse`` makes of the line, for every line that is good.

        A line of which it makes None is good and yet not wanted.
        ``lines`` are those of the reader's own file, unless given with the ``name`` of another.
        """
        given = numbered_lines(self.path) if lines is None else lines
        good = 0
        for number, raw in given:
            self.line = number
            try:
                item = parse(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                self.refuse(number, f"not UTF-8 text (byte {error.start + 1})", name and f"{name}:{number}")
            except Bad as error:
                self.refuse(number, error, name and f"{name}:{number}")
            else:
                if item is None:
                    continue
                yield number, item
                good += 1
                if good == self.limit:
                    return

    def workload(
        self,
        name: str,
        requests: list[Request],
        description: str,
        *,
        content_ids: bool = True,
        outputs: dict[str, list[int]] | None = None,
    ) -> Workload:
        """Return the workload, sorted by arrival (equal ones stay in the file's order)."""
        if not requests:
            bad = f"; {self.num_skipped} were skipped, first: {self.skipped[0][1]}" if self.skipped else ""
            raise WorkloadError(f"{self.path}: no requests in it{bad}")
        requests.sort(key=lambda r: r.arrival)
        if self.num_skipped:
            description += f" {self.num_skipped} bad lines were skipped."
        return Workload(
            name,
            tuple(requests),
            description,
            content_ids=content_ids,
            outputs=outputs or None,
            skipped=tuple(self.skipped),
            num_skipped=self.num_skipped,
        )


def trace_name(path: Path) -> str:
    """Return what to call a workload read from ``path``: the file's name without its endings."""
    return path.name.split(".")[0] or path.name


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, through gzip if that is what it holds; raises `WorkloadError`."""
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:
        raise WorkloadError(f"cannot read {path}: {_reason(error)}") from None
    try:
        start = file.read(4)
        file.seek(0)
    except OSError as error:
        file.close()
        raise WorkloadError(f"cannot read {path}: {_reason(error)}") from None
    if start == _ZSTD:
        file.close()
        raise WorkloadError(f"{path} is compressed with zstd; decompress it first (zstd -d), or use gzip")
    return cast(IO[bytes], gzip.GzipFile(fileobj=file)) if start.startswith(_GZIP) else file


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1; raises `WorkloadError` for damaged gzip data."""
    with open_file(path) as file:
        yield from numbered(file, path)


def numbered(file: IO[bytes], name: object) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of an open file likewise; a byte order mark at its beginning is left out."""
    number = 0
    try:
        for raw in file:
            number += 1
            line = raw.removeprefix(_BOM).strip() if number == 1 else raw.strip()
            if line:
                yield number, line
    except DAMAGED as error:
        raise WorkloadError(f"{name}:{number + 1}: damaged or cut off here: {_reason(error)}") from None


def read_all(path: Path) -> bytes:
    """Return what a file holds, decompressed; raises `WorkloadError`."""
    try:
        with open_file(path) as file:
            return file.read()
    except DAMAGED as error:
        raise WorkloadError(f"{path}: damaged or cut off: {_reason(error)}") from None


DAMAGED = (EOFError, OSError, zlib.error, tarfile.TarError)
"""What reading compressed data raises when it is no such data."""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _no_number(constant: str) -> Any:
    raise Bad(f"{constant} is not a number that anything can be done with")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that ``text`` is; raises `Bad`. NaN and infinities are refused."""
    try:
        value = _DECODER.decode(text)
    except Bad:
        raise
    except json.JSONDecodeError as error:
        raise Bad(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise Bad("not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise Bad(f"not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise Bad(f"must be a JSON object, not {shown(value)}")
    return value


def whole(row: dict[str, Any], key: str, low: int = 1, high: int = MAX_TOKENS) -> int:
    """Return ``row[key]``, a whole number from ``low`` to ``high``; raises `Bad`."""
    value = row.get(key)
    # bool is a subclass of int, and true is no length.
    if type(value) is int and low <= value <= high:
        return value
    raise Bad(f"{key} must be a whole number from {low} to {high}, {_not(row, key)}")


def number(row: dict[str, Any], key: str, low: float = 0.0, high: float = 1e18) -> float:
    """Return ``row[key]``, a finite number from ``low`` to ``high``; raises `Bad`."""
    value = row.get(key)
    if type(value) in (int, float) and low <= value <= high:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise Bad(f"{key} must be a number from {low:g} to {high:g}, {_not(row, key)}")


def id_list(row: dict[str, Any], key: str) -> list[int]:
    """Return ``row[key]``, a list of whole numbers of at least 0; raises `Bad`."""
    value = row.get(key)
    if isinstance(value, list) and set(map(type, value)) <= {int} and min(value, default=0) >= 0:
        return value
    raise Bad(f"{key} must be a list of whole numbers of at least 0, {_not(row, key)}")


def text_of(row: dict[str, Any], key: str, *, empty: bool = False) -> str:
    """Return ``row[key]``, a text that can be encoded; raises `Bad`."""
    value = row.get(key)
    if not isinstance(value, str) or not (value or empty):
        raise Bad(f"{key} must be a text, {_not(row, key)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Bad(f"{key} holds half a character (a lone surrogate)") from None
    return value


def shown(value: Any) -> str:
    """Return ``value`` for an error message, cut off if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or lists within lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _not(row: dict[str, Any], key: str) -> str:
    return f"not {shown(row[key])}" if key in row else "and it is missing"


# ---- CSV -----------------------------------------------------------------------------------------------------------


class Table:
    """The columns of a CSV file, found by the names in its first line (case does not matter)."""

    def __init__(self, header: str) -> None:
        self.columns = {name.strip().casefold(): i for i, name in enumerate(cells(header))}
        self._row: list[str] = []

    def need(self, *names: str) -> None:
        """Raise `Bad` unless all these columns are there."""
        if missing := [n for n in names if n.casefold() not in self.columns]:
            raise Bad(
                f"the first line must name the columns {', '.join(names)}; missing: {', '.join(missing)}"
            )

    def take(self, line: str) -> None:
        """Make ``line`` the current row."""
        self._row = cells(line)

    def text(self, name: str) -> str | None:
        """Return a cell of the current row; None if the file has no such column. Raises `Bad` for a short row."""
        at = self.columns.get(name.casefold())
        if at is None:
            return None
        if at >= len(self._row):
            raise Bad(f"{name} is missing: {len(self._row)} columns instead of {len(self.columns)}")
        return self._row[at].strip()

    def whole(self, name: str, low: int = 1, high: int = MAX_TOKENS) -> int:
        """Return a cell as a whole number; raises `Bad`."""
        cell = self.text(name) or ""
        # int() would also take 1_000 and digits of other scripts; and beyond some length it refuses.
        if cell.isascii() and cell.isdigit() and len(cell) < 20 and low <= int(cell) <= high:
            return int(cell)
        raise Bad(f"{name} must be a whole number from {low} to {high}, not {shown(cell)}")

    def number(self, name: str, low: float = 0.0, high: float = 1e18) -> float:
        """Return a cell as a finite number; raises `Bad`."""
        cell = self.text(name) or ""
        try:
            value = float(cell)
        except ValueError:
            value = float("nan")
        if "_" in cell or not low <= value <= high:
            raise Bad(f"{name} must be a number from {low:g} to {high:g}, not {shown(cell)}")
        return value


def read_table(reader: Reader, parse: Callable[[Table], T | None], *needed: str) -> Iterator[tuple[int, T]]:
    """Yield the line number and what ``parse`` makes of each row of a CSV file; its first line names the columns.

    Raises `WorkloadError` if a needed column is missing, whatever the reader may skip.
    """
    lines = numbered_lines(reader.path)
    at, first = next(lines, (1, b""))
    try:
        table = Table(first.decode("utf-8"))
        table.need(*needed)
    except UnicodeDecodeError:
        raise WorkloadError(f"{reader.path}:{at}: not UTF-8 text") from None
    except Bad as error:
        raise WorkloadError(f"{reader.path}:{at}: {error}") from None

    def row(line: str) -> T | None:
        table.take(line)
        return parse(table)

    yield from reader.each(row, lines)


def cells(line: str) -> list[str]:
    """Return the cells of one line of CSV; raises `Bad`."""
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader(io.StringIO(line)), [])
    except csv.Error as error:
        raise Bad(f"not CSV: {error}") from None
