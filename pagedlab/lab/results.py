"""`Run`: everything that came out of a run, as text, tables, numbers, figures and files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedlab.config import Config
from pagedlab.engine.clock import StepClock, VirtualClock, to_seconds
from pagedlab.engine.engine import Engine
from pagedlab.engine.sequence import Group
from pagedlab.engine.sequence import Sequence as EngineSequence
from pagedlab.errors import ResultsError
from pagedlab.events import Event
from pagedlab.lab import page
from pagedlab.lab.environment import environment
from pagedlab.lab.loads import prefetched
from pagedlab.lab.measures import DONE, LINKS, MEMORY_KINDS, Columns, Goodput, goodput, summarise
from pagedlab.lab.steps import tables
from pagedlab.lab.vocabulary import vocab_size

if TYPE_CHECKING:
    import pandas as pd

    from pagedlab.lab.job import Job
    from pagedlab.lab.plots import Figure

_KINDS = (*MEMORY_KINDS, "saved")
COLUMNS: dict[str, tuple[str, ...]] = {
    "requests": (
        "request_id",
        "seq",
        "sample",
        "samples",
        "session",
        "priority",
        "arrival",
        "queue_time",
        "ttft",
        "tpot",
        "latency",
        "prompt_tokens",
        "output_tokens",
        "hit_tokens",
        "recomputed_tokens",
        "preemptions",
        "finish_reason",
        "error",
    ),
    "steps": (
        "step",
        "start",
        "duration",
        "running",
        "waiting",
        "prefill_tokens",
        "decode_tokens",
        "moves",
        *(f"blocks_{link}" for link in LINKS),
        "preemptions",
        "recomputed_tokens",
        "context_tokens",
        "prefill_pairs",
    ),
    "events": Event._fields[:-1],
    "memory": ("step", "time", *_KINDS, *(f"{kind}_share" for kind in _KINDS)),
    "outputs": ("request_id", "sample", "prompt", "text", "tokens"),
    "spans": ("seq", "first_step", "steps"),
}
"""The tables of a run, as files of a saved one are called, and their columns."""

_CLOCKS: dict[type, str] = {StepClock: "step", VirtualClock: "virtual"}
_INTEGERS = ("parent_key",)
_SHOWN = 6


class Run:
    """The outcome of one run. Times are in seconds on the engine's clock, memory in tokens.

    The frames are built when they are first asked for. A loaded run answers everything that a fresh one does; its
    ``config`` needs the policies that it names to be registered.
    """

    def __init__(
        self,
        *,
        columns: dict[str, Columns],
        description: dict[str, Any],
        facts: dict[str, Any],
        config: Config | None = None,
    ) -> None:
        self._columns = columns
        self._config = config
        self.description = description
        """The configuration as plain data; policies by name."""
        self.facts = facts
        """Workload, totals, versions, hardware, kernel and layout, as `save` writes them."""

    @classmethod
    def of(cls, job: Job, *, interrupted: bool, ended: bool = False) -> Run:
        """Return what ``job`` has done so far. If it has ``ended`` for good, tables are built when asked for."""
        engine, executor = job.engine, job.executor
        engine.tables()  # brings lengths up to date
        columns = _columns(engine, executor, ended=ended)
        facts = {
            "workload": {"name": job.workload.name, "description": job.workload.description},
            "interrupted": interrupted,
            "clock": _CLOCKS.get(type(engine.clock), "wall"),
            "has_text": executor.detokenize([]) is not None,
            "vocab_size": vocab_size(executor),
            "max_model_len": engine.max_model_len,
            "totals": {
                "prompt_tokens": engine.totals.prompt_tokens,
                "hit_tokens": engine.totals.hit_tokens,
                "recomputed_tokens": engine.totals.recomputed_tokens,
                "preemptions": engine.totals.preemptions,
                "swapped_out": engine.totals.swapped_out,
                "tier_faults": engine.totals.tier_faults,
                **{f"blocks_{link}": n for link, n in engine.totals.moved._asdict().items()},
                **{f"prefetch_{fate}": n for fate, n in engine.prefetched.items()},
            },
            "used": _used(executor),
            **environment(),
        }
        return cls(columns=columns, description=job.config.describe(), facts=facts, config=job.config)

    # ---- what was said -----------------------------------------------------------------------------------------

    @cached_property
    def outputs(self) -> list[Any]:
        """The texts, request by request in the workload's order (token lists where the model has no tokenizer).

        A request of n > 1 samples gives a list of n; one that was refused gives None.
        """
        return self._by_request("text" if self.facts["has_text"] else "tokens")

    @cached_property
    def tokens(self) -> list[Any]:
        """The output token ids, shaped as `outputs`."""
        return self._by_request("tokens")

    def _by_request(self, column: str) -> list[Any]:
        said, requests = self._columns["outputs"], self._columns["requests"]
        grouped: dict[str, list[Any]] = {}
        wanted: dict[str, int] = {}
        for i, request_id in enumerate(said["request_id"]):
            refused = requests["finish_reason"][i] == "refused"
            grouped.setdefault(request_id, []).append(None if refused else said[column][i])
            wanted[request_id] = requests["samples"][i]
        return [v[0] if wanted[k] == 1 or v == [None] else v for k, v in grouped.items()]

    # ---- tables ------------------------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per sequence: arrival, queue_time, ttft, tpot, latency (s), tokens, hits, finish_reason, error."""
        return self._frame("requests")

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row per step: start and duration (s), running and waiting sequences, tokens, and blocks moved.

        ``moves`` is the sum of ``blocks_to_host``, ``blocks_to_device``, ``blocks_copied`` (inside the device) and
        ``blocks_to_disk``; ``blocks_from_disk`` are among those to the device;
        ``preemptions`` and ``recomputed_tokens`` count from the beginning of the run.
        """
        return self._frame("steps")

    @cached_property
    def events(self) -> pd.DataFrame:
        """One row per event, see `pagedlab.events`; times in seconds."""
        return self._frame("events")

    @cached_property
    def memory(self) -> pd.DataFrame:
        """One row per step: where the pool's token slots were, in tokens and as shares of the pool."""
        return self._frame("memory")

    @cached_property
    def prefetch(self) -> pd.DataFrame:
        """One row per block prefetched: ``time``, ``block``, ``key``, and its ``fate``: useful, late, harmful, useless.

        ``fate_time`` is when that was known, None for a block that nobody had used when the run ended. Empty if the run
        kept no event log.
        """
        import pandas as pd

        return pd.DataFrame(prefetched(self._columns["events"], ended=not self.interrupted))

    def columns(self, table: str) -> dict[str, list[Any]]:
        """Return a table as one list a column, without pandas."""
        arrays = self.arrays(table)
        return {n: c.tolist() if isinstance(c, np.ndarray) else c for n, c in arrays.items()}

    def arrays(self, table: str) -> Columns:
        """Return a table as it is kept, to be read only: numpy arrays [num_rows] for numbers, lists for all else.

        ``steps``, ``memory`` and ``spans`` are arrays throughout, unless a saved run knows nothing of a column.
        """
        if table not in COLUMNS:
            raise ResultsError(f"a run has no table {table!r}; it has: {', '.join(COLUMNS)}")
        return self._columns[table]

    def _frame(self, table: str) -> pd.DataFrame:
        import pandas as pd

        columns = self._columns[table]
        # Keys fill 64 bits, which a column of floats (the usual home of a None) would round.
        typed = {n: pd.array(c, dtype="Int64") if n in _INTEGERS else c for n, c in columns.items()}
        return pd.DataFrame(typed)

    # ---- numbers -----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The configuration. `ConfigError` if this is a loaded run and names a policy that is not registered here."""
        if self._config is None:
            self._config = Config.from_dict(self.description, "config of the saved run")
        return self._config

    @property
    def interrupted(self) -> bool:
        """True if somebody stopped the run before its work was done."""
        return bool(self.facts["interrupted"])

    @property
    def errors(self) -> dict[str, str]:
        """What went wrong, by request id: refused requests and failed ones."""
        requests = self._columns["requests"]
        return {r: e for r, e in zip(requests["request_id"], requests["error"]) if e}

    def summary(self) -> dict[str, Any]:
        """The run in numbers: see `pagedlab.lab.measures.summarise` for what each one means."""
        return dict(self._summary)

    def goodput(self, *, ttft: float | None = None, tpot: float | None = None) -> Goodput:
        """Return how many requests met a service level: share of those finished, per second, and the counts.

        A request meets it if its first token came within ``ttft`` seconds of its arrival and the others took ``tpot``
        seconds each on average, or less. `ConfigError` if neither is given, or one is no number above 0.
        """
        return goodput(self._columns, ttft=ttft, tpot=tpot)

    @cached_property
    def _summary(self) -> dict[str, Any]:
        return summarise(self._columns, self.facts)

    # ---- shown and kept ----------------------------------------------------------------------------------------

    def plot(self, what: str = "overview") -> Figure:
        """Return a figure.

        Over time: ``"memory"`` by kind, ``"batch"`` (running and waiting), ``"throughput"``, ``"hits"`` (prefix-hit
        ratio and recomputed tokens), ``"preemptions"``, ``"moved"`` (bytes over each link). Distributions:
        ``"latency"`` has all of them; ``"queue_time"``, ``"ttft"``, ``"tpot"``, ``"itl"``, ``"e2e_latency"`` are one
        each, with percentiles. ``"overview"`` is memory, batch and latency. `ConfigError` names these for any other.
        """
        from pagedlab.lab import plots

        return plots.of_run(self, what)

    def save(self, path: str | Path) -> Path:
        """Write the run to a folder: one Parquet file a table, and ``run.json``. Returns the folder.

        A folder that holds a saved run is replaced; raises `ResultsError` for one that holds anything else.
        """
        from pagedlab.lab.saved import save_run

        return save_run(self, path)

    def __repr__(self) -> str:
        s = self._summary
        speed = "" if s["tokens_per_s"] is None else f", {s['tokens_per_s']:.4g} tokens/s"
        state = ", interrupted" if self.interrupted else ""
        return f"<run of {s['requests']} requests: {s['output_tokens']} tokens{speed}{state}>"

    def _repr_html_(self) -> str:
        s = self._summary
        title = f"{self.facts['workload']['name']}: {s['requests']} requests"
        state = " (interrupted)" if self.interrupted else ""
        parts = [page.table(("", ""), page.summary_rows(s), caption=title + state)]
        said, requests = self._columns["outputs"], self._columns["requests"]
        rows = []
        for i in range(min(_SHOWN, len(said["request_id"]))):
            answer = said["text"][i] if said["text"][i] is not None else str(said["tokens"][i])
            rows.append(
                (
                    requests["request_id"][i],
                    page.shorten(said["prompt"][i] or f"{requests['prompt_tokens'][i]} tokens", end=True),
                    page.shorten(requests["error"][i] or answer or ""),
                    requests["finish_reason"][i] or "unfinished",
                )
            )
        parts.append(page.table(("request", "prompt", "output", "end"), rows, code=(1, 2)))
        return "<div>" + "".join(parts) + "</div>"


