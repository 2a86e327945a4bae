"""`replay`: block accesses counted as the literature and as a serving engine count them, and the bounds beside them."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations, pairwise
from math import isclose
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scenario, Spy, examples, servable, serve
from typer.testing import CliRunner

import pagedlab as pl
from pagedlab.cache.replay import Wanted, plain, prefix
from pagedlab.cli import app
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.errors import ConfigError, PolicyError, WorkloadError
from pagedlab.lab.accesses import accesses
from pagedlab.lab.replayed import MissRatioCurve
from pagedlab.policies import Block, Eviction
from pagedlab.policies.bounds import next_uses, refuse_future
from pagedlab.policies.prompt import HashedPrompt
from pagedlab.registry import make
from pagedlab.workloads import Workload

HERE = Path(__file__).resolve().parent
BOUNDS = ("belady", "belady-tree")


# ---- outside numbers -----------------------------------------------------------------------------------------------


def beside(variable: str, folder: str) -> Path:
    """The folder that a variable names, else the one beside the repository; skips, and says so, where neither is."""
    path = Path(os.environ.get(variable) or HERE.parents[1] / "shared" / folder)
    if not path.is_dir():
        pytest.skip(f"{variable} names no folder and none called {folder} is beside the repository")
    return path


def oracle(name: str, **only: str) -> dict[tuple[str, int], float]:
    """Miss ratios that another simulator gave, by policy and size."""
    with (beside("PAGEDLAB_ORACLES", "oracles") / name).open() as file:
        rows = [r for r in csv.DictReader(file) if all(r[k] == v for k, v in only.items())]
    return {(r["policy"].lower(), int(r["cache_blocks"])): float(r["request_miss_ratio"]) for r in rows}


def through_the_command_line(*arguments: str) -> dict[tuple[str, int], float]:
    done = CliRunner().invoke(app, ["replay", *arguments, "--semantics", "plain", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["results"]
    return {(r["eviction"], r["num_blocks"]): r["miss_ratio"] for r in rows}


@pytest.mark.parametrize("touch_order", ["prefix_first", "tail_first"])
def test_mooncake_as_others_count_it(touch_order: str) -> None:
    want = oracle("replay_miss_ratio.csv", trace="conversation", touch_order=touch_order)
    trace = beside("PAGEDLAB_DATA", "data") / "mooncake" / "mooncake_conversation_trace.jsonl.gz"
    if not trace.is_file():
        pytest.skip("the Mooncake conversation trace is not among the data")
    sizes = sorted({size for policy, size in want if policy == "lru"})
    got = through_the_command_line(
        str(trace),
        *("--eviction", "lru,fifo,lfu,belady"),
        *("--num-blocks", ",".join(map(str, sizes))),
        *("--touch-order", touch_order),
    )
    assert len(got) == 4 * len(sizes)
    for (policy, size), ratio in got.items():
        assert round(ratio, 6) == want[policy, size], (policy, size)


@pytest.mark.parametrize("stream", ["zipf", "scan_loop"])
def test_streams_as_others_count_them(stream: str) -> None:
    want = oracle("replay_miss_ratio_synthetic.csv", stream=stream)
    path = beside("PAGEDLAB_ORACLES", "oracles") / f"{stream}.txt.gz"
    sizes = sorted({size for policy, size in want if policy == "lru"})
    got = through_the_command_line(
        str(path), "--eviction", "lru,fifo,lfu,belady", "--num-blocks", ",".join(map(str, sizes))
    )
    assert len(got) == 4 * len(sizes)
    for (policy, size), ratio in got.items():
        assert round(ratio, 6) == want[policy, size], (policy, size)


# ---- streams and naive models --------------------------------------------------------------------------------------


def chained(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Texts as chained ids: equal where all before is equal, too."""
    known: dict[tuple[int, ...], int] = {}
    return [
        [known.setdefault(tuple(text[: i + 1]), 100 + len(known)) for i in range(len(text))] for text in texts
    ]


