"""Readers of published traces, one function for each format; `read` finds out which format a file has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagedlab.errors import WorkloadError, nearest
from pagedlab.workloads.traces.hashed import bailian, mooncake
from pagedlab.workloads.traces.lengths import azure, burstgpt, vidur, vllm
from pagedlab.workloads.traces.reading import (
    Bad,
    cells,
    json_object,
    numbered_lines,
    read_all,
)
from pagedlab.workloads.traces.tokens import is_tar, llmservingsim, lmcache_agent, token_lines
from pagedlab.workloads.traces.weka import weka
from pagedlab.workloads.workload import Workload

__all__ = [
    "FORMATS",
    "azure",
    "bailian",
    "burstgpt",
    "detect",
    "llmservingsim",
    "lmcache_agent",
    "mooncake",
    "read",
    "token_lines",
    "vidur",
    "vllm",
    "weka",
]

FORMATS: dict[str, Callable[..., Workload]] = {
    "azure": azure,
    "bailian": bailian,
    "burstgpt": burstgpt,
    "llmservingsim": llmservingsim,
    "lmcache-agent": lmcache_agent,
    "mooncake": mooncake,
    "tokens": token_lines,
    "vidur": vidur,
    "vllm": vllm,
    "weka": weka,
}

# What the first line tells: the format whose keys (or columns) are all there; the first that fits is meant.
_Known = tuple[tuple[str, set[str]], ...]

_JSON_KEYS: _Known = (
    ("bailian", {"chat_id", "timestamp", "input_length"}),
    ("mooncake", {"timestamp", "input_length", "hash_ids"}),
    ("llmservingsim", {"input_toks", "arrival_time_ns"}),
    ("vllm", {"input_toks", "arrival_time"}),
    ("lmcache-agent", {"input", "output", "session_id"}),
    ("weka", {"requests"}),
    ("tokens", {"prompt"}),
)
_CSV_COLUMNS: _Known = (
    ("azure", {"timestamp", "contexttokens", "generatedtokens"}),
    ("vidur", {"num_prefill_tokens", "num_decode_tokens"}),
    ("burstgpt", {"timestamp", "request tokens", "response tokens"}),
)


def read(path: str | Path, *, format: str | None = None, **params: Any) -> Workload:
    """Read a trace; ``format`` is one of `FORMATS`, or found out from what the file holds.

    ``params`` go to the reader. Raises `WorkloadError` for an unknown format or parameter, a file that cannot be read,
    and the first bad line (unless ``skip_bad``).
    """
    path = Path(path)
    if format is None:
        format = detect(path)
    elif format not in FORMATS:
        raise WorkloadError(f"no format {format!r}; known: {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    return call(FORMATS[format], f"format {format!r}", params, path)


def call(make: Callable[..., Workload], what: str, params: dict[str, Any], *first: Any) -> Workload:
    """Return ``make(*first, **params)``; raises `WorkloadError` for a parameter that it does not have."""
    allowed = list(inspect.signature(make).parameters)[len(first) :]
    for key in params:
        if key not in allowed:
            raise WorkloadError(
                f"{what} has no parameter {key!r}; it has: {', '.join(allowed)}{nearest(key, allowed)}"
            )
    return make(*first, **params)


def detect(path: Path) -> str:
    """Return the format of a file or folder by what it holds; raises `WorkloadError` if it is none."""
    if path.is_dir():
        if (path / "requests.jsonl").is_file():
            return "vllm"
        names = [f.name for f in path.iterdir()]
        if any(n.endswith((".jsonl", ".jsonl.gz")) for n in names):
            return "lmcache-agent"
        if any(n.endswith((".json", ".json.gz")) for n in names):
            return "weka"
        raise WorkloadError(f"{path}: neither requests.jsonl nor .json or .jsonl files in this folder")
    if is_tar(path):
        return "lmcache-agent"
    first = next((line for _, line in numbered_lines(path)), b"").decode("utf-8", "replace")
    if not first:
        raise WorkloadError(f"{path}: the file is empty")
    if first.startswith("{"):
        keys = _keys(first)
        if keys is None:
            # One object over many lines is no JSON lines; a session written with indents is such a file.
            keys = _keys(read_all(path).decode("utf-8-sig", "replace"))
        found, known = set(keys or ()), _JSON_KEYS
    else:
        try:
            found, known = {c.strip().casefold() for c in cells(first)}, _CSV_COLUMNS
        except Bad:
            found, known = set(), _CSV_COLUMNS
    for name, wanted in known:
        if wanted <= found:
            return name
    raise WorkloadError(f"{path}:1: the format is not known; say format=..., one of {', '.join(FORMATS)}")


def _keys(text: str) -> list[str] | None:
    try:
        return list(json_object(text))
    except Bad:
        return None
