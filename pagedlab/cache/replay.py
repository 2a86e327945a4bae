"""One cache, one eviction policy, and a stream of block accesses: the cache without an engine around it.

A policy hears here what it hears in the engine (`pagedlab.policies.eviction`), and gives up the same blocks. There are
two ways to count:

plain
    Every access is a request of its own: a hit if the block is there, else a miss that stores it. The block is in use
    only for the moment of its access. This is what the literature on caches counts.

prefix
    What a serving engine does. A request hits the blocks of its longest cached prefix, found by key as vLLM finds them;
    all after the first gap is missed. It holds its blocks until its end and releases them tail first. In order: ``hit``
    for what was found, ``miss`` for the rest, ``victims`` for all the room that is needed, ``remove`` for a block that
    lost its prefix and has the content of a new one, ``insert``, ``release``. Of a request with more blocks than the
    cache has, only the first ``capacity`` are cached; the rest is missed every time.

(Our own engine is stricter with blocks that lost their prefix: content whose parent was given up and computed again is
another content to it. For policies that give up children before parents, as LRU does, the two count alike.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from typing import NamedTuple

from pagedlab.errors import PolicyError
from pagedlab.policies.block import NOBODY, Block, Origin, Stretch
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.view import View

_CHUNK = 256
"""Requests between two signs of life."""


class Wanted(NamedTuple):
    """The blocks that one request wants, first to last, and what a policy may read of it.

    ``chained`` keys stand for all before them, too: a block's parent is the one before it. Without, the accesses have
    nothing to do with each other. ``time`` is in picoseconds.
    """

    keys: Sequence[int]
    chained: bool = True
    time: int = 0
    origin: Origin = NOBODY


class ReplayView(View):
    """What a policy may know here: the trace's time, and what a token costs on a model of some shape. No queue."""

    def __init__(
        self, flops_per_token: float = 1.0, flops_per_pair: float = 0.0, bytes_per_token: float = 1.0
    ) -> None:
        self.flops_per_token, self.flops_per_pair = flops_per_token, flops_per_pair
        self.bytes_per_token = bytes_per_token
        self.time = 0

    @property
    def now(self) -> int:
        """When the request at hand came, in picoseconds."""
        return self.time


def plain(
    requests: Sequence[Wanted], policy: Eviction, capacity: int, *, block_size: int, tail_first: bool = False
) -> Iterator[list[int]]:
    """Yield the number of hits of each request, some hundred requests at a time. ``policy`` has been reset.

    ``tail_first`` accesses the blocks of each request in reverse. Raises `PolicyError` for an illegal victim.
    """
    view = _view_of(policy)
    resident: dict[int, Block] = {}
    find, forget = resident.get, resident.pop
    hit, release, evict = policy.hit, policy.release, policy.evict
    miss = policy.miss if _listens(policy, "miss") else None
    insert = policy.insert if _listens(policy, "insert") else None
    begin = policy.begin if _listens(policy, "begin") else None
    divided = policy.partitioned
    spare: list[Block] = []
    places = _Places(block_size, tail_first)
    stretch = Stretch((), None)  # of what begins a chain, or continues nothing; only the origin matters
    born = 0
    for start in range(0, len(requests), _CHUNK):
        hits: list[int] = []
        for keys, chained, now, origin in requests[start : start + _CHUNK]:
            view.time = now
            found = 0
            if begin is not None:
                begin(origin)
            if stretch.origin != origin or (chained and len(keys) > 1):
                stretch = Stretch(keys, None, None, None, 0, block_size, origin)
            for key, depth in places.of(keys, chained):
                block = find(key)
                if block is not None:
                    found += 1
                    block.hits += 1
                    hit(block)
                else:
                    if miss is not None:
                        miss(key)
                    if divided:
                        if not policy.limit(origin):
                            continue
                        given = _give_up_for(origin, 1, capacity - len(resident), policy, resident)
                        if given is None:
                            continue
                        spare += given
                        block = spare.pop() if spare else Block(len(resident), size=block_size)
                    elif born < capacity:
                        block = Block(born, size=block_size)
                    else:
                        block = evict()
                        if block is None or forget(block.key, None) is not block:  # type: ignore[arg-type]
                            raise _illegal(policy, block)
                    born += 1
                    resident[key] = block
                    block.key = key
                    block.stretch = stretch
                    block.depth = depth
                    block.born = born
                    block.created = now
                    block.hits = 0
                    block.ref_count = 1
                    if insert is not None:
                        insert(block)
                block.ref_count = 0
                block.last_released = now
                release(block)
            hits.append(found)
        yield hits