def trees(max_length: int = 6) -> st.SearchStrategy[list[list[int]]]:
    """Requests whose prefixes meet."""
    texts = st.lists(st.integers(0, 2), min_size=1, max_size=max_length)
    return st.lists(texts, min_size=1, max_size=25).map(chained)


def streams() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 9), min_size=1, max_size=60)


class Entry:
    """What a naive cache knows of a block."""

    def __init__(self, born: int) -> None:
        self.born, self.hits, self.released = born, 0, 0


NAIVE: dict[str, Callable[[Entry], Any]] = {
    "lru": lambda e: e.released,
    "fifo": lambda e: e.born,
    "lfu": lambda e: (e.hits, e.born),
    "mru": lambda e: -e.released,
}


class MRU(Eviction):
    """A user's own, the simple way."""

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self.releases = 0

    def priority(self, block: Block) -> float:
        self.releases += 1
        return -self.releases


def policy_of(name: str) -> Any:
    return MRU() if name == "mru" else name


def naive_plain(keys: Sequence[int], capacity: int, score: Callable[[Entry], Any]) -> int:
    cached: dict[int, Entry] = {}
    hits = 0
    for now, key in enumerate(keys):
        if key in cached:
            hits += 1
            cached[key].hits += 1
        else:
            if len(cached) == capacity:
                del cached[min(cached, key=lambda k: score(cached[k]))]
            cached[key] = Entry(now)
        cached[key].released = now
    return hits


def naive_prefix(
    rows: Sequence[Sequence[int]], capacity: int, score: Callable[[Entry], Any]
) -> Iterator[int]:
    cached: dict[int, Entry] = {}
    clock = 0
    for row in rows:
        found = 0
        while found < len(row) and row[found] in cached:
            found += 1
        yield found
        for key in row[:found]:
            cached[key].hits += 1
        stored = row[found:capacity]
        while len(cached) + len(stored) > capacity:
            del cached[min((k for k in cached if k not in row[:found]), key=lambda k: score(cached[k]))]
        for key in stored:
            clock += 1
            cached[key] = Entry(clock)
        for key in reversed(row[:capacity]):
            clock += 1
            cached[key].released = clock


@pytest.mark.parametrize("name", NAIVE)
@settings(max_examples=examples())
@given(rows=trees(), capacity=st.integers(1, 12), tail_first=st.booleans())
def test_plain_is_a_plain_cache(name: str, rows: list[list[int]], capacity: int, tail_first: bool) -> None:
    keys = [key for row in rows for key in (reversed(row) if tail_first else row)]
    want = naive_plain(keys, capacity, NAIVE[name])
    order = "tail_first" if tail_first else "prefix_first"
    got = pl.replay(rows, policy_of(name), capacity, semantics="plain", touch_order=order)
    assert (got.hits, got.accesses) == (want, len(keys))
    assert pl.replay(keys, policy_of(name), capacity, semantics="plain").hits == want


@pytest.mark.parametrize("name", NAIVE)
@settings(max_examples=examples())
@given(rows=trees(), capacity=st.integers(1, 12))
def test_prefix_is_a_cache_of_prefixes(name: str, rows: list[list[int]], capacity: int) -> None:
    """Also where a request is larger than the cache, and where blocks have lost what came before them."""
    got = pl.replay(rows, policy_of(name), capacity)
    assert got.request_hits == list(naive_prefix(rows, capacity, NAIVE[name]))


@settings(max_examples=examples(0.5))
@given(keys=streams(), capacity=st.integers(1, 6), name=st.sampled_from((*NAIVE, *BOUNDS)))
def test_single_ids_have_no_prefix(keys: list[int], capacity: int, name: str) -> None:
    """A stream counts the same both ways."""
    one = pl.replay(keys, policy_of(name), capacity, semantics="plain")
    other = pl.replay(keys, policy_of(name), capacity, semantics="prefix")
    assert one.hits == other.hits == pl.replay([[k] for k in keys], policy_of(name), capacity).hits


class DeepestFirst(Eviction):
    """Children go before parents, whatever else."""

    def priority(self, block: Block) -> float:
        return -block.depth


