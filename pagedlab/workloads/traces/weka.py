"""Recorded sessions of coding agents, with sub-agents, hashes and times: the WEKA format."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt
from pagedlab.workloads.parts import check_least, fixed
from pagedlab.workloads.traces.reading import (
    Bad,
    Reader,
    id_list,
    json_object,
    number,
    read_all,
    shown,
    text_of,
    trace_name,
    whole,
)
from pagedlab.workloads.workload import Workload

_ROUNDING = 1.0
"""Seconds: times of requests are whole seconds and those of answers are not, so an answer may seem to end later."""
_DEEPEST = 16


@dataclass(slots=True)
class _Call:
    """One request to the model."""

    at: float
    tokens: int
    output: int
    ids: list[int]
    kind: str
    follows: int | None = None
    think_time: float = 0.0


_Ends = list[tuple[float, int]]
"""When calls ended, in order of time: (seconds, number of the call)."""


@dataclass(slots=True)
class _Session:
    name: str
    block: int
    local: bool
    calls: list[_Call] = field(default_factory=list)

    @property
    def highest(self) -> int:
        return max((max(c.ids, default=0) for c in self.calls), default=0)


def weka(
    path: str | Path, *, closed_loop: bool = True, session_gap: float = 0.0, skip_bad: bool = False
) -> Workload:
    """Read sessions of coding agents: one JSON file, or a folder with one file for each session.

    A session holds ``requests`` with ``t`` (seconds since it began), ``in`` and ``out`` (tokens), ``hash_ids`` (one for
    every full block of ``block_size`` tokens; the partial last block gets an id here that nobody shares), ``api_time``
    (how long the answer took) and ``think_time`` (from the end of an answer to the next request). Entries of type
    ``subagent`` hold requests of their own, which share the session's hashes. With ``hash_id_scope`` "local" the
    same number means something else in every session, and ids are renumbered so that none is shared between two.

    In the closed loop a request follows the one whose answer ended last before it was sent: in its own stream; for a
    sub-agent's first request in the one that called it; and after a sub-agent, perhaps the sub-agent's last. The
    pause is the recorded ``think_time``, or what lies between the two where none is recorded. Requests whose end is
    not recorded have no followers, so several requests can follow one. Otherwise all come at their recorded times.
    The k-th session (in order of file names) begins ``k * session_gap`` seconds after the first.

    An ``out`` of 0 (the client left before the first token) counts as one token: its prompt was computed. Requests of
    the agent itself are of class "agent", those of sub-agents "subagent"; `Hints.agent_step` counts from 0.
    Source: callanjfox/kv-cache-tester (Apache-2.0). Raises `WorkloadError`.
    """
    check_least(0, session_gap=session_gap)
    reader = Reader(path, skip_bad=skip_bad)
    sessions: list[_Session] = []
    for i, file in enumerate(session_files(reader.path)):
        try:
            session = _Reading(reader, file).session()
            if any(session.name == other.name for other in sessions):
                raise Bad(f"session {shown(session.name)} comes twice")
            sessions.append(session)
        except Bad as error:
            reader.refuse(i + 1, error, str(file))
    requests = []
    renumbered = _renumber(sessions)
    for k, session in enumerate(sessions):
        start = k * session_gap
        for n, call in enumerate(session.calls):
            requests.append(
                fixed(
                    f"{session.name}-{n}",
                    next(renumbered),
                    call.output,
                    start + call.at,
                    session.name,
                    request_class=call.kind,
                    agent_step=n,
                    follows=None
                    if call.follows is None or not closed_loop
                    else f"{session.name}-{call.follows}",
                    think_time=call.think_time if closed_loop else 0.0,
                )
            )
    about = f"{len(sessions)} coding sessions in {'closed' if closed_loop else 'open'} loop."
    return reader.workload(trace_name(reader.path), requests, about)


def session_files(path: Path) -> list[Path]:
    """Return the file itself, or the JSON files of a folder by name; raises `WorkloadError` if there are none."""
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.iterdir() if f.name.endswith((".json", ".json.gz")) and f.is_file())
    if not files:
        raise WorkloadError(f"{path}: no .json or .json.gz file in it")
    return files


def _renumber(sessions: list[_Session]) -> Iterator[HashedPrompt]:
    """Yield the prompts of all calls, in order, with ids that are equal only where blocks are."""
    shared = 1 + max((s.highest for s in sessions if not s.local), default=-1)
    bases = []
    for session in sessions:
        bases.append(shared if session.local else 0)
        shared += session.highest + 1 if session.local else 0
    spare = shared
    for session, base in zip(sessions, bases, strict=True):
        for call in session.calls:
            ids = [base + i for i in call.ids]
            if len(ids) * session.block < call.tokens:
                ids.append(spare)
                spare += 1
            yield HashedPrompt(ids, call.tokens, session.block)


class _Reading:
    """One file being read."""

    def __init__(self, reader: Reader, file: Path) -> None:
        self.reader, self.file = reader, file
        self.calls: list[_Call] = []

    def session(self) -> _Session:
        try:
            data = json_object(read_all(self.file).decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise Bad("not UTF-8 text") from None
        self.block = whole(data, "block_size") if "block_size" in data else 64
        scope = data.get("hash_id_scope", "local")
        if scope not in ("local", "global"):
            raise Bad(f"hash_id_scope must be local or global, not {shown(scope)}")
        name = text_of(data, "id") if "id" in data else trace_name(self.file)
        self._walk(data, "", "agent", 0, [])
        return _Session(name, self.block, scope == "local", self.calls)

    def _walk(self, holder: dict[str, Any], where: str, kind: str, depth: int, outside: _Ends) -> _Ends:
        """Read ``holder["requests"]`` and return when its calls ended; ``outside`` are ends of those around it."""
        entries = holder.get("requests")
        if not isinstance(entries, list) or depth > _DEEPEST:
            raise Bad(f"{where}requests must be a list of requests, at most {_DEEPEST} levels deep")
        ended: _Ends = []
        own: set[int] = set()
        for i, entry in enumerate(entries):
            at = f"{where}requests[{i}]"
            try:
                if not isinstance(entry, dict):
                    raise Bad(f"must be an object, not {shown(entry)}")
                if "requests" in entry or entry.get("type") == "subagent":
                    within = self._walk(entry, f"{at}.", "subagent", depth + 1, ended or outside)
                    for finished in within:
                        insort(ended, finished)
                    continue
                call = self._call(entry, kind)
                end = call.at + number(entry, "api_time") if entry.get("api_time") is not None else None
                think = number(entry, "think_time") if entry.get("think_time") is not None else None
            except Bad as error:
                self.reader.refuse(i + 1, error, f"{self.file}: {at}")
                continue
            if (last := _latest(ended, call.at) or _latest(outside, call.at)) is not None:
                call.follows = last[1]
                recorded = think is not None and last[1] in own
                call.think_time = think if recorded and think is not None else max(0.0, call.at - last[0])
            if end is not None:
                insort(ended, (end, len(self.calls)))
            own.add(len(self.calls))
            self.calls.append(call)
        return ended

    def _call(self, entry: dict[str, Any], kind: str) -> _Call:
        tokens, output = whole(entry, "in"), whole(entry, "out", 0)
        ids = id_list(entry, "hash_ids")
        full, rest = divmod(tokens, self.block)
        if len(ids) not in (full, full + bool(rest)):
            raise Bad(
                f"{tokens} tokens in blocks of {self.block} have {full} full blocks, and {len(ids)} hash_ids"
            )
        return _Call(number(entry, "t"), tokens, max(output, 1), ids, kind)


def _latest(ended: _Ends, at: float) -> tuple[float, int] | None:
    """Return the call that ended last before ``at``, up to rounding; None if there is none."""
    i = bisect_right(ended, (at + _ROUNDING, 1 << 62))
    return ended[i - 1] if i else None
