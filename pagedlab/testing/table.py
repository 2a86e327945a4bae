"""What `check_policy` returns: a row a law."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, overload

_MARKS = {"passed": "✓", "failed": "✗", "xfail": "–", "skipped": "·"}


@dataclass(frozen=True)
class Row:
    """One law: ``status`` is "passed", "failed", "xfail" (as expected) or "skipped"; ``detail`` says why."""

    check: str
    status: str
    detail: str = ""
    summary: str = ""

    def __getitem__(self, key: str) -> str:
        return str(asdict(self)[key])

    def keys(self) -> list[str]:
        """Return the names of the columns, so that ``dict(row)`` works."""
        return list(asdict(self))


class CheckTable(Sequence[Row]):
    """The laws of one policy in the order in which they were checked; prints as a table."""

    def __init__(self, policy: str, slot: str, rows: Sequence[Row]) -> None:
        self.policy, self.slot, self.rows = policy, slot, list(rows)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        return self.rows[at]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def failed(self) -> list[Row]:
        """Laws that are broken and were not expected to be."""
        return [row for row in self.rows if row.status == "failed"]

    @property
    def passed(self) -> bool:
        """Whether no law is broken that was not expected to be."""
        return not self.failed

    def headline(self) -> str:
        """Return the outcome in one line."""
        counts = {status: sum(row.status == status for row in self.rows) for status in _MARKS}
        said = [f"{n} {status}" for status, n in counts.items() if n]
        return f"{self.slot} {self.policy}: {', '.join(said)}"

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as plain data."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        width = max((len(row.check) for row in self.rows), default=0)
        lines = [self.headline()]
        for row in self.rows:
            text = row.detail or row.summary
            lines.append(f"  {_MARKS[row.status]} {row.check:<{width}}  {text}".rstrip())
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{self.headline()}>"

    def _repr_html_(self) -> str:
        cell = "style='text-align:left;vertical-align:top;padding:2px 10px'"
        body = "".join(
            f"<tr title='{escape(row.summary)}'><td {cell}>{_MARKS[row.status]}&nbsp;{row.status}</td>"
            f"<td {cell}>{escape(row.check)}</td><td {cell}>{escape(row.detail or row.summary)}</td></tr>"
            for row in self.rows
        )
        head = f"<tr><th {cell}></th><th {cell}>law</th><th {cell}>what was found</th></tr>"
        return f"<table><caption>{escape(self.headline())}</caption>{head}{body}</table>"