@pytest.mark.parametrize("policy", [make("eviction", "lru"), DeepestFirst()], ids=["lru", "deepest-first"])
@settings(max_examples=examples(0.3))
@given(
    texts=st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=9), min_size=1, max_size=12),
    data=st.data(),
)
def test_the_engine_does_the_same(policy: Eviction, texts: list[list[int]], data: st.DataObject) -> None:
    """One request after the other, with one token beyond its whole blocks, which an engine always computes.

    Only for policies that never part a block from what comes before it: to the engine, content whose parent was given
    up and computed again is another content; by its hash it is the same.
    """
    size = data.draw(st.integers(2, 3))
    prompts = [[*text[: len(text) // size * size], 2] for text in texts if len(text) >= size]
    longest = max((len(p) // size for p in prompts), default=0)
    if not longest:
        return
    capacity = longest + data.draw(st.integers(0, 6))
    requests = [
        Request(request_id=str(i), prompt=p, arrival=100.0 * i, sampling=SamplingParams(max_tokens=1))
        for i, p in enumerate(prompts)
    ]
    # The engine's pool has one more, for the block that is never full.
    config = pl.Config(
        num_blocks=capacity + 1, block_size=size, eviction=policy, max_model_len=64, lookup="chained-hash"
    )
    engine = serve(Scenario(config, requests, vocab=4))
    found = {s.request_id: s.hit_tokens for g in engine.groups.values() for s in g.sequences}
    got = pl.replay(Workload("w", tuple(requests)), policy, capacity, block_size=size)
    assert [hits * size for hits in got.request_hits] == [found[r.request_id] for r in requests]


# ---- bounds --------------------------------------------------------------------------------------------------------


def fewest_misses(keys: list[int], capacity: int) -> int:
    """Every possible choice, tried."""

    @cache
    def best(at: int, cached: frozenset[int]) -> int:
        if at == len(keys):
            return 0
        key = keys[at]
        if key in cached:
            return best(at + 1, cached)
        if len(cached) < capacity:
            return 1 + best(at + 1, cached | {key})
        return 1 + min(best(at + 1, frozenset(kept) | {key}) for kept in combinations(cached, capacity - 1))

    return best(0, frozenset())


@settings(max_examples=examples())
@given(keys=st.lists(st.integers(0, 5), min_size=1, max_size=14), capacity=st.integers(1, 4))
def test_belady_is_the_optimum(keys: list[int], capacity: int) -> None:
    assert pl.replay(keys, "belady", capacity).misses == fewest_misses(keys, capacity)


@settings(max_examples=examples())
@given(rows=trees(), capacity=st.integers(1, 12), tail_first=st.booleans())
def test_nobody_beats_belady(rows: list[list[int]], capacity: int, tail_first: bool) -> None:
    policies = [*servable("eviction"), *BOUNDS, MRU()]
    order = "tail_first" if tail_first else "prefix_first"
    curve = pl.replay(rows, policies, [capacity], semantics="plain", touch_order=order)
    best = curve["belady", capacity].misses
    assert all(best <= point.misses for point in curve)


@settings(max_examples=examples())
@given(rows=trees(), spare=st.integers(0, 6))
def test_nobody_beats_belady_on_prefixes_that_fit(rows: list[list[int]], spare: int) -> None:
    capacity = max(map(len, rows)) + spare
    curve = pl.replay(rows, [*servable("eviction"), *BOUNDS, MRU()], [capacity])
    best = curve["belady", capacity].misses
    assert all(best <= point.misses for point in curve)


class Leaves(Spy):
    """Watches that no block goes before those that continue it."""

    def reset(self, *, capacity: int, future: Any = ()) -> None:
        self.policy = self.inner  # type: ignore[assignment]
        self.policy.reset(capacity=capacity, future=future)  # type: ignore[call-arg]
        self.used, self.released, self.due, self.log = set(), set(), set(), []

    def remove(self, block: Block) -> None:
        super().remove(block)
        assert not any(b.parent_key == block.key for b in self.used | self.released)


@settings(max_examples=examples())
@given(rows=trees(), capacity=st.integers(1, 12), data=st.data())
def test_belady_tree_prunes_leaves(rows: list[list[int]], capacity: int, data: st.DataObject) -> None:
    spy = Leaves(inner=make("eviction", "belady-tree"))
    wanted = [Wanted(row) for row in rows]
    if data.draw(st.booleans()):
        spy.reset(capacity=capacity, future=[k for row in rows for k in row])
        for _ in prefix(wanted, spy, capacity, block_size=1):
            pass
    else:
        # Tail first a child comes before its parent, and nothing guards the parent that is not there yet.
        spy.reset(capacity=capacity, future=[k for row in rows for k in row])
        for _ in plain(wanted, spy, capacity, block_size=1):
            pass


@settings(max_examples=examples(0.5))
@given(
    rows=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=15),
    n=st.integers(1, 5),
)
def test_ids_that_are_no_chain_do_not_stop_belady_tree(rows: list[list[int]], n: int) -> None:
    best = pl.replay(rows, "belady", n, semantics="plain").misses
    assert pl.replay(rows, "belady-tree", n, semantics="plain").misses >= best


@settings(max_examples=examples(0.5))
@given(rows=trees(), n=st.integers(1, 8), data=st.data())
def test_belady_tree_names_several_at_once(rows: list[list[int]], n: int, data: st.DataObject) -> None:
    """Legal, all or nothing, and asking changes nothing: the spy looks."""
    spy = Leaves(inner=make("eviction", "belady-tree"))
    capacity = sum(map(len, rows))
    spy.reset(capacity=capacity, future=[k for row in rows for k in row])
    for _ in prefix([Wanted(row) for row in rows], spy, capacity, block_size=1):
        pass
    protected = data.draw(st.lists(st.sampled_from(sorted(spy.released, key=lambda b: b.index)), max_size=3))
    victims = spy.victims(n, protected)
    for block in victims:
        Spy.remove(spy, block)


def test_next_uses() -> None:
    inf = float("inf")
    assert next_uses([1, 2, 1, 1, 3]) == [2, inf, 3, inf, inf]


def test_the_future_is_refused_where_there_is_none() -> None:
    refuse_future([make("eviction", "lru"), make("swap", "drop")])
    for name in BOUNDS:
        for call in (
            lambda name=name: refuse_future([make("swap", "drop"), make("eviction", name)]),
            lambda name=name: make("eviction", name).reset(capacity=4),  # type: ignore[attr-defined]
        ):
            with pytest.raises(ConfigError, match=f"eviction '{name}' needs the future: use replay"):
                call()


def test_another_stream_than_the_one_foretold_is_noticed() -> None:
    policy: Any = make("eviction", "belady")
    policy.reset(capacity=4, future=[1, 2])
    policy.miss(1)
    with pytest.raises(PolicyError, match="access 1 to 3"):
        policy.miss(3)


# ---- the protocol --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", servable("eviction"))
@settings(max_examples=examples(0.5))
@given(rows=trees(), capacity=st.integers(1, 12), way=st.sampled_from(("plain", "tail_first", "prefix")))
def test_every_access_is_told_once(name: str, rows: list[list[int]], capacity: int, way: str) -> None:
    """The spy sees that observations are legal; here they are counted."""
    spy = Spy(inner=make("eviction", name))
    spy.reset(capacity=capacity)
    wanted = [Wanted(row) for row in rows]
    if way == "prefix":
        parts = prefix(wanted, spy, capacity, block_size=1)
    else:
        parts = plain(wanted, spy, capacity, block_size=1, tail_first=way == "tail_first")
    hits = sum(sum(part) for part in parts)
    told = Counter(what for what, _ in spy.log)
    total = sum(map(len, rows))
    fit = sum(min(len(row), capacity) for row in rows) if way == "prefix" else total
    assert told["hit"] == hits
    assert told["miss"] == total - hits
    assert told["insert"] == fit - hits
    assert told["release"] == fit
    assert not spy.used
    assert not spy.due
    assert len(spy.released) <= capacity


def test_policies_can_read_what_a_block_is() -> None:
    seen: list[tuple[Any, ...]] = []

    class Reader(Eviction):
        def priority(self, block: Block) -> float:
            seen.append(
                (block.key, block.parent_key, block.depth, block.session, block.hits, block.last_released)
            )
            return 0.0

    requests = [
        Request(request_id="a", prompt=HashedPrompt([7, 8], 20, 10), session="s", arrival=1.0),
        Request(request_id="b", prompt=HashedPrompt([7, 9], 20, 10), session="t", arrival=2.5),
    ]
    second = 10**12
    first = {(7, None, 0, "s", 0, second), (8, 7, 10, "s", 0, second)}
    later = {(7, None, 0, "s", 1, 5 * second // 2), (9, 7, 10, "t", 0, 5 * second // 2)}
    for semantics, order in (("plain", "prefix_first"), ("plain", "tail_first"), ("prefix", "prefix_first")):
        seen.clear()
        pl.replay(requests, Reader(), 5, semantics=semantics, touch_order=order)  # type: ignore[call-overload]
        assert set(seen[:2]) == first
        assert set(seen[2:]) == later
        if order == "tail_first" or semantics == "prefix":
            assert [row[0] for row in seen] == [8, 7, 9, 7]


@pytest.mark.parametrize("semantics", ["plain", "prefix"])
@pytest.mark.parametrize("named", [[], [None], [Block(0)]])
def test_an_illegal_victim_is_the_policys_fault(semantics: Any, named: list[Any]) -> None:
    class Wrong(Eviction):
        def priority(self, block: Block) -> float:
            return 0.0

        def victims(self, n: int, protected: Any = ()) -> list[Any]:
            return named

        def remove(self, block: Any) -> None:
            pass

    with pytest.raises(PolicyError, match="eviction Wrong named"):
        pl.replay([[1, 2], [3, 4]], Wrong(), 2, semantics=semantics)


def test_a_policy_is_cloned() -> None:
    mine = MRU()
    first = pl.replay([1, 2, 3, 1], mine, 2)
    assert not hasattr(mine, "releases")
    assert pl.replay([1, 2, 3, 1], mine, 2).hits == first.hits == 1


# ---- what a trace may be -------------------------------------------------------------------------------------------


def hashed(*prompts: tuple[Sequence[int], int], block: int = 8) -> list[HashedPrompt]:
    return [HashedPrompt(ids, tokens, block) for ids, tokens in prompts]


def test_hashed_prompts_count_as_published() -> None:
    """The partial last block has an access of its own; cut smaller, blocks are whole and what is partial is private."""
    trace = hashed(([1, 2, 3], 20), ([1, 2, 3], 20))
    assert accesses(trace).block_size == 8
    whole = pl.replay(trace, num_blocks=50)
    assert (whole.hits, whole.accesses) == (3, 6)
    assert pl.replay(trace, num_blocks=50, block_size=8).hits == 3
    small = pl.replay(trace, num_blocks=50, block_size=4)
    assert (small.hits, small.accesses) == (4, 10)
    large = pl.replay(trace, num_blocks=50, block_size=16)
    assert (large.hits, large.accesses) == (1, 2)
    with pytest.raises(ConfigError, match="block_size 6 does not fit"):
        pl.replay(trace, num_blocks=50, block_size=6)


def test_tokens_are_cut_into_whole_blocks() -> None:
    texts = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [9, 2, 3, 4]]
    requests = [Request(request_id=str(i), prompt=t) for i, t in enumerate(texts)]
    got = pl.replay(requests, num_blocks=9, block_size=2)
    assert (got.request_hits, got.accesses) == ([0, 1, 0], 6)
    assert pl.replay(Workload("w", tuple(requests)), num_blocks=9, block_size=1).request_hits == [0, 3, 0]


def test_tenants_share_nothing() -> None:
    for prompt in ([1, 2, 3, 4], HashedPrompt([1, 2], 4, 2), HashedPrompt([1], 4, 4)):
        requests = [Request(request_id=str(i), prompt=prompt, salt=salt) for i, salt in enumerate("aba")]
        got = pl.replay(requests, num_blocks=9, block_size=2)
        assert got.request_hits == [0, 0, 2]


def test_arrays_and_files_are_streams(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    want = pl.replay([5, 6, 5], num_blocks=2).hits
    assert want == 1
    assert pl.replay(np.array([5, 6, 5]), num_blocks=np.int64(2)).hits == want
    (tmp_path / "ids.txt").write_text("5\n6\n5\n")
    with gzip.open(tmp_path / "ids.txt.gz", "wt") as file:
        file.write("5\n6\n5\n")
    for name in ("ids.txt", "ids.txt.gz"):
        assert pl.replay(tmp_path / name, num_blocks=2).hits == want
        assert pl.replay(str(tmp_path / name), num_blocks=2).trace.name == name


def test_long_streams_are_counted_in_runs() -> None:
    got = pl.replay([i % 7 for i in range(10_000)], num_blocks=7)
    assert got.hits == 10_000 - 7
    assert list(got.requests["request_id"]) == ["0...", "4096...", "8192..."]
    assert list(got.requests["blocks"]) == [4096, 4096, 10_000 - 8192]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pl.replay([1, 2], "lur"), "did you mean 'lru'"),
        (lambda: pl.replay([1, 2], MRU), r"pass an object: MRU\(\)"),
        (lambda: pl.replay([1, 2], 3), "must be a name or an eviction policy, not 3"),
        (lambda: pl.replay([1, 2], []), "no eviction policy"),
        (lambda: pl.replay([1, 2], ["lru", "lru"]), "comes twice"),
        (lambda: pl.replay([1, 2], num_blocks=0), "at least 1, not 0"),
        (lambda: pl.replay([1, 2], num_blocks=2.5), "whole number of at least 1, not 2.5"),
        (lambda: pl.replay([1, 2], num_blocks=[]), "num_blocks is empty"),
        (lambda: pl.replay([1, 2], semantics="prefx"), "did you mean 'prefix'"),
        (lambda: pl.replay([1, 2], semantics="plain", touch_order="tail"), "tail_first"),
        (lambda: pl.replay([1, 2], touch_order="tail_first"), 'is for semantics="plain"'),
        (lambda: pl.replay([1, 2], block_size=0), "block_size must be 1 or more"),
        (lambda: pl.replay([]), "no whole block"),
        (lambda: pl.replay(5), "a trace is a workload"),
        (lambda: pl.replay([1, "x"]), "whole numbers"),
        (lambda: pl.replay([[1], ["x"]]), "row 1 must consist of whole numbers"),
        (lambda: pl.replay([[1, 2, 1]]), "request '0' has an id twice"),
        (lambda: pl.replay([Request(request_id="a", prompt=(), text="hello")]), "'a' is a text"),
        (lambda: pl.replay([Request(request_id="a", prompt=[1]), 5]), "item 1 of the trace is no request"),
        (lambda: pl.replay([HashedPrompt([1], 4, 4), 5]), "item 1 of the trace is no hashed prompt"),
        (lambda: pl.replay("no-such-trace"), "no-such-trace"),
        (lambda: pl.replay("no-such-file.txt"), "no-such-file.txt: cannot be read"),
    ],
)
def test_mistakes_get_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises((ConfigError, WorkloadError), match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("5\nsix\n")
    with pytest.raises(WorkloadError, match=r"ids\.txt:2: a whole number is wanted, not 'six"):
        pl.replay(tmp_path / "ids.txt")


def test_repeated_ids_are_no_matter_for_plain() -> None:
    assert pl.replay([[1, 2, 1]], semantics="plain", num_blocks=5).hits == 1


# ---- results -------------------------------------------------------------------------------------------------------

ROWS = chained([[0, 1], [0, 2], [0, 1, 1], [2], [0, 1]])


def test_one_replay() -> None:
    got = pl.replay(ROWS, "lru", 3)
    assert isinstance(got, pl.Replay)
    assert got.accesses == 10
    assert got.hits + got.misses == got.accesses
    assert isclose(got.hit_ratio + got.miss_ratio, 1.0)
    assert not got.interrupted
    frame = got.to_frame()
    assert frame.loc[0, "miss_ratio"] == got.miss_ratio
    assert list(got.requests["hits"]) == got.request_hits
    assert list(got.requests["blocks"]) == [2, 2, 3, 1, 2]
    assert got.bound.misses <= got.misses
    assert "Belady" in got._repr_html_()
    assert "lru, 3 blocks" in repr(got)


def test_a_curve() -> None:
    curve = pl.replay(ROWS, ["lru", "belady", MRU()], [1, 3, 10])
    assert isinstance(curve, pl.MissRatioCurve)
    assert curve.policies == ["lru", "belady", "MRU"]
    assert curve.sizes == [1, 3, 10]
    assert len(curve) == 9
    frame = curve.to_frame()
    assert list(frame["num_blocks"]) == [1, 3, 10] * 3
    assert curve["lru", 10].miss_ratio == curve["belady", 10].miss_ratio
    assert [p.is_bound for p in curve] == [False] * 3 + [True] * 3 + [False] * 3
    with pytest.raises(KeyError):
        curve["lru", 2]
    assert "belady" in curve._repr_html_()
    assert "3 sizes" in repr(curve)


def test_titles() -> None:
    class Half(Eviction):
        share: float = pl.policies.param(0.5, help="How much.")

        def priority(self, block: Block) -> float:
            return block.born * self.share

    assert pl.replay(ROWS, [Half(), Half(share=0.1)], 3).policies == [repr(Half()), repr(Half(share=0.1))]
    assert pl.replay(ROWS, {"one": "lru", "two": Half()}, 3).policies == ["one", "two"]
    assert isinstance(pl.replay(ROWS, "lru", [3]), pl.MissRatioCurve)
    assert isinstance(pl.replay(ROWS, ["lru"], 3), pl.MissRatioCurve)
    curve = pl.replay(ROWS, [Half(share=0.25)], 3)
    assert curve["Half", 3].params == {"share": 0.25}


def test_names_from_outside_are_escaped() -> None:
    requests = tuple(Request(request_id=str(i), prompt=row) for i, row in enumerate(ROWS))
    curve = pl.replay(Workload("<b>$x</b>", requests), {"<i>$": "lru"}, [1, 2], block_size=1)
    assert "<b>" not in curve._repr_html_()
    assert "<i>" not in curve._repr_html_()
    assert "<b>" not in curve["<i>$", 1]._repr_html_()
    assert curve.plot().png()


@pytest.mark.parametrize("sizes", [[5], [1, 2, 4], list(range(1, 21))])
def test_the_figure(sizes: list[int]) -> None:
    names = [*servable("eviction")[:8], "belady"]
    figure = pl.replay(ROWS, names, sizes).plot()
    (ax,) = figure.axes
    assert {t.get_text() for t in ax.texts} == set(names)
    assert ax.get_xscale() == "log"
    assert figure.png()
    heights = sorted(text.xy[1] for text in ax.texts)
    assert all(b - a > 0.04 for a, b in pairwise(heights))
    assert heights[-1] <= 1.0


class Stopped(MRU):
    """Ctrl-C comes with the n-th release, of all caches together."""

    left: int = 0
    count: ClassVar[list[int]] = [0]

    def release(self, block: Block) -> None:
        self.count[0] += 1
        if self.count[0] == self.left:
            raise KeyboardInterrupt
        super().release(block)


def test_ctrl_c_keeps_what_there_is() -> None:
    rows = [[i % 50] for i in range(2000)]
    Stopped.count[0] = 0
    got = pl.replay(rows, Stopped(left=1500), 100)
    assert got.interrupted
    assert 0 < got.accesses < 1500
    assert got.hits == got.accesses - 50
    assert "interrupted" in repr(got)
    assert "interrupted" in got._repr_html_()
    Stopped.count[0] = 0
    curve = pl.replay(rows, ["lru", Stopped(left=2500)], [10, 100])
    assert curve.interrupted
    assert [(p.eviction, p.num_blocks) for p in curve] == [("lru", 10), ("lru", 100), ("Stopped", 10)]
    assert not any(p.interrupted for p in curve)
    Stopped.count[0] = 0
    with pytest.raises(KeyboardInterrupt):
        pl.replay(rows, Stopped(left=1), 100)


# ---- the command line, the benchmark -------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(str(i * i % 13) for i in range(100)))
    arguments = ["replay", str(tmp_path / "ids.txt"), "--eviction", "lru, fifo,belady", "--num-blocks", "2,4"]
    shown = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "curve.png")])
    assert shown.exit_code == 0, shown.output
    assert "belady" in shown.stdout
    assert (tmp_path / "curve.png").stat().st_size > 1000
    done = CliRunner().invoke(app, [*arguments, "--requests", "50", "--json"])
    answer = json.loads(done.stdout)
    assert answer["accesses"] == 50
    want = pl.replay([i * i % 13 for i in range(50)], "fifo", 4).miss_ratio
    assert [
        r["miss_ratio"] for r in answer["results"] if (r["eviction"], r["num_blocks"]) == ("fifo", 4)
    ] == [want]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--eviction", "lur"],
        ["--num-blocks", "many"],
        ["--num-blocks", "0"],
        ["--semantics", "both"],
        ["--touch-order", "tail"],
        ["--plot", "no-such-folder/curve.png"],
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, wrong: list[str]) -> None:
    (tmp_path / "ids.txt").write_text("1\n2\n")
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "ids.txt"), *wrong])
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from pagedlab.bench import replay as bench

    monkeypatch.setattr(bench, "stream", lambda: accesses([i * i % 97 for i in range(3000)]))
    monkeypatch.setattr(bench, "NUM_BLOCKS", (20,))
    rows = bench.measure(repeats=1)
    assert [r["contender"] for r in rows] == ["OrderedDict", "lru", "fifo", "lfu"]
    assert rows[0]["miss_ratio"] == rows[1]["miss_ratio"]
    assert all(r["accesses_per_s"] > 0 for r in rows)


