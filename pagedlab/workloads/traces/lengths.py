"""Traces of which only lengths are known: Azure, vidur's arXiv, BurstGPT, and vLLM's own measurements.

Their prompts share nothing: each is a `HashedPrompt` with one private id that is never a whole block
(`pagedlab.workloads.parts.PRIVATE_BLOCK`).
"""

from __future__ import annotations

import hashlib
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from pagedlab.engine.request import Request
from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt
from pagedlab.workloads.parts import Arrivals, fixed, private_prompt
from pagedlab.workloads.traces.reading import (
    Bad,
    Reader,
    Table,
    json_object,
    number,
    read_all,
    read_table,
    shown,
    text_of,
    trace_name,
    whole,
)
from pagedlab.workloads.traces.tokens import llmservingsim
from pagedlab.workloads.workload import Workload

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def azure(path: str | Path, *, skip_bad: bool = False, limit: int | None = None) -> Workload:
    """Read an Azure LLM inference trace: CSV with ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``.

    Time stamps may have a zone, as in the traces of 2024, or none, as in those of 2023; both may miss the fraction.
    Arrivals count from the first. Microseconds are kept. Source: Azure/AzurePublicDataset (CC-BY-4.0). Tried on the
    real files of 2023; of those of 2024 only on samples made by hand. Raises `WorkloadError`.
    """
    reader = Reader(path, skip_bad=skip_bad, limit=limit)

    def parse(row: Table) -> tuple[int, int, int]:
        return _micros(row.text("TIMESTAMP") or ""), row.whole("ContextTokens"), row.whole("GeneratedTokens")

    rows = list(read_table(reader, parse, "TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    first = min((at for _, (at, _, _) in rows), default=0)
    requests = [
        fixed(f"azure-{line}", private_prompt(line, tokens), output, (at - first) / 1e6)
        for line, (at, tokens, output) in rows
    ]
    return reader.workload(trace_name(reader.path), requests, "Azure LLM inference trace: lengths only.")


def _micros(stamp: str) -> int:
    try:
        at = datetime.fromisoformat(stamp)
        return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        raise Bad(
            f"TIMESTAMP must be a date and time like 2023-11-16 18:17:03.979960, not {shown(stamp)}"
        ) from None


def vidur(
    path: str | Path,
    *,
    rate: float | None = None,
    burstiness: float = 1.0,
    seed: int = 0,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Workload:
    """Read a list of lengths as vidur has them: CSV with ``num_prefill_tokens`` and ``num_decode_tokens``.

    It has no times: requests come at ``rate`` a second (see `Arrivals`), or all at once. Source: microsoft/vidur,
    data/processed_traces (MIT). Raises `WorkloadError`.
    """
    reader = Reader(path, skip_bad=skip_bad, limit=limit)
    arrive = Arrivals(random.Random(seed), rate, burstiness)

    def parse(row: Table) -> tuple[int, int]:
        return row.whole("num_prefill_tokens"), row.whole("num_decode_tokens")

    requests = [
        fixed(f"vidur-{line}", private_prompt(line, tokens), output, next(arrive))
        for line, (tokens, output) in read_table(reader, parse, "num_prefill_tokens", "num_decode_tokens")
    ]
    return reader.workload(trace_name(reader.path), requests, "Lengths as vidur has them, without times.")


class _Row(NamedTuple):
    """One line of BurstGPT."""

    at: float
    tokens: int
    output: int
    kind: str | None
    session: str | None
    elapsed: float | None


def burstgpt(
    path: str | Path,
    *,
    model: str | None = None,
    closed_loop: bool = False,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Workload:
    """Read BurstGPT: CSV with ``Timestamp`` (s), ``Request tokens``, ``Response tokens``, and more in some releases.

    ``Log Type`` becomes `Request.request_class` and ``Session ID`` the session, where these columns are there and
    filled. ``model`` keeps the rows of one ``Model`` ("ChatGPT" or "GPT-4"; case does not matter). Arrivals count
    from the earliest row that is kept. With ``closed_loop`` a request follows the one before it in its session,
    after what the time stamps and ``Elapsed time`` (how long the answer took) leave between them.

    Rows with 0 response tokens are requests that failed; they are refused, or left out with ``skip_bad``. Source:
    HPMLL/BurstGPT (CC-BY-4.0). The reader was written from the published columns and tried on small samples made by
    hand, not on the real files. Raises `WorkloadError`.
    """
    reader = Reader(path, skip_bad=skip_bad, limit=limit)

    def parse(row: Table) -> _Row | None:
        if model is not None and (row.text("Model") or "").casefold() != model.casefold():
            return None
        return _Row(
            row.number("Timestamp"),
            row.whole("Request tokens"),
            row.whole("Response tokens"),
            row.text("Log Type") or None,
            row.text("Session ID") or None,
            row.number("Elapsed time") if row.text("Elapsed time") else None,
        )

    needed = ["Timestamp", "Request tokens", "Response tokens"] + ["Model"] * (model is not None)
    needed += ["Session ID", "Elapsed time"] * closed_loop
    rows = list(read_table(reader, parse, *needed))
    rows.sort(key=lambda r: r[1].at)
    first = rows[0][1].at if rows else 0.0
    requests: list[Request] = []
    last: dict[str, tuple[str, float]] = {}
    for line, row in rows:
        name = f"burstgpt-{line}"
        follows, pause = None, 0.0
        if closed_loop and row.session is not None:
            if row.session in last:
                follows, end = last[row.session]
                pause = max(0.0, row.at - end)
            # Without a known end nothing can be said of the pause: the next one comes at its own time.
            last.pop(row.session, None)
            if row.elapsed is not None:
                last[row.session] = (name, row.at + row.elapsed)
        requests.append(
            fixed(
                name,
                private_prompt(line, row.tokens),
                row.output,
                row.at - first,
                row.session,
                request_class=row.kind,
                follows=follows,
                think_time=pause,
            )
        )
    return reader.workload(trace_name(reader.path), requests, "BurstGPT: lengths only.")


def vllm(
    path: str | Path,
    *,
    dataset: str | Path | None = None,
    tokens: bool = True,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Workload:
    """Read what a benchmark of vLLM sent: a folder with ``requests.jsonl`` and ``meta.json``, or the former alone.

    A line has ``request_id``, ``input_toks``, ``output_toks`` and ``arrival_time`` (s, by the client's clock; arrivals
    count from the first), besides what vLLM measured, which is no part of a workload. ``meta.json`` names the file of
    prompts and its SHA-256. With ``tokens`` that file is looked for beside the run and in the folder ``workloads``
    next to the folder of runs; ``dataset`` names it instead. If it is there and is the right one, the requests have its
    token ids and the workload its outputs, row by row; else only lengths are known.
    Source: casys-kaist/LLMServingSim, bench/examples (MIT). Raises `WorkloadError`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    reader = Reader(folder / "requests.jsonl" if path.is_dir() else path, skip_bad=skip_bad, limit=limit)
    name = folder.name if path.is_dir() else trace_name(path)
    prompts = _prompts(folder, dataset) if tokens or dataset is not None else None
    by_line = {} if prompts is None else {r.request_id.rpartition("-")[2]: r for r in prompts}
    seen: set[str] = set()

    def parse(line: str) -> tuple[str, int, int, float]:
        row = json_object(line)
        request_id = text_of(row, "request_id")
        if request_id in seen:
            raise Bad(f"request_id {shown(request_id)} comes twice")
        seen.add(request_id)
        return request_id, whole(row, "input_toks"), whole(row, "output_toks"), number(row, "arrival_time")

    rows = list(reader.each(parse))
    first = min((at for _, (_, _, _, at) in rows), default=0.0)
    requests: list[Request] = []
    outputs: dict[str, list[int]] = {}
    for line, (request_id, size, output, at) in rows:
        prompt: HashedPrompt | list[int] = private_prompt(line, size)
        if prompts is not None:
            sent = by_line.get(str(line))
            if sent is None or (len(sent.prompt), sent.sampling.max_tokens) != (size, output):
                raise WorkloadError(
                    f"{reader.path}:{line}: {size} input and {output} output tokens are not what the prompts "
                    "in its dataset have; read it with tokens=False"
                )
            prompt = list(sent.prompt)
            if prompts.outputs is not None:
                outputs[request_id] = list(prompts.outputs.get(sent.request_id, ()))
        requests.append(fixed(request_id, prompt, output, at - first))
    about = "What a benchmark of vLLM sent, " + (
        "lengths only." if prompts is None else "with its token ids."
    )
    return reader.workload(name, requests, about, content_ids=prompts is None, outputs=outputs)


def _prompts(folder: Path, dataset: str | Path | None) -> Workload | None:
    """Return the workload that the benchmark read; None if it is not at hand."""
    if dataset is not None:
        return _with_tokens(dataset)
    meta: dict[str, Any] = {}
    file = folder / "meta.json"
    if file.is_file():
        try:
            meta = json_object(read_all(file).decode("utf-8-sig"))
        except (Bad, UnicodeDecodeError) as error:
            raise WorkloadError(f"{file}: {error}") from None
    name, wanted = meta.get("dataset_path"), meta.get("dataset_hash")
    if not isinstance(name, str) or not isinstance(wanted, str):
        return None
    last = name.replace("\\", "/").rpartition("/")[2]
    for where in (folder, folder.parent.parent / "workloads"):
        for candidate in (where / last, where / f"{last}.gz"):
            if candidate.is_file() and hashlib.sha256(read_all(candidate)).hexdigest() == wanted:
                return _with_tokens(candidate)
    return None


def _with_tokens(file: str | Path) -> Workload | None:
    given = llmservingsim(file)
    return None if given.content_ids else given
