"""Results as HTML. Prompts, outputs, names and errors come from outside: nothing gets here without being escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from pagedlab.policies.prefetch import ENDS

_CELL = "text-align:left;padding:2px 10px"
_SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "", code: Sequence[int] = ()
) -> str:
    """Return an HTML table; cells of the columns ``code`` keep their line breaks."""
    head = "".join(f"<th style='{_CELL}'>{escape(h)}</th>" for h in headers) if any(headers) else ""
    body = "".join(
        "<tr>" + "".join(_cell(value, i in code) for i, value in enumerate(row)) + "</tr>" for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<tr>{head}</tr>{body}</table>"


def _cell(value: Any, code: bool) -> str:
    style = f"{_CELL};white-space:pre-wrap;font-family:monospace" if code else _CELL
    return f"<td style='{style}'>{escape(number(value))}</td>"


def number(value: Any) -> str:
    """Return a value as people read it: four digits of a float, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    return "–" if share is None else f"{100 * share:.1f}%"


def seconds(value: float | None) -> str:
    """Return a time with a unit that suits it."""
    if value is None:
        return "–"
    if value >= 1000:
        return f"{value:,.0f} s"
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def size(num_bytes: int | None) -> str:
    """Return bytes with a unit that suits them, in steps of a thousand."""
    if num_bytes is None:
        return "–"
    for unit, scale in _SIZES:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} bytes" if num_bytes else "0"


def moved(s: dict[str, Any], link: str) -> str:
    """Return what a summary (or a row of a comparison) says of a link: bytes, or blocks if their weight is unknown."""
    blocks, weight = s[f"blocks_{link}"], s[f"bytes_{link}"]
    return size(weight) if weight is not None or blocks is None else f"{blocks:,} blocks"


def shorten(text: str, limit: int = 160, *, end: bool = False) -> str:
    """Return the beginning of ``text``, or its end."""
    if len(text) <= limit:
        return text
    return "…" + text[-limit:] if end else text[:limit] + "…"


def summary_rows(s: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a run's summary as labelled rows."""
    ended = [f"{s['finished']} of {s['sequences']} finished"]
    ended += [f"{s[k]} {k}" for k in ("refused", "failed", "cancelled", "unfinished") if s[k]]
    rows = [
        ("sequences", ", ".join(ended)),
        ("output", f"{s['output_tokens']} tokens, {number(s['tokens_per_s'])} tokens/s"),
        *(
            (label, f"{seconds(s[f'{key}_mean'])} mean, {seconds(s[f'{key}_p95'])} p95")
            for label, key in (
                ("time to first token", "ttft"),
                ("time per token", "tpot"),
                ("latency", "latency"),
            )
        ),
        ("prefix hits", f"{percent(s['hit_ratio'])} of prompt tokens"),
        ("KV waste while running", percent(s["waste"])),
        (
            "preemptions",
            f"{s['preemptions']}; {s['recomputed_tokens']} tokens recomputed, {s['swapped_out']} swapped out",
        ),
        ("mean batch size", number(s["mean_batch_size"])),
    ]
    if any(s[f"blocks_{link}"] for link in ("to_host", "to_device", "copied", "to_disk")):
        to_host, to_device, copied = (moved(s, link) for link in ("to_host", "to_device", "copied"))
        rows.append(("moved", f"{to_host} to the host, {to_device} to the device, {copied} copied on write"))
    if s["blocks_to_disk"] or s["blocks_from_disk"]:
        rows.append(("disk tier", f"{moved(s, 'to_disk')} written, {moved(s, 'from_disk')} read"))
    if s["tier_faults"]:
        rows.append(("disk faults", f"{s['tier_faults']}; what they lost was computed again"))
    if s["prefetch_done"]:
        ends = [f"{s[key]} {fate}" for fate in ENDS if s[key := f"prefetch_{fate}"]]
        rows.append(("prefetched", f"{s['prefetch_done']} blocks: {', '.join(ends) or 'none used yet'}"))
    if s["kernel"]:
        rows.append(("kernel, layout", f"{s['kernel']}, {s['layout']}"))
    return rows