def _used(executor: Any) -> dict[str, Any]:
    """Which kernel, layout and dtype did the work: ``kernel="auto"`` has become one by now. And what a block weighs."""
    used: dict[str, Any] = {
        "executor": type(executor).__name__,
        "kernel": None,
        "layout": None,
        "dtype": None,
        "kv_bytes_per_block": getattr(executor, "kv_bytes_per_block", 0) or None,
    }
    for slot in ("kernel", "layout"):
        policy = getattr(executor, slot, None)
        if policy is not None:
            used[slot] = policy.name or type(policy).__name__
    loaded = getattr(executor, "loaded", None)
    if loaded is not None:
        used["dtype"] = str(loaded.dtype).removeprefix("torch.")
        used["kv_bytes_per_token"] = loaded.kv_bytes_per_token
    if (device := getattr(executor, "device", None)) is not None:
        used["device"] = str(device)
    return used


class _Tables(dict[str, Columns]):
    """The tables of an engine's run, each built when it is first asked for."""

    def __init__(self, engine: Engine, executor: Any) -> None:
        super().__init__()
        self._engine, self._executor = engine, executor
        self._sequences = [
            (g, s) for g in engine.groups.values() for s in sorted(g.sequences, key=lambda s: s.sample_index)
        ]

    def __missing__(self, table: str) -> Columns:
        engine, executor = self._engine, self._executor
        if table == "requests":
            self[table] = _request_columns(self._sequences)
        elif table == "outputs":
            each = self._sequences
            self[table] = {
                "request_id": [s.request_id for _, s in each],
                "sample": [s.sample_index for _, s in each],
                "prompt": [g.request.text for g, _ in each],
                "text": [executor.detokenize(s.output) if s.text is None else s.text for _, s in each],
                "tokens": [list(s.output) for _, s in each],
            }
        elif table == "spans":
            spans = [s.spans for _, s in self._sequences]
            seqs = np.array([s.seq_id for _, s in self._sequences], dtype=np.int64)
            both = chain.from_iterable(chain.from_iterable(spans))
            first, steps = np.ascontiguousarray(np.fromiter(both, dtype=np.int64).reshape(-1, 2).T)
            self[table] = {
                "seq": seqs.repeat([len(each) for each in spans]),
                "first_step": first,
                "steps": steps,
            }
        elif table == "events":
            events = engine.events.columns()
            events["time"] = [to_seconds(t) for t in events["time"]]
            self[table] = events
        else:
            pool = max(engine.cache.device.capacity * engine.config.block_size, 1)
            self["steps"], self["memory"] = tables(engine.steps, pool)
        return self[table]


