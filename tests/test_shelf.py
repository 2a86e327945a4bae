"""The classical policies against restatements of their papers that look at everything, one access at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples

import pagedlab as pl
from pagedlab.registry import make

Stream = list[int]
Model = Callable[[Stream, int], list[bool]]


def by_score(score: Callable[[dict[str, Any], float], Any], *, ageing: bool = False) -> Model:
    """A cache that gives up the lowest score as of the last use; with ageing that score is added to later ones."""

    def model(stream: Stream, capacity: int) -> list[bool]:
        cached: dict[int, dict[str, Any]] = {}
        age, hits = 0.0, []
        for now, key in enumerate(stream):
            hits.append(key in cached)
            if key not in cached and len(cached) == capacity:
                victim = min(cached, key=lambda k: (cached[k]["score"], cached[k]["used"]))
                if ageing:
                    age = cached[victim]["score"]
                del cached[victim]
            facts = cached.setdefault(key, {"uses": 0, "key": key})
            facts["uses"] += 1
            facts["used"] = now
            facts["score"] = score(facts, age)
        return hits

    return model


def slru(stream: Stream, capacity: int) -> list[bool]:
    """Two LRU lists, oldest first."""
    probation: list[int] = []
    protected: list[int] = []
    room = int(capacity * 0.8)
    hits = []
    for key in stream:
        hits.append(key in probation or key in protected)
        if not hits[-1]:
            if len(probation) + len(protected) == capacity:
                (probation or protected).pop(0)
            probation.append(key)
            continue
        (probation if key in probation else protected).remove(key)
        if room:
            protected.append(key)
        else:
            probation.append(key)
        if len(protected) > room:
            probation.append(protected.pop(0))
    return hits


def s3_fifo(stream: Stream, capacity: int) -> list[bool]:
    """Two queues of [key, marks], oldest first, and the keys remembered."""
    small: list[list[int]] = []
    main: list[list[int]] = []
    ghosts: list[int] = []
    share, memory = max(1, int(capacity * 0.1)), int(capacity * 0.9)
    hits = []
    for key in stream:
        entry = next((e for e in small + main if e[0] == key), None)
        hits.append(entry is not None)
        if entry is not None:
            entry[1] = min(3, entry[1] + 1)
            continue
        known = key in ghosts
        if known:
            ghosts.remove(key)
        while len(small) + len(main) == capacity:
            if small and (len(small) >= share or not main):
                oldest = small.pop(0)
                if oldest[1] >= 2:
                    main.append([oldest[0], 0])
                else:
                    ghosts.append(oldest[0])
                    del ghosts[: max(0, len(ghosts) - memory)]
            else:
                oldest = main.pop(0)
                if oldest[1]:
                    main.append([oldest[0], oldest[1] - 1])
        (main if known else small).append([key, 0])
    return hits


def lru_2(stream: Stream, capacity: int) -> list[bool]:
    """Backward 2-distance, with no memory of what is gone."""
    uses: dict[int, list[int]] = {}
    hits = []
    for now, key in enumerate(stream):
        hits.append(key in uses)
        if key not in uses and len(uses) == capacity:
            del uses[min(uses, key=lambda k: (len(uses[k]) > 1, uses[k][-2:][0]))]
        uses.setdefault(key, []).append(now)
    return hits


def arc(stream: Stream, capacity: int) -> list[bool]:
    """T1, T2, B1, B2 as lists, LRU first, as in the paper's figure 4."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p = 0.0
    hits = []

    def replace(in_b2: bool) -> None:
        if t1 and (len(t1) > p or (in_b2 and len(t1) == p)):
            b1.append(t1.pop(0))
        elif t2:
            b2.append(t2.pop(0))
        else:
            b1.append(t1.pop(0))

    for key in stream:
        hits.append(key in t1 or key in t2)
        if hits[-1]:
            (t1 if key in t1 else t2).remove(key)
            t2.append(key)
            continue
        full = len(t1) + len(t2) == capacity
        if key in b1:
            p = min(capacity, p + max(1, len(b2) / len(b1)))
            if full:
                replace(False)
            b1.remove(key)
            t2.append(key)
        elif key in b2:
            p = max(0, p - max(1, len(b1) / len(b2)))
            if full:
                replace(True)
            b2.remove(key)
            t2.append(key)
        else:
            if len(t1) + len(b1) == capacity:
                if len(t1) < capacity:
                    b1.pop(0)
                    if full:
                        replace(False)
                else:
                    t1.pop(0)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= capacity:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * capacity:
                    b2.pop(0)
                if full:
                    replace(False)
            t1.append(key)
    return hits


