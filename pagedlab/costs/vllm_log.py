"""The log of a real vLLM run: what to calibrate a cost model on, and what to hold a simulation against.

A run is a folder (the format of LLMServingSim's ``bench/examples``)::

    meta.json         model, vllm_version, engine_kwargs, started_at, ...; newer ones also what vLLM made of its
                      arguments (resolved_config, kv_cache with the size of the pool) and the card (hardware)
    requests.jsonl    one object a request: request_id, input_toks, output_toks, arrival_time,
                      queued_ts, scheduled_ts, first_token_ts, last_token_ts
    timeseries.csv    one row a second: t, prompt_throughput, gen_throughput, running, waiting, kv_cache_pct
    config.json       may be there, or in the folder above: the cards, as that simulator is told of them

**One clock.** ``arrival_time`` is on the epoch's clock and the other four stamps are on the machine's monotonic one,
whose zero is arbitrary. Every request is queued after it arrives, and the first to come finds an idle engine, so the
offset between the clocks is taken to be the smallest ``queued_ts - arrival_time`` of the run: the quickest request is
queued the moment it arrives, and no request before. The true offset is smaller by the quickest request's real delay
(its tokens are made and sent to the engine first, a millisecond or two), so times to first token come out too short by
that much, every request's alike. How sharp the minimum is, and whether the clocks drift apart, says `Alignment`.

Seconds here count from ``started_at`` of ``meta.json`` where it is given (it is on the epoch's clock, and the rows of
the time series count from it), else from the first arrival.

``kv_cache_pct`` is 0.0 throughout the public runs: it was not recorded there.

>>> run = VllmRun.load("vllm_runs/rtxpro6000-llama-3.1-8b")       # doctest: +SKIP
>>> run.requests[0].ttft, run.settings["max_num_seqs"]            # doctest: +SKIP
(0.1713..., 128)
>>> seen = run.before(100)         # what a calibration on the first hundred may look at  # doctest: +SKIP
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, Self

from pagedlab.errors import WorkloadError

_STAMPS = ("arrival_time", "queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
_COLUMNS = ("t", "prompt_throughput", "gen_throughput", "running", "waiting", "kv_cache_pct")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmRequest:
    """One request of a run. Times in seconds on the run's clock, lengths in tokens."""

    request_id: str
    input_tokens: int
    output_tokens: int
    arrival: float
    queued: float
    """The engine took it in; stamped between two steps."""
    scheduled: float
    """The first step that computes some of it began."""
    first_token: float
    last_token: float

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_token - self.arrival

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0.0 if there is only one."""
        more = self.output_tokens - 1
        return (self.last_token - self.first_token) / more if more else 0.0

    @property
    def latency(self) -> float:
        """Seconds from arrival to the last token."""
        return self.last_token - self.arrival


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmTick:
    """One row of the time series: what happened in the second up to ``t``."""

    t: float
    """Seconds on the run's clock."""
    prompt_throughput: float
    """Prompt tokens per second."""
    gen_throughput: float
    """Generated tokens per second."""
    running: int
    """Sequences that ran at ``t``."""
    waiting: int
    """Sequences that waited at ``t``."""
    kv_cache_pct: float
    """Share of the KV cache in use, as logged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How the two clocks were brought together; see the module's text. Seconds."""

    offset: float
    """Monotonic time minus epoch time, as estimated: the least ``queued - arrival``."""
    spread: float
    """How far above that least the next quickest hundredth of the requests lies: how sharp the minimum is."""
    drift: float
    """Least ``queued - arrival`` of the later half minus that of the earlier half: clocks that run apart, or an engine
    that was never idle in one of them.
    """


