"""A very long random walk over one cache of three tiers: the laws still hold late, and nothing grows.

20,000 operations in all; ``PAGEDLAB_SOAK`` names another number, and the profile ``nightly`` means a million.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from strategies import VOCAB
from test_cache_machine import CacheMachine, random_operation

from pagedlab.events import EventLog
from pagedlab.registry import make

OPERATIONS = int(
    os.environ.get("PAGEDLAB_SOAK")
    or (1_000_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 20_000)
)
CHECK_EVERY = 1_000
"""Operations from one look at everything to the next."""
FRESH_EVERY = 50
"""Operations after which the tests' own notes are thrown away: they would grow, and are read by every operation."""

WALKS = {
    "chained-hash, lru": {
        "lookup": "chained-hash",
        "device": "lru",
        "below": "lru",
        "allocator": "free-list",
    },
    "radix, arc": {"lookup": "radix", "device": "arc", "below": "s3-fifo", "allocator": "fifo"},
    "chained-hash, w-tinylfu": {
        "lookup": "chained-hash",
        "device": "w-tinylfu",
        "below": "lfu",
        "allocator": "buddy",
    },
    "radix, gdsf": {"lookup": "radix", "device": "gdsf", "below": "2q", "allocator": "best-fit"},
}


MET = (
    "admit",
    "grow",
    "fork",
    "copy on write",
    "swap out",
    "swap in",
    "prefetch",
    "loaded from host",
    "loaded from disk",
)


class SoakMachine(CacheMachine):
    """The same operations; what a failed one must leave alone is looked at in every `CHECK_EVERY`th only."""

    closely = True

    def state(self) -> Any:
        return super().state() if self.closely else [(p.num_cached, p.num_free) for p in self.cache.pools]

    def forget_notes(self) -> None:
        """Throw away what the tests write down, but for the serials that can still be found."""
        for spy in self.spies.values():
            spy.log.clear()
        time = self.cache.events.time
        self.cache.events = EventLog()
        self.cache.events.time = time
        found = {b.serial for pool in self.cache.pools for b in pool.blocks if b.key is not None}
        self.serials = {serial: content for serial, content in self.serials.items() if serial in found}


def machine_of(names: dict[str, str], pick: Random) -> SoakMachine:
    machine = SoakMachine()
    machine.start(
        block_size=4,
        num_blocks=24,
        host_blocks=12,
        disk_blocks=16,
        null_block=False,
        allocator=make("allocator", names["allocator"]),
        eviction=make("eviction", names["device"]),
        lookup=names["lookup"],
        host_eviction=make("eviction", names["below"]),
        disk_eviction=make("eviction", names["below"]),
        swap=make("swap", "disk"),
        prompts=[[pick.randrange(VOCAB) for _ in range(pick.randint(4, 40))] for _ in range(12)],
    )
    return machine


def entries(root: object) -> int:
    """Entries of all containers that can be reached from ``root`` through pagedlab's objects and builtin containers."""
    seen: set[int] = set()
    todo, total = [root], 0
    while todo:
        here = todo.pop()
        if id(here) in seen or isinstance(here, EventLog | type):
            continue
        seen.add(id(here))
        inside: list[Any] = []
        if isinstance(here, dict):
            inside = [*here, *here.values()]
            total += len(here)
        elif isinstance(here, list | tuple | set | frozenset | deque):
            inside = list(here)
            total += len(here)
        elif type(here).__module__.startswith(("pagedlab", "strategies")):
            inside = list(fields(here))
        elif hasattr(here, "__len__") and not isinstance(here, str | bytes):
            total += len(here)
        todo += inside
    return total


def fields(thing: object) -> Iterator[Any]:
    """Values of an object's attributes, slots included."""
    yield from getattr(thing, "__dict__", {}).values()
    for kind in type(thing).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(thing, name):
                yield getattr(thing, name)


def walk(machine: SoakMachine, pick: Random, operations: int) -> list[int]:
    """Take a walk, look at everything now and then, and return how large the cache was each time with nobody in it."""
    sizes = []
    for number in range(1, operations + 1):
        machine.closely = number % CHECK_EVERY == 0
        random_operation(machine, pick, rare=0.003)
        if number % FRESH_EVERY == 0:
            machine.forget_notes()
        if number % CHECK_EVERY == 0:
            machine.carry_out_moves()
            machine.books_balance()
            machine.content_is_right()
            machine.nothing_stands_twice()
            sizes.append(entries(machine.cache))
    return sizes


def grows(sizes: list[int]) -> bool:
    """Whether the last third is larger than the tide of the middle third explains."""
    third = len(sizes) // 3
    return max(sizes[-third:]) > 1.5 * max(sizes[third : 2 * third])


@pytest.mark.parametrize("names", WALKS.values(), ids=WALKS)
def test_a_long_walk_keeps_the_laws_and_does_not_grow(names: dict[str, str]) -> None:
    pick = Random(7)
    machine = machine_of(names, pick)
    CacheMachine.reached.clear()
    sizes = walk(machine, pick, max(OPERATIONS // len(WALKS), 3 * CHECK_EVERY))
    assert not grows(sizes), f"entries held by the cache, each {CHECK_EVERY} operations: {sizes}"
    missing = [what for what in MET if not CacheMachine.reached[what]]
    assert not missing, f"never met: {missing}"
    machine.closely = True
    machine.teardown()
    machine.forget_notes()


def test_what_grows_is_noticed() -> None:
    pick = Random(7)
    machine = machine_of(WALKS["chained-hash, lru"], pick)
    policy = machine.spies[0].policy
    leak: list[int] = []
    policy.__dict__["leak"] = leak
    forget = machine.forget_notes
    machine.forget_notes = lambda: (forget(), leak.extend(range(FRESH_EVERY)))  # type: ignore[method-assign]
    assert grows(walk(machine, pick, 5 * CHECK_EVERY))