def mru(stream: Stream, capacity: int) -> list[bool]:
    order: list[int] = []
    hits = []
    for key in stream:
        hits.append(key in order)
        if key in order:
            order.remove(key)
        elif len(order) == capacity:
            order.pop()
        order.append(key)
    return hits


def clock(stream: Stream, capacity: int) -> list[bool]:
    """A ring of [key, mark], the hand at its beginning."""
    ring: list[list[int]] = []
    hits = []
    for key in stream:
        entry = next((e for e in ring if e[0] == key), None)
        hits.append(entry is not None)
        if entry is not None:
            entry[1] = 1
            continue
        if len(ring) == capacity:
            while ring[0][1]:
                ring.append([ring.pop(0)[0], 0])
            ring.pop(0)
        ring.append([key, 0])
    return hits


def sieve(stream: Stream, capacity: int) -> list[bool]:
    """A queue of [key, visited], oldest first, and where the hand is."""
    queue: list[list[int]] = []
    hand = 0
    hits = []
    for key in stream:
        entry = next((e for e in queue if e[0] == key), None)
        hits.append(entry is not None)
        if entry is not None:
            entry[1] = 1
            continue
        if len(queue) == capacity:
            while queue[hand][1]:
                queue[hand][1] = 0
                hand = (hand + 1) % capacity
            del queue[hand]
            hand = 0 if hand == len(queue) else hand
        queue.append([key, 0])
    return hits


def two_q(stream: Stream, capacity: int) -> list[bool]:
    """A1in and Am, oldest first, and the keys in A1out."""
    new: list[int] = []
    main: list[int] = []
    out: list[int] = []
    share, memory = int(capacity * 0.25), int(capacity * 0.5)
    hits = []
    for key in stream:
        hits.append(key in new or key in main)
        if key in main:
            main.remove(key)
            main.append(key)
        if hits[-1]:
            continue
        queue = main if key in out else new
        if key in out:
            out.remove(key)
        if len(new) + len(main) == capacity:
            if len(new) > share or not main:
                out.append(new.pop(0))
                del out[: max(0, len(out) - memory)]
            else:
                main.pop(0)
        queue.append(key)
    return hits


def mq(stream: Stream, capacity: int) -> list[bool]:
    """Four queues of [key, when it expires], LRU first; blocks sink after five accesses."""
    queues: list[list[list[int]]] = [[] for _ in range(4)]
    uses: dict[int, int] = {}
    out: dict[int, int] = {}
    hits = []
    for now, key in enumerate(stream, 1):
        for level in (1, 2, 3):
            if queues[level] and queues[level][0][1] < now:
                queues[level - 1].append([queues[level].pop(0)[0], now + 5])
        hits.append(key in uses)
        if hits[-1]:
            for queue in queues:
                queue[:] = [entry for entry in queue if entry[0] != key]
        else:
            known = out.pop(key, 0)
            if len(uses) == capacity:
                victim, _ = next(filter(None, queues)).pop(0)
                out[victim] = uses.pop(victim)
                if len(out) > 4 * capacity:
                    del out[next(iter(out))]
            uses[key] = known
        uses[key] += 1
        queues[min(4, uses[key].bit_length()) - 1].append([key, now + 5])
    return hits