@dataclass(frozen=True, kw_only=True)
class VllmRun:
    """A run of vLLM: its settings, its requests in order of arrival, its time series."""

    model: str
    """The hub name."""
    vllm_version: str
    settings: dict[str, Any]
    """``engine_kwargs`` as vLLM was given them; what they leave open as it was resolved, where that is logged."""
    requests: tuple[VllmRequest, ...]
    ticks: tuple[VllmTick, ...] = ()
    alignment: Alignment
    num_blocks: int | None = None
    """Blocks of all ranks' pools together, if the run recorded them."""
    device: str | None = None
    """What the card is called, if the run says so."""
    _meta: _Meta = field(compare=False)
    _rows: tuple[Mapping[str, Any], ...] = field(compare=False)
    """The requests as logged."""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a run's folder. ``timeseries.csv`` may be missing; a file that is there must be whole.

        Raises `WorkloadError` that names the file, the line, what is wrong and what is allowed.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise WorkloadError(f"{folder}: no folder of a vLLM run (with meta.json and requests.jsonl)")
        meta = _Meta.read(folder / "meta.json")
        rows = list(_request_rows(folder / "requests.jsonl"))
        if meta.num_requests is not None and meta.num_requests != len(rows):
            raise WorkloadError(
                f"{folder / 'requests.jsonl'}: {len(rows)} requests, but meta.json says {meta.num_requests}"
            )
        series = folder / "timeseries.csv"
        ticks = tuple(_ticks(series)) if series.is_file() else ()
        return cls._of(meta, tuple(sorted(rows, key=lambda row: row["arrival_time"])), ticks)

    @classmethod
    def _of(cls, meta: _Meta, rows: tuple[Mapping[str, Any], ...], ticks: tuple[VllmTick, ...]) -> Self:
        """Make a run of rows as they were logged, in order of arrival."""
        alignment = _align([row["queued_ts"] - row["arrival_time"] for row in rows])
        zero = meta.started_at if meta.started_at is not None else rows[0]["arrival_time"]
        shift = alignment.offset + zero
        requests = tuple(
            VllmRequest(
                request_id=row["request_id"],
                input_tokens=row["input_toks"],
                output_tokens=row["output_toks"],
                arrival=row["arrival_time"] - zero,
                queued=row["queued_ts"] - shift,
                scheduled=row["scheduled_ts"] - shift,
                first_token=row["first_token_ts"] - shift,
                last_token=row["last_token_ts"] - shift,
            )
            for row in rows
        )
        return cls(
            model=meta.model,
            vllm_version=meta.vllm_version,
            settings=copy.deepcopy(meta.settings),
            num_blocks=meta.num_blocks,
            device=meta.device,
            requests=requests,
            ticks=ticks,
            alignment=alignment,
            _meta=meta,
            _rows=rows,
        )

    @property
    def tensor_parallel(self) -> int:
        """Accelerators that share each layer."""
        return int(self.settings.get("tensor_parallel_size") or 1)

    @property
    def data_parallel(self) -> int:
        """Engines that share the requests."""
        return int(self.settings.get("data_parallel_size") or 1)

    def before(self, n: int) -> Self:
        """Return what may be read when a cost model is calibrated on the first ``n`` requests to arrive.

        A run of those requests with their own time stamps, and of the rows of the time series up to the arrival of the
        last of them. It holds nothing else that was measured, and no way back to this run: it equals the run that
        `load` makes of a folder from which everything else has been deleted, also in how its clocks are aligned. (What
        the later requests ask for, and when, is the workload's to say: it is input, not measurement.) Raises
        `WorkloadError` unless ``n`` is from 1 to the number of requests.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(self.requests):
            raise WorkloadError(f"before() takes from 1 to {len(self.requests)} requests, not {n!r}")
        horizon = self.requests[n - 1].arrival
        # From the rows as logged, not from the requests: those were aligned by what came later.
        return self._of(self._meta, self._rows[:n], tuple(tick for tick in self.ticks if tick.t <= horizon))

    def __repr__(self) -> str:
        return (
            f"VllmRun({self.model} on vLLM {self.vllm_version}, {len(self.requests)} requests, "
            f"{len(self.ticks)} ticks, clocks aligned within {self.alignment.spread * 1e3:.2f} ms)"
        )


def _align(delays: list[float]) -> Alignment:
    least = sorted(delays)
    half = len(delays) // 2
    return Alignment(
        offset=least[0],
        spread=least[min(len(least) - 1, max(1, len(least) // 100))] - least[0],
        drift=min(delays[half:]) - min(delays[:half]) if half else 0.0,
    )


# ---- files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Meta:
    model: str
    vllm_version: str
    settings: dict[str, Any]
    started_at: float | None
    num_requests: int | None
    num_blocks: int | None
    device: str | None

    @classmethod
    def read(cls, path: Path) -> _Meta:
        try:
            data = json.loads(_text(path))
        except ValueError as error:
            raise WorkloadError(f"{path}: not JSON: {error}") from None
        if not isinstance(data, dict):
            raise WorkloadError(f"{path}: must be one JSON object, not {type(data).__name__}")
        settings = data.get("engine_kwargs", {})
        if not isinstance(settings, dict):
            raise WorkloadError(f"{path}: engine_kwargs must be an object, not {settings!r}")
        model = data.get("model", settings.get("model"))
        if not isinstance(model, str):
            raise WorkloadError(f"{path}: model must be a name, not {model!r}")
        count = data.get("num_requests")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise WorkloadError(f"{path}: num_requests must be a whole number, not {count!r}")
        started = data.get("started_at")
        pool = _part(data, "kv_cache")
        blocks = pool.get("num_gpu_blocks")
        if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1):
            raise WorkloadError(f"{path}: num_gpu_blocks must be a whole number from 1 up, not {blocks!r}")
        resolved = _part(data, "resolved_config")
        for more in (pool, _part(resolved, "scheduler_config"), _part(resolved, "cache_config")):
            settings |= {k: more[k] for k in _RESOLVED if k in more and settings.get(k) is None}
        device = _part(data, "hardware").get("device_name")
        return cls(
            model=model,
            vllm_version=str(data.get("vllm_version", "unknown")),
            settings=settings,
            started_at=None if started is None else _epoch(path, started),
            num_requests=count,
            num_blocks=blocks,
            device=device if isinstance(device, str) else _card(path.parent) or _card(path.parent.parent),
        )


_RESOLVED = ("block_size", "enable_prefix_caching", "gpu_memory_utilization", "max_num_seqs",
             "max_num_batched_tokens", "async_scheduling")  # fmt: skip
"""Settings that are taken as resolved where they were left open."""


def _part(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object in ``data``, empty if there is none."""
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def _card(folder: Path) -> str | None:
    """Return the card that a simulator's description of the cluster names, if there is one and it can be read."""
    try:
        cluster = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = cluster["nodes"][0]["instances"][0]["hardware"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _epoch(path: Path, value: Any) -> float:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise WorkloadError(f"{path}: started_at must be a date and time (ISO 8601), not {value!r}") from None
    # A time without a zone is taken for UTC, as vLLM's benchmarks write it.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _request_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the file's objects, checked: whole lengths, finite stamps in order, no id twice."""
    seen: dict[str, int] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise WorkloadError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise WorkloadError(f"{where}: must be a JSON object, not {type(row).__name__}")
        for key in ("request_id", "input_toks", "output_toks", *_STAMPS):
            if key not in row:
                raise WorkloadError(f"{where}: no {key}")
        row["request_id"] = str(row["request_id"])
        if row["request_id"] in seen:
            first = seen[row["request_id"]]
            raise WorkloadError(f"{where}: request_id {row['request_id']!r} is also on line {first}")
        seen[row["request_id"]] = number
        for key in ("input_toks", "output_toks"):
            if isinstance(row[key], bool) or not isinstance(row[key], int) or row[key] < 1:
                raise WorkloadError(f"{where}: {key} must be a whole number from 1 up, not {row[key]!r}")
        for key in _STAMPS:
            value = row[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
                raise WorkloadError(f"{where}: {key} must be a number of seconds, not {value!r}")
        for early, late in pairwise(_STAMPS[1:]):
            if row[late] < row[early]:
                raise WorkloadError(f"{where}: {late} {row[late]} is before {early} {row[early]}")
        yield row
    if not seen:
        raise WorkloadError(f"{path}: no requests")


def _ticks(path: Path) -> Iterator[VllmTick]:
    """Yield the rows of the time series, checked: the columns it must have (others may be there), and rising times."""
    reader = csv.reader(_text(path).splitlines())
    header = [name.strip() for name in next(reader, [])]
    for name in _COLUMNS:
        if name not in header:
            raise WorkloadError(f"{path}:1: no column {name}; it must have {', '.join(_COLUMNS)}")
    at = {name: header.index(name) for name in _COLUMNS}
    last = float("-inf")
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if not row:
            continue
        if len(row) != len(header):
            raise WorkloadError(f"{where}: {len(row)} fields, but the header has {len(header)}")
        values = {}
        for name in _COLUMNS:
            try:
                values[name] = float(row[at[name]])
            except ValueError:
                raise WorkloadError(f"{where}: {name} must be a number, not {row[at[name]]!r}") from None
            if not isfinite(values[name]):
                raise WorkloadError(f"{where}: {name} must be a finite number, not {row[at[name]]!r}")
        for name in ("running", "waiting"):
            if values[name] < 0 or values[name] != int(values[name]):
                raise WorkloadError(
                    f"{where}: {name} must be a whole number from 0 up, not {row[at[name]]!r}"
                )
        if values["t"] <= last:
            raise WorkloadError(f"{where}: t {values['t']} does not come after {last}")
        last = values["t"]
        yield VllmTick(
            t=values["t"],
            prompt_throughput=values["prompt_throughput"],
            gen_throughput=values["gen_throughput"],
            running=int(values["running"]),
            waiting=int(values["waiting"]),
            kv_cache_pct=values["kv_cache_pct"],
        )
