"""A trace as `replay` sees it: the keys of the blocks that each request wants."""

from __future__ import annotations

import gzip
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from pagedlab import workloads
from pagedlab.cache.replay import Wanted
from pagedlab.engine.clock import PS_PER_SECOND, to_ps
from pagedlab.engine.request import Request
from pagedlab.errors import ConfigError, WorkloadError
from pagedlab.policies.lookup import HashedPrefix, Prefix, salt_key
from pagedlab.policies.prompt import HashedPrompt, HashedTokens
from pagedlab.workloads import Workload

_TOKENS_PER_BLOCK = 16
_RUN = 4096
"""Accesses of a plain stream that are counted together."""


@dataclass(frozen=True)
class Accesses:
    """A trace as the keys of the blocks that each request wants, in the order of the trace."""

    name: str
    requests: list[Wanted]
    request_ids: list[str]
    block_size: int
    """Tokens a block; 1 where the trace is a stream of ids."""
    _futures: dict[bool, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def total(self) -> int:
        """All accesses."""
        return sum(len(request.keys) for request in self.requests)

    @cached_property
    def unique(self) -> int:
        """Different blocks: a cache of any size misses each of them once."""
        return len(set(chain.from_iterable(request.keys for request in self.requests)))

    def future(self, tail_first: bool) -> list[int]:
        """All keys in the order in which a policy will hear of them."""
        if tail_first not in self._futures:
            each = (request.keys[::-1] if tail_first else request.keys for request in self.requests)
            self._futures[tail_first] = list(chain.from_iterable(each))
        return self._futures[tail_first]

    def check_distinct(self) -> None:
        """Raise `WorkloadError` if a request wants one key twice, which no chain of prefixes does."""
        for name, request in zip(self.request_ids, self.requests):
            if request.chained and len(set(request.keys)) < len(request.keys):
                raise WorkloadError(
                    f"{self.name}: request {name!r} has an id twice, so its ids are no chained hashes of prefixes; "
                    'use semantics="plain"'
                )


TraceLike = Workload | Accesses | str | Path | Iterable[Any]


def accesses(trace: TraceLike, block_size: int | None = None) -> Accesses:
    """Return the block accesses of a trace: a workload, its name or file, requests, prompts, or ids.

    What it returns can be given to `replay` again and again, and is not computed anew.

    Token ids are cut into whole blocks of ``block_size`` tokens (None: 16), keyed by chained hashes. Hashed prompts
    have one access per hash id (None), a partial last one included, as their traces count them; with another
    ``block_size`` they are cut as the engine cuts them, into whole blocks. A flat list of ids, or a file ``.txt`` or
    ``.txt.gz`` with one id a line, is a stream of unrelated accesses; lists of ids are requests of chained hashes.

    Raises `WorkloadError` for a trace without a block, or of anything else; `ConfigError` for a block size that does
    not fit the hashes.
    """
    if block_size is not None and block_size < 1:
        raise ConfigError(f"block_size must be 1 or more, not {block_size}")
    if isinstance(trace, Accesses):
        if block_size not in (None, trace.block_size):
            raise ConfigError(f"these accesses are of blocks of {trace.block_size} tokens, not {block_size}")
        return trace
    name = "ids"
    if isinstance(trace, str | Path):
        name, trace = Path(trace).name, read_trace(trace)
    if isinstance(trace, Workload):
        return _of_requests(trace.requests, block_size, trace.name)
    if not isinstance(trace, Iterable):
        raise WorkloadError(f"a trace is a workload, its name, or a list of requests or ids, not {trace!r}")
    items = list(trace)
    for kind, what in ((Request, "request"), (HashedPrompt, "hashed prompt")):
        if items and isinstance(items[0], kind):
            strays = [
                f"item {i} of the trace is no {what}: {x!r}"
                for i, x in enumerate(items)
                if not isinstance(x, kind)
            ]
            if strays:
                raise WorkloadError(strays[0][:200])
            if kind is HashedPrompt:
                items = [Request(request_id=str(i), prompt=prompt) for i, prompt in enumerate(items)]
            return _of_requests(items, block_size, f"{what}s")
    if items and hasattr(items[0], "__iter__"):
        rows = [_ids(row, f"row {i}") for i, row in enumerate(items)]
        times = (i * PS_PER_SECOND for i in range(len(rows)))
        wanted = [Wanted(row, True, time) for row, time in zip(rows, times)]
        return _checked(Accesses("ids", wanted, [str(i) for i in range(len(rows))], 1))
    return _stream(_ids(items, "a stream"), name)


def read_trace(source: str | Path) -> Workload | list[int]:
    """Return the workload of that name or file, or the ids of a ``.txt`` or ``.txt.gz`` file.

    Raises `WorkloadError` for what cannot be read, with file and line.
    """
    if str(source).endswith((".txt", ".txt.gz")):
        return _read_ids(Path(source))
    return workloads.load(str(source))


def _of_requests(requests: Sequence[Request], block_size: int | None, name: str) -> Accesses:
    """Arrivals are the time; where all are equal, one request a second."""
    hashed = {r.prompt.hash_block for r in requests if isinstance(r.prompt, HashedPrompt)}
    size = block_size or (min(hashed) if hashed else _TOKENS_PER_BLOCK)
    timed = len({r.arrival for r in requests}) > 1
    wanted = []
    for i, r in enumerate(requests):
        if r.text is not None and not len(r.prompt):
            raise WorkloadError(
                f"{name}: request {r.request_id!r} is a text; replay needs token ids or hashes"
            )
        time = to_ps(r.arrival) if timed else i * PS_PER_SECOND
        origin = r.origin
        wanted.append(Wanted(_keys(r, size, i), True, time, origin))
    return _checked(Accesses(name, wanted, [r.request_id for r in requests], size))


def _keys(request: Request, block_size: int, number: int) -> Sequence[int]:
    prompt, salt = request.prompt, request.salt
    if isinstance(prompt, HashedPrompt):
        if prompt.hash_block == block_size:
            ids = prompt.hash_ids
            return ids if salt is None else [hash((salt_key(salt), i)) for i in ids]
        keyed: Prefix = HashedPrefix(HashedTokens(prompt, number), block_size, salt)
    else:
        keyed = Prefix(list(prompt), block_size, salt)
    num_blocks = len(prompt) // block_size
    return keyed.keys(num_blocks)[:num_blocks]


def _ids(values: Iterable[Any], where: str) -> list[int]:
    try:
        return [operator.index(v) for v in values]
    except TypeError as error:
        raise WorkloadError(f"{where} must consist of whole numbers: {error}") from None


def _stream(ids: list[int], name: str) -> Accesses:
    starts = range(0, len(ids), _RUN)
    wanted = [Wanted(ids[start : start + _RUN], False, i * PS_PER_SECOND) for i, start in enumerate(starts)]
    titles = [f"{w.time // PS_PER_SECOND * _RUN}..." for w in wanted]
    return _checked(Accesses(name, wanted, titles, 1))


def _read_ids(path: Path) -> list[int]:
    ids: list[int] = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    ids.append(int(line))
                except ValueError:
                    raise WorkloadError(
                        f"{path}:{number}: a whole number is wanted, not {line[:40]!r}"
                    ) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: cannot be read: {error}") from None
    return ids


def _checked(found: Accesses) -> Accesses:
    if not found.total:
        raise WorkloadError(f"{found.name}: there is no whole block in it (block_size {found.block_size})")
    return found