def lirs(stream: Stream, capacity: int) -> list[bool]:
    """S and Q as lists, bottom and front first; ``gone`` are the keys in S without a block, longest gone first."""
    stack: list[int] = []
    queue: list[int] = []
    low: set[int] = set()
    gone: list[int] = []
    hits, filling = [], True

    def prune() -> None:
        while stack and stack[0] not in low:
            if (key := stack.pop(0)) in gone:
                gone.remove(key)

    for key in stream:
        hits.append(key in low or key in queue)
        again = key in stack
        if not hits[-1]:
            if again:
                gone.remove(key)
                stack.remove(key)
            if len(low) + len(queue) == capacity:
                filling = False
                victim = queue.pop(0)
                if victim in stack:
                    gone.append(victim)
            again = again or (filling and len(low) < capacity - 1)
        elif key in queue:
            queue.remove(key)
        if key in stack:
            stack.remove(key)
        if again or key in low:
            low.add(key)
        else:
            queue.append(key)
        prune()
        stack.append(key)
        while len(low) > capacity - 1:
            prune()
            low.discard(stack[0])
            queue.append(stack.pop(0))
            prune()
        while len(stack) > 2 * capacity and gone:
            stack.remove(gone.pop(0))
    return hits


MODELS: dict[str, tuple[dict[str, Any], Model]] = {
    "mru": ({}, mru),
    "slru": ({}, slru),
    "clock": ({}, clock),
    "sieve": ({}, sieve),
    "2q": ({}, two_q),
    "mq": ({"queues": 4, "lifetime": 5}, mq),
    "lirs": ({}, lirs),
    "s3-fifo": ({}, s3_fifo),
    "lru-k": ({"history": 0.0}, lru_2),
    "arc": ({}, arc),
    "lfu-da": ({}, by_score(lambda facts, age: age + facts["uses"], ageing=True)),
    "gdsf": ({}, by_score(lambda facts, age: age + facts["uses"], ageing=True)),
    "hits-per-token": ({}, by_score(lambda facts, age: facts["uses"])),
}


def streams(most: int = 12) -> st.SearchStrategy[Stream]:
    return st.lists(st.integers(0, most), min_size=1, max_size=120)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=examples(20))
@given(stream=streams(), capacity=st.integers(1, 9))
def test_hits_are_the_papers(name: str, stream: Stream, capacity: int) -> None:
    params, model = MODELS[name]
    done = pl.replay(
        [[key] for key in stream],
        make("eviction", name, **params),  # type: ignore[arg-type]
        capacity,
        semantics="plain",
        progress=False,
    )
    assert list(map(bool, done.request_hits)) == model(stream, capacity)


LOOP = list(range(12)) * 40
"""Larger than the cache: LRU finds nothing."""


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("mru", 0.5),
        ("lirs", 0.5),
        ("arc", 0.0),
        ("2q", 0.15),
        ("w-tinylfu", 0.3),
        ("random", 0.3),
        ("lhd", 0.3),
    ],
)
def test_a_loop_that_does_not_fit(name: str, least: float) -> None:
    found = pl.replay(LOOP, name, 10, semantics="plain", progress=False).hit_ratio
    assert found >= least
    assert pl.replay(LOOP, "lru", 10, semantics="plain", progress=False).hit_ratio == 0
    assert found <= pl.replay(LOOP, "belady", 10, semantics="plain", progress=False).hit_ratio


def scanned(times: int = 60) -> Sequence[int]:
    """Four favourites asked for in turn, between scans of what never comes back."""
    stream: list[int] = []
    for i in range(times):
        stream += [0, 1, 2, 3, 0, 1, 2, 3]
        stream += range(100 + 12 * i, 112 + 12 * i)
    return stream


@pytest.mark.parametrize(
    "name",
    ["lfu", "lru-k", "arc", "lirs", "slru", "s3-fifo", "sieve", "mq", "w-tinylfu", "lhd"],
)
def test_a_scan_does_not_wash_favourites_away(name: str) -> None:
    stream = list(scanned())
    lru = pl.replay(stream, "lru", 10, semantics="plain", progress=False).hits
    assert pl.replay(stream, name, 10, semantics="plain", progress=False).hits > 1.3 * lru


def test_drawing_is_seeded() -> None:
    hits = {
        seed: pl.replay(LOOP, pl.policies.Random(seed=seed), 10, progress=False).hits for seed in range(5)
    }
    again = {
        seed: pl.replay(LOOP, pl.policies.Random(seed=seed), 10, progress=False).hits for seed in range(5)
    }
    assert hits == again
    assert len(set(hits.values())) > 1