# ---- many points at once -------------------------------------------------------------------------------------------


class KeepsShort(Eviction):
    """Defined here, so that other processes cannot import it."""

    def priority(self, block: Block) -> float:
        return -block.depth


def test_processes_find_what_one_finds() -> None:
    trace = accesses([[i % 7, i % 7 + 10, i % 5 + 20] for i in range(60)])
    policies = {"lru": "lru", "mine": KeepsShort(), "belady": "belady"}
    alone = pl.replay(trace, policies, [3, 5, 8], progress=False)
    shared = pl.replay(trace, policies, [3, 5, 8], jobs=2, progress=False)
    assert shared.rows == alone.rows  # type: ignore[union-attr]
    assert [p.request_hits for p in shared] == [p.request_hits for p in alone]  # type: ignore[union-attr]
    assert all(p.trace is trace for p in shared)  # type: ignore[union-attr]


@pytest.mark.parametrize("jobs", [0, True, 1.5])
def test_jobs_must_be_a_number(jobs: Any) -> None:
    with pytest.raises(ConfigError, match="jobs must be a whole number"):
        pl.replay([1, 2, 3], ["lru", "fifo"], 2, jobs=jobs)


def test_distance_to_the_bound() -> None:
    curve = pl.replay([1, 2, 3, 1, 2, 3], ["lru", "belady"], [2, 3], semantics="plain", progress=False)
    assert isinstance(curve, MissRatioCurve)
    assert curve.distance() == {
        ("lru", 2): pytest.approx(2 / 6),
        ("lru", 3): 0.0,
        ("belady", 2): 0.0,
        ("belady", 3): 0.0,
    }
    headings, rows = curve.hits_table()
    assert headings == ["eviction", "2 blocks", "3 blocks"]
    assert rows == [["belady", "33.33  +0.00", "50.00  +0.00"], ["lru", "0.00  -33.33", "50.00  +0.00"]]
    with pytest.raises(ConfigError, match="'fifo' was not replayed"):
        curve.distance("fifo")
    figure = curve.plot_distance()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["lru"]
    assert {t.get_text() for t in figure.axes[0].texts} == {"33.3", "0.0"}
