"""Traces that publish hashes of their prompts' blocks: Mooncake and Qwen-Bailian."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pagedlab.engine.request import Request
from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt
from pagedlab.workloads.parts import check_counts, fixed
from pagedlab.workloads.traces.reading import (
    Bad,
    Reader,
    id_list,
    json_object,
    number,
    shown,
    text_of,
    trace_name,
    whole,
)
from pagedlab.workloads.workload import Workload


def mooncake(
    path: str | Path, *, hash_block: int = 512, skip_bad: bool = False, limit: int | None = None
) -> Workload:
    """Read a Mooncake trace: JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``.

    An id stands for ``hash_block`` tokens and all before them; the partial last block has an id too. Open loop: the
    trace does not say which requests belong together. Time stamps come in steps of 3 s; see `Workload.jitter`.
    Source: kvcache-ai/Mooncake, FAST25-release/traces (Apache-2.0). Raises `WorkloadError`.
    """
    check_counts(hash_block=hash_block)
    reader = Reader(path, skip_bad=skip_bad, limit=limit)

    def parse(line: str) -> tuple[float, HashedPrompt, int]:
        row = json_object(line)
        tokens, output = whole(row, "input_length"), whole(row, "output_length")
        return number(row, "timestamp") / 1000, hashed(id_list(row, "hash_ids"), tokens, hash_block), output

    requests = [
        fixed(f"mooncake-{line}", prompt, output, at) for line, (at, prompt, output) in reader.each(parse)
    ]
    about = f"Mooncake trace, hashes of {hash_block} tokens."
    return reader.workload(trace_name(reader.path), requests, about)


class _Turn(NamedTuple):
    """One line of a Bailian trace."""

    chat: str
    parent: str | None
    at: float
    tokens: int
    output: int
    kind: str | None
    ids: list[int]


HASHES = ("chained", "content")


def bailian(
    path: str | Path,
    *,
    hashes: str | None = None,
    hash_block: int = 16,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Workload:
    """Read a Qwen-Bailian trace: JSON lines with chats, their parents, time in seconds, lengths and hashes.

    Fields: ``chat_id``, ``parent_chat_id`` (-1: none), ``timestamp`` (s), ``input_length``, ``output_length``,
    ``type``, ``turn``, ``hash_ids`` (one for ``hash_block`` tokens). A session is a chat with all that descend from it;
    ``type`` becomes `Request.request_class`. Open loop: the trace has no think times.

    ``hashes`` says what an id means. "chained": the block and all before it, as in the coder and thinking traces.
    "content": the block alone, as in the public traces A and B; equal blocks after different beginnings then have
    equal ids, though no prefix cache could serve them, so ids are made anew for every different beginning. None takes
    "content" for a file whose name has ``traceA`` or ``traceB`` in it, and "chained" for any other. Ids that are
    said to be chained and yet stand after different blocks are refused: then they are content hashes.

    Source: alibaba-edu/qwen-bailian-usagetraces-anon (Apache-2.0). The reader was written from the published fields
    and tried on small samples made by hand, not on the real files. Raises `WorkloadError`.
    """
    check_counts(hash_block=hash_block)
    if hashes is not None and hashes not in HASHES:
        raise WorkloadError(f"hashes must be one of {', '.join(HASHES)}, not {hashes!r}")
    reader = Reader(path, skip_bad=skip_bad, limit=limit)
    if hashes is None:
        name = reader.path.name.casefold()
        hashes = "content" if "tracea" in name or "traceb" in name else "chained"
    before: dict[int, int] = {}
    seen: set[str] = set()

    def parse(line: str) -> _Turn:
        turn = _turn(json_object(line))
        if turn.chat in seen:
            raise Bad(f"chat_id {shown(turn.chat)} comes twice")
        full, rest = divmod(turn.tokens, hash_block)
        if len(turn.ids) not in (full, full + bool(rest)):
            raise Bad(_miscounted(turn.tokens, hash_block, len(turn.ids)))
        if hashes == "chained":
            _check_chain(turn.ids, before)
        seen.add(turn.chat)
        return turn

    turns = [turn for _, turn in reader.each(parse)]
    chains: dict[tuple[int, int], int] = {}
    # Ids for partial blocks that the trace left out: above all that are in use.
    spare = 0 if hashes == "content" else 1 + max((max(t.ids, default=0) for t in turns), default=0)
    if hashes == "content":
        rechained = [_rechain(t.ids, chains) for t in turns]
        spare = len(chains)
    else:
        rechained = [t.ids for t in turns]
    roots = _roots(turns)
    requests: list[Request] = []
    for turn, ids in zip(turns, rechained, strict=True):
        prompt = hashed(ids, turn.tokens, hash_block, spare)
        spare += len(prompt.hash_ids) - len(ids)
        requests.append(
            fixed(
                f"chat-{turn.chat}",
                prompt,
                turn.output,
                turn.at,
                f"chat-{roots[turn.chat]}",
                request_class=turn.kind,
            )
        )
    about = f"Qwen-Bailian trace, {hashes} hashes of {hash_block} tokens."
    return reader.workload(trace_name(reader.path), requests, about)


def _turn(row: dict[str, Any]) -> _Turn:
    chat = _chat_id(row, "chat_id", 0)
    parent = _chat_id(row, "parent_chat_id", -1) if row.get("parent_chat_id") is not None else None
    return _Turn(
        chat,
        None if parent == "-1" else parent,
        number(row, "timestamp"),
        whole(row, "input_length"),
        whole(row, "output_length"),
        text_of(row, "type") if row.get("type") is not None else None,
        id_list(row, "hash_ids"),
    )


def _chat_id(row: dict[str, Any], key: str, low: int) -> str:
    value = row.get(key)
    if isinstance(value, str):
        return text_of(row, key)
    return str(whole(row, key, low, 1 << 64))


def _check_chain(ids: list[int], before: dict[int, int]) -> None:
    last = -1
    for i in ids:
        if before.setdefault(i, last) != last:
            raise Bad(
                f"hash id {i} stands after different blocks, so these are no chained hashes: read the trace with "
                "hashes='content'"
            )
        last = i


def _rechain(ids: Iterable[int], chains: dict[tuple[int, int], int]) -> list[int]:
    """Return ids that stand for a block and all before it; ``chains`` knows those given so far."""
    last, made = -1, []
    for i in ids:
        last = chains.setdefault((last, i), len(chains))
        made.append(last)
    return made


def _roots(turns: list[_Turn]) -> dict[str, str]:
    """Return each chat's first ancestor that is in the trace; the members of a circle share one of them."""
    parents = {t.chat: t.parent for t in turns}
    roots: dict[str, str] = {}
    for turn in turns:
        path: dict[str, None] = {}
        at = turn.chat
        while at not in roots and at not in path:
            path[at] = None
            parent = parents[at]
            if parent is None or parent not in parents:
                break
            at = parent
        root = roots.get(at, at)
        roots.update(dict.fromkeys(path, root))
    return roots


def hashed(ids: list[int], tokens: int, block: int, spare: int | None = None) -> HashedPrompt:
    """Return the prompt; raises `Bad` unless there is an id for every ``block`` of its tokens.

    With ``spare`` the id of a partial last block may be missing, and is that number.
    """
    if spare is not None and tokens % block and len(ids) == tokens // block:
        ids = [*ids, spare]
    if len(ids) != -(-tokens // block):
        raise Bad(_miscounted(tokens, block, len(ids)))
    return HashedPrompt(ids, tokens, block)


def _miscounted(tokens: int, block: int, count: int) -> str:
    need = -(-tokens // block)
    return f"{tokens} tokens need {need} hash_ids, not {count}, if one stands for {block} tokens (hash_block)"
