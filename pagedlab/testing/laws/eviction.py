"""The laws of slot `eviction`: legal victims, looking that is not using, and work and memory within bounds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, FunctionType, ModuleType
from typing import Any

from pagedlab.errors import LawBroken
from pagedlab.policies.block import NOBODY, Block, Origin
from pagedlab.policies.view import View
from pagedlab.testing.drivers.eviction import REMOVED, Tier, World
from pagedlab.testing.law import Skipped, law
from pagedlab.testing.subject import Subject


@law("eviction")
def check_eviction_victims_are_blocks(subject: Subject) -> None:
    """`victims` returns a list of blocks."""
    subject.hold("victims_are_blocks")


@law("eviction")
def check_eviction_victims_are_resident(subject: Subject) -> None:
    """A victim is cached at the time: inserted, and not removed since."""
    subject.hold("victims_are_resident")


@law("eviction")
def check_eviction_victims_are_not_in_use(subject: Subject) -> None:
    """A victim is released: nobody has been using it since its last insert or hit."""
    subject.hold("victims_are_not_in_use")


@law("eviction")
def check_eviction_victims_are_distinct(subject: Subject) -> None:
    """No block is named twice in one answer."""
    subject.hold("victims_are_distinct")


@law("eviction")
def check_eviction_victims_are_unprotected(subject: Subject) -> None:
    """A block in ``protected`` is not named."""
    subject.hold("victims_are_unprotected")


@law("eviction")
def check_eviction_victims_are_all_or_none(subject: Subject) -> None:
    """Asked for n victims, it names n or none."""
    subject.hold("victims_are_all_or_none")


@law("eviction")
def check_eviction_victims_are_found(subject: Subject) -> None:
    """If n released, unprotected blocks are there, n are named."""
    subject.hold("victims_are_found")


@law("eviction")
def check_eviction_removals_by_others_are_heard(subject: Subject) -> None:
    """A block that somebody else removes, in use or not, is accepted as gone and never named."""

    def attempt(size: int, codes: list[int]) -> None:
        subject.driver(size, codes).run(codes)  # what is wrong without it, too, is not this law's
        subject.driver(size, codes, forget=True).run(codes)

    subject.search(REMOVED, attempt)


@law("eviction")
def check_eviction_looking_is_not_using(subject: Subject) -> None:
    """`victims` changes nothing: asked once more or not at all, all later decisions are the same."""
    subject.same("looking_is_not_using", "without having looked:", other={"look": True})


@law("eviction")
def check_eviction_short_cuts_are_equal(subject: Subject) -> None:
    """`evict`, `hit_all`, `release_all` and `remove_all` do what the plain methods do that they stand for."""
    subject.same("short_cuts_are_equal", "by the plain methods:", other={"quick": True}, breaches=True)


@law("eviction")
def check_eviction_hits_count(subject: Subject) -> None:
    """A policy that says ``counts_hits`` keeps a block that was hit often before one that never was, all else equal."""
    if not subject.policy.counts_hits:  # type: ignore[attr-defined]
        raise Skipped("it does not say counts_hits = True")
    for order in ((0, 0, 0, 0, 0, 0, 1), (0, 1, 1, 1, 1, 1, 1)):
        often = order[3]
        tier = Tier(subject.fresh(), 2, [1 + len(Tier.operations) * 3 * key for key in order])
        for key in order:
            tier.ask_for(3 * key)
        said, chosen = tier.victims(1, ())
        if [block.key for block in chosen] != [1 - often]:
            hit, never = tier.name(often), tier.name(1 - often)
            story = f"{said} returned {tier.names_of(chosen)}, though {hit} was hit 5 times and {never} never"
            raise LawBroken(tier.broke("hits_count", story).story)


# ---- bounds ----------------------------------------------------------------------------------------------------------

_SMALL, _ENDLESS, _LOOK = 8, 4800, 400
"""Blocks of the tier, requests, and after how many of them its memory is measured."""
_GROWTH = 100
"""Elements by which a policy may be larger at any time of the second half than at all times of the first."""


@law("eviction")
def check_eviction_memory_is_bounded(subject: Subject) -> None:
    """What it remembers is bounded by the capacity, however many contents, sessions and classes go by."""
    if subject.policy.needs_future:  # type: ignore[attr-defined]
        raise Skipped("it knows the future, which is as long as the stream")
    drive = _Steady(subject, _SMALL, _ENDLESS)
    sizes = []
    for i in range(_ENDLESS):
        key = i if i % 3 else i % 4
        kept = key % 101, float(key)
        drive.request(key, Origin(f"session {key}", f"class {key}", f"tenant {key}", key % 5, key % 7, *kept))
        if (i + 1) % _LOOK == 0:
            sizes.append(_elements(drive.policy))
    half = len(sizes) // 2
    # Lists that are tidied now and then may grow for a while.
    if min(sizes[half:]) > max(sizes[:half]) + _GROWTH:
        raise LawBroken(
            f"a tier of {_SMALL} blocks: after {_LOOK} requests the policy holds {sizes[0]} elements, after "
            f"{_ENDLESS // 2} {sizes[half - 1]}, after {_ENDLESS} {sizes[-1]}"
        )


def _elements(policy: Any) -> int:
    """Return the number of elements in all containers that can be reached from the policy's state."""
    total, seen, todo = 0, set(), [vars(policy)]
    while todo:
        value: Any = todo.pop()
        if id(value) in seen or isinstance(
            value, str | bytes | Block | View | type | ModuleType | FunctionType
        ):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            total += len(value)
            todo += [*value.keys(), *value.values()]
        elif hasattr(value, "__len__") and hasattr(value, "__iter__"):
            total += len(value)
            todo += value
        if hasattr(value, "__dict__"):
            todo.append(vars(value))
        todo += [
            getattr(value, name)
            for cls in type(value).__mro__
            for name in getattr(cls, "__slots__", ())
            if hasattr(value, name)
        ]
    return total