def _columns(engine: Engine, executor: Any, *, ended: bool) -> dict[str, Columns]:
    """Return a run's tables; of one that goes on, as they are now."""
    built = _Tables(engine, executor)
    return built if ended else {table: built[table] for table in COLUMNS}


def _request_columns(sequences: list[tuple[Group, EngineSequence]]) -> Columns:
    groups, seqs = [g for g, _ in sequences], [s for _, s in sequences]
    arrived, first = [g.arrival for g in groups], [s.first_token_at for s in seqs]
    num_output = [s.num_output for s in seqs]
    last = [
        None if n < 2 else s.finished_at if s.finish_reason in DONE else s.last_token_at
        for s, n in zip(seqs, num_output)
    ]
    ended = [None if s.finish_reason == "refused" else s.finished_at for s in seqs]
    return {
        "request_id": [s.request_id for s in seqs],
        "seq": [s.seq_id for s in seqs],
        "sample": [s.sample_index for s in seqs],
        "samples": [g.request.sampling.n for g in groups],
        "session": [s.session for s in seqs],
        "priority": [s.priority for s in seqs],
        "arrival": [to_seconds(t) for t in arrived],
        "queue_time": _between(arrived, [s.admitted_at for s in seqs]),
        "ttft": _between(arrived, first),
        "tpot": [None if t is None else t / (n - 1) for t, n in zip(_between(first, last), num_output)],
        "latency": _between(arrived, ended),
        "prompt_tokens": [s.prompt_len for s in seqs],
        "output_tokens": num_output,
        "hit_tokens": [s.hit_tokens for s in seqs],
        "recomputed_tokens": [s.recomputed_tokens for s in seqs],
        "preemptions": [s.num_preemptions for s in seqs],
        "finish_reason": [s.finish_reason for s in seqs],
        "error": [s.error for s in seqs],
    }


def _between(starts: Sequence[int | None], ends: Sequence[int | None]) -> list[float | None]:
    """Return the seconds from each start to its end, None where one of them has not come."""
    return [None if a is None or b is None else to_seconds(b - a) for a, b in zip(starts, ends)]


def same_tokens(one: Run, other: Run) -> bool:
    """Whether two runs said the same, request by request."""
    return _said(one) == _said(other)


def _said(run: Run) -> dict[tuple[str, int], Sequence[int]]:
    said = run.columns("outputs")
    return {(r, s): list(t) for r, s, t in zip(said["request_id"], said["sample"], said["tokens"])}
