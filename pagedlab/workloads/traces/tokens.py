"""Traces that bring the prompts themselves, as text or token ids: LLMServingSim, LMCache's agents, and your own."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pagedlab.engine.request import Request
from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt
from pagedlab.workloads.parts import check_least, fixed, private_prompt
from pagedlab.workloads.traces.reading import (
    DAMAGED,
    Bad,
    Reader,
    id_list,
    json_object,
    number,
    numbered,
    numbered_lines,
    open_file,
    shown,
    text_of,
    trace_name,
    whole,
)
from pagedlab.workloads.workload import Workload


def llmservingsim(path: str | Path, *, skip_bad: bool = False, limit: int | None = None) -> Workload:
    """Read a workload of LLMServingSim: JSON lines with lengths, times and perhaps token ids.

    Fields: ``input_toks``, ``output_toks``, ``arrival_time_ns``, and in all lines or in none ``input_tok_ids`` and
    ``output_tok_ids`` (the latter become `Workload.outputs`). Ids belong to the vocabulary of the model that they
    were made for. Source: casys-kaist/LLMServingSim, workloads (MIT). Raises `WorkloadError`.
    """
    reader = Reader(path, skip_bad=skip_bad, limit=limit)
    has_ids: list[bool] = []

    def parse(line: str) -> tuple[float, int, int, list[int] | None, list[int] | None]:
        row = json_object(line)
        tokens, output = whole(row, "input_toks"), whole(row, "output_toks")
        prompt = _counted(row, "input_tok_ids", tokens) if "input_tok_ids" in row else None
        said = _counted(row, "output_tok_ids", output) if "output_tok_ids" in row else None
        at = number(row, "arrival_time_ns") / 1e9
        if has_ids and has_ids[0] != (prompt is not None):
            raise Bad("input_tok_ids must be in all lines or in none")
        has_ids.append(prompt is not None)
        return at, tokens, output, prompt, said

    requests: list[Request] = []
    outputs: dict[str, list[int]] = {}
    for line, (at, tokens, output, ids, said) in reader.each(parse):
        name = f"request-{line}"
        requests.append(fixed(name, private_prompt(line, tokens) if ids is None else ids, output, at))
        if said is not None:
            outputs[name] = said
    known = any(has_ids)
    about = f"LLMServingSim workload, {'with token ids' if known else 'lengths only'}."
    return reader.workload(trace_name(reader.path), requests, about, content_ids=not known, outputs=outputs)


def _counted(row: dict[str, Any], key: str, count: int) -> list[int]:
    ids = id_list(row, key)
    if len(ids) != count:
        raise Bad(f"{key} holds {len(ids)} ids where {count} are announced")
    return ids


def token_lines(path: str | Path, *, skip_bad: bool = False, limit: int | None = None) -> Workload:
    """Read prompts of your own: JSON lines with ``prompt``, a text or a list of token ids.

    Further fields may be left out: ``max_tokens`` (64; every output has exactly so many), ``arrival`` (0 s), ``id``,
    ``session``, ``follows`` (the id of an earlier line), ``think_time`` (s), ``output`` (token ids, for
    `Workload.outputs`). Raises `WorkloadError`.
    """
    reader = Reader(path, skip_bad=skip_bad, limit=limit)
    seen: set[str] = set()
    outputs: dict[str, list[int]] = {}

    def parse(line: str) -> Request:
        row = json_object(line)
        name = text_of(row, "id") if "id" in row else f"line-{reader.line}"
        if name in seen:
            raise Bad(f"id {shown(name)} comes twice")
        is_text = isinstance(row.get("prompt"), str)
        prompt = [] if is_text else id_list(row, "prompt")
        if not is_text and not prompt:
            raise Bad("prompt must be a text or a list of at least 1 token id")
        follows = text_of(row, "follows") if row.get("follows") is not None else None
        if follows is not None and follows not in seen:
            raise Bad(f"follows must be the id of an earlier line, not {shown(follows)}")
        output = whole(row, "max_tokens") if "max_tokens" in row else 64
        request = fixed(
            name,
            prompt,
            output,
            number(row, "arrival") if "arrival" in row else 0.0,
            text_of(row, "session") if row.get("session") is not None else None,
            follows=follows,
            think_time=number(row, "think_time") if "think_time" in row else 0.0,
            text=text_of(row, "prompt") if is_text else None,
        )
        if row.get("output") is not None:
            outputs[name] = _counted(row, "output", output)
        seen.add(name)
        return request

    requests = [request for _, request in reader.each(parse)]
    about = "Prompts from a file."
    return reader.workload(trace_name(reader.path), requests, about, content_ids=False, outputs=outputs)


class _Step(NamedTuple):
    """One call of an agent."""

    micros: float
    prompt: str
    output: str
    session: str


def lmcache_agent(
    path: str | Path,
    *,
    tokenize: Callable[[str], Sequence[int]] | None = None,
    chars_per_token: float = 4.0,
    skip_bad: bool = False,
) -> Workload:
    """Read LMCache's agent traces: JSON lines with the texts; a file, a folder of them, or a tar of them.

    Fields: ``timestamp`` (µs), ``input``, ``output`` (texts), ``session_id``. Arrivals count from the earliest. The
    files are not in order of time; in that order each prompt of a session repeats the one before it, and
    `Hints.agent_step` counts them from 0. Open loop: how long answers took is not recorded.

    With ``tokenize`` (text to token ids) prompts are token ids, outputs have their true lengths, and
    `Workload.outputs` holds them. Without it prompts stay texts, for the model that serves them, and an output's
    length is estimated as its characters divided by ``chars_per_token``.
    Source: LMCache/lmcache-agent-trace (Apache-2.0). Raises `WorkloadError`.
    """
    check_least(0.01, chars_per_token=chars_per_token)
    reader = Reader(path, skip_bad=skip_bad)

    def parse(line: str) -> _Step:
        row = json_object(line)
        return _Step(
            number(row, "timestamp"),
            text_of(row, "input"),
            text_of(row, "output", empty=True),
            text_of(row, "session_id"),
        )

    steps = [step for name, lines in _agent_files(reader.path) for _, step in reader.each(parse, lines, name)]
    steps.sort(key=lambda s: s.micros)
    first = steps[0].micros if steps else 0.0
    requests: list[Request] = []
    outputs: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    for step in steps:
        k = counts[step.session] = counts.get(step.session, -1) + 1
        name = f"{step.session}-{k}"
        prompt: list[int] | HashedPrompt = []
        length = max(1, math.ceil(len(step.output) / chars_per_token))
        if tokenize is not None:
            prompt = list(tokenize(step.prompt))
            outputs[name] = list(tokenize(step.output))
            length = max(1, len(outputs[name]))
        text = step.prompt if tokenize is None else None
        at = (step.micros - first) / 1e6
        requests.append(fixed(name, prompt, length, at, step.session, agent_step=k, text=text))
    about = f"{len(counts)} agents with the texts of their prompts."
    return reader.workload(trace_name(reader.path), requests, about, content_ids=False, outputs=outputs)


def _agent_files(path: Path) -> Iterator[tuple[str, Iterable[tuple[int, bytes]]]]:
    """Yield every JSON-lines file of a folder or a tar, or the file itself, with its lines. Nothing is unpacked."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith((".jsonl", ".jsonl.gz")) and f.is_file())
        if not files:
            raise WorkloadError(f"{path}: no .jsonl or .jsonl.gz file in it")
        yield from ((str(file), numbered_lines(file)) for file in files)
    elif is_tar(path):
        try:
            with open_file(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    if member.isfile() and member.name.endswith(".jsonl"):
                        name = f"{path}/{member.name}"
                        content = tar.extractfile(member)
                        assert content is not None  # a plain file has content
                        yield name, numbered(content, name)
        except DAMAGED as error:
            raise WorkloadError(f"{path}: damaged or cut off: {error}") from None
    else:
        yield str(path), numbered_lines(path)


def is_tar(path: Path) -> bool:
    """Return whether a file is a tar, perhaps through gzip; raises `WorkloadError` if it cannot be read."""
    try:
        with open_file(path) as file:
            head = file.read(512)
    except DAMAGED:
        return False
    return head[257:262] == b"ustar"