def prefix(
    requests: Sequence[Wanted], policy: Eviction, capacity: int, *, block_size: int
) -> Iterator[list[int]]:
    """Yield the number of hits of each request, some hundred requests at a time. ``policy`` has been reset.

    The keys of a request must be distinct. Raises `PolicyError` for an illegal victim.
    """
    view = _view_of(policy)
    resident: dict[int, Block] = {}
    find = resident.get
    hit, release_all = policy.hit, policy.release_all
    miss = policy.miss if _listens(policy, "miss") else None
    insert = policy.insert if _listens(policy, "insert") else None
    begin = policy.begin if _listens(policy, "begin") else None
    divided = policy.partitioned
    spare: list[Block] = []
    places = _Places(block_size)
    stretch = Stretch((), None)  # of what begins a chain, or continues nothing; only the origin matters
    made = born = 0
    for start in range(0, len(requests), _CHUNK):
        hits: list[int] = []
        for keys, chained, now, origin in requests[start : start + _CHUNK]:
            view.time = now
            if begin is not None:
                begin(origin)
            held: list[Block] = []
            for key in keys:
                block = find(key)
                if block is None:
                    break
                held.append(block)
            found = len(held)
            for block in held:
                block.hits += 1
                hit(block)
                block.ref_count = 1
            if miss is not None:
                for key in keys[found:]:
                    miss(key)
            fits = min(len(keys), capacity)
            if divided:
                fits = min(fits, policy.limit(origin))
                free = capacity - len(resident)
                spare += _give_up_for(origin, fits - found, free, policy, resident) or ()
            while len(spare) < fits - found and made < capacity:
                spare.append(Block(made, size=block_size))
                made += 1
            short = fits - found - len(spare)
            if short > 0:
                spare += _give_up(short, policy, resident)
            if stretch.origin != origin or (chained and len(keys) > 1):
                stretch = Stretch(keys, None, None, None, 0, block_size, origin)
            for key, depth in islice(places.of(keys, chained), found, fits):
                orphan = find(key)
                if orphan is not None:
                    policy.remove(orphan)
                    spare.append(orphan)
                block = spare.pop()
                born += 1
                resident[key] = block
                block.key = key
                block.stretch = stretch
                block.depth = depth
                block.born = born
                block.created = now
                block.hits = 0
                block.ref_count = 1
                if insert is not None:
                    insert(block)
                held.append(block)
            held.reverse()
            for block in held:
                block.ref_count = 0
                block.last_released = now
            release_all(held)
            hits.append(found)
        yield hits


def _view_of(policy: Eviction) -> ReplayView:
    """The view that the policy was given, or one that nobody looks through."""
    return policy.view if isinstance(policy.view, ReplayView) else ReplayView()


class _Places:
    """Where the blocks of a request stand."""

    def __init__(self, block_size: int, tail_first: bool = False) -> None:
        self._size, self._tail_first = block_size, tail_first
        self._starts: list[int] = []

    def of(self, keys: Sequence[int], chained: bool) -> Iterator[tuple[int, int]]:
        """Return for each access its key, and the tokens before it (0 where accesses continue nothing)."""
        if not chained:
            return zip(reversed(keys) if self._tail_first else keys, repeat(0))
        n, starts = len(keys), self._starts
        if n > len(starts):
            starts += range(len(starts) * self._size, 2 * n * self._size, self._size)
        if not self._tail_first:
            return zip(keys, starts)
        return zip(keys[::-1], starts[n - 1 :: -1])


def _listens(policy: Eviction, observation: str) -> bool:
    """Whether the policy does anything about an observation; a call that does nothing is a call too many here."""
    return getattr(getattr(policy, observation), "__func__", None) is not getattr(Eviction, observation)


def _give_up(n: int, policy: Eviction, resident: dict[int, Block]) -> list[Block]:
    victims = policy.victims(n)
    if len(victims) != n:
        raise PolicyError(f"eviction {type(policy).__name__} named {len(victims)} victims of {n}")
    return _taken_out(victims, policy, resident)


def _give_up_for(
    origin: Origin, n: int, free: int, policy: Eviction, resident: dict[int, Block]
) -> list[Block] | None:
    victims = policy.victims_for(origin, n, free)
    return None if victims is None else _taken_out(victims, policy, resident)


def _taken_out(victims: list[Block], policy: Eviction, resident: dict[int, Block]) -> list[Block]:
    for block in victims:
        if block.ref_count or block.key is None or resident.pop(block.key, None) is not block:
            raise _illegal(policy, block)
    policy.remove_all(victims)
    for block in victims:
        block.key = None
    return victims


def _illegal(policy: Eviction, block: Block | None) -> PolicyError:
    named = "no victim, though all blocks are released" if block is None else f"{block!r}, which it must not"
    return PolicyError(f"eviction {type(policy).__name__} named {named}")