class _Steady:
    """A tier that is always full, without a story: one request after the other, each for one block."""

    def __init__(self, subject: Subject, capacity: int, requests: int) -> None:
        self.policy = policy = subject.fresh()
        self.view = World()
        policy.attach(self.view)
        future: dict[str, Any] = {}
        if policy.needs_future:
            future["future"] = [i if i % 3 else i % 4 for i in range(requests)]
        policy.reset(capacity=capacity, **future)
        self.capacity = capacity
        self.cached: dict[int, Block] = {}
        self.number = 0

    def request(self, key: int, origin: Origin = NOBODY) -> None:
        """Ask for one block, and let go of it."""
        policy, self.number = self.policy, self.number + 1
        self.view.time = now = self.number * 10**9
        known = self.cached.get(key)
        if known is not None:
            block = known
            block.hits += 1
            policy.hit(block)
        else:
            policy.miss(key)
            block = self.blank()
            block.key = block.serial = key
            block.depth, block.born, block.created, block.hits = key % 4 * 4, self.number, now, 0
            block.origin = origin
            self.cached[key] = block
            block.ref_count = 1
            policy.insert(block)
        block.ref_count, block.last_released = 0, now
        policy.release(block)

    def blank(self) -> Block:
        """Return a block to store something in: a new one, or a victim."""
        if len(self.cached) < self.capacity:
            return Block(self.number, size=4)
        victim = self.policy.evict()
        if not isinstance(victim, Block) or self.cached.pop(victim.key, None) is not victim:  # type: ignore[arg-type]
            raise Skipped("it names illegal victims: see the laws on these")
        return victim


_SIZES = (256, 2048)
_FACTORS = {"constant": 1.6, "log": 2.2, "linear": 12.0}
"""How much more work a request may be in a tier that is 8 times as large."""


@law("eviction")
def check_eviction_work_grows_as_declared(subject: Subject) -> None:
    """Work per request grows with the tier no faster than ``growth`` says, counted in lines of Python (not in C)."""
    growth = "linear" if subject.policy.dynamic else subject.policy.growth  # type: ignore[attr-defined]
    if growth not in _FACTORS:
        raise LawBroken(f"growth is {growth!r}; it must be one of {', '.join(_FACTORS)}")
    work = [_work(subject, capacity) for capacity in _SIZES]
    if work[1] > _FACTORS[growth] * work[0] + 5:
        raise LawBroken(
            f"growth is declared {growth!r}, but a request runs {work[0]:.0f} lines with {_SIZES[0]} blocks and "
            f"{work[1]:.0f} with {_SIZES[1]}"
        )


def _work(subject: Subject, capacity: int) -> float:
    """Return the lines that a request runs in a full tier, on average."""
    warm, measured = capacity + capacity // 4, capacity // 2
    drive = _Steady(subject, capacity, warm + measured)
    for i in range(warm):
        drive.request(i if i % 3 else i % 4)
    own, lines = _Steady.request.__code__, 0

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        nonlocal lines
        if frame.f_code is own:
            return None
        lines += event in ("line", "call")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for i in range(warm, warm + measured):
            drive.request(i if i % 3 else i % 4)
    finally:
        sys.settrace(before)
    return lines / measured
