"""Workloads by name: a generator, a published trace, or a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagedlab.errors import WorkloadError, nearest
from pagedlab.workloads import data, generators, synthetic, traces
from pagedlab.workloads.workload import Workload

GENERATORS: dict[str, Callable[..., Workload]] = {
    "chat": generators.chat,
    "mixed-lengths": generators.mixed_lengths,
    "parallel-samples": generators.parallel_samples,
    "shared-prefix": generators.shared_prefix,
    "conversations": synthetic.conversations,
    "agents": synthetic.agents,
    "rag": synthetic.rag,
    "sharegpt-like": synthetic.sharegpt_like,
    "alpaca-like": synthetic.alpaca_like,
    "zipf": synthetic.zipf,
    "scan-loop": synthetic.scan_loop,
}


def load(name: str | Path, *, format: str | None = None, **params: Any) -> Workload:
    """Return a workload: by the name of a generator or a trace, or from a file or folder.

    Traces are looked for in the folder that the environment variable PAGEDLAB_DATA names, then among what
    ``pagedlab data fetch`` has brought. A file's format is found out from what it holds, unless ``format`` says it.
    ``params`` go to the generator or reader. Raises `WorkloadError` for an unknown name or parameter, with the nearest,
    and for a trace that is not here, with how to fetch it.

    >>> len(load("mixed-lengths", num_requests=5))
    5
    """
    if isinstance(name, str):
        if name in GENERATORS:
            if format is not None:
                raise WorkloadError(f"{name!r} is a generator and has no format; for a file write './{name}'")
            return traces.call(GENERATORS[name], f"workload {name!r}", params)
        if (found := data.find(name)) is not None:
            trace = traces.read(found.path, format=format or found.format, **params)
            return replace(trace, name=name)
    path = Path(name)
    try:
        there = path.exists()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if there:
        return traces.read(path, format=format, **params)
    known = [*GENERATORS, *data.names()]
    hint = nearest(str(name), known)
    if isinstance(name, Path) or "/" in name or path.suffix:
        raise WorkloadError(f"no file {str(name)!r}, and no workload of that name{hint}")
    raise WorkloadError(f"no workload {name!r}; known: {', '.join(known)}{hint}")


def list_workloads() -> list[dict[str, Any]]:
    """One row per generator: ``name``, ``summary`` (first docstring line) and ``params`` with their defaults."""
    rows = []
    for name, make in GENERATORS.items():
        params = {p.name: p.default for p in inspect.signature(make).parameters.values()}
        rows.append({"name": name, "summary": (make.__doc__ or "").strip().split("\n")[0], "params": params})
    return rows


def list_traces() -> list[dict[str, Any]]:
    """One row per published trace: ``name``, ``summary``, ``here``, and the rest as in ``pagedlab data list``."""
    return data.list_data()
