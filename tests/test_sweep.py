"""`sweep`: many configurations, in processes, in a file that it can go on with."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import pagedlab as pl
from pagedlab import cli
from pagedlab.errors import ConfigError, PagedLabError, ResultsError, WorkloadError
from pagedlab.executors.stub import StubExecutor
from pagedlab.lab.sweep import files
from pagedlab.lab.sweep.work import Work, at_rate
from pagedlab.policies.eviction import Eviction

SMALL = pl.Config(num_blocks=64)
AXES = {"eviction": ["lru", "fifo"], "num_blocks": [48, 64]}


def chat(seed: int = 0, turns: int = 2, rate: float = 16.0) -> pl.Workload:
    return pl.workloads.chat(seed, conversations=6, turns=turns, rate=rate, max_tokens=16)


def numbers(sweep: pl.Sweep) -> list[dict[str, Any]]:
    """Rows without what the clock on the wall says."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in sweep.rows]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the jobs that were worked off in this process."""
    seen: list[int] = []
    serve = Work.serve

    def counted(self: Work, number: int) -> Any:
        seen.append(number)
        return serve(self, number)

    monkeypatch.setattr(Work, "serve", counted)
    return seen


def script(folder: Path, text: str, *arguments: str, **options: Any) -> str:
    """Run a Python script as a user would, and return what it printed."""
    file = folder / "script.py"
    file.write_text(text)
    command = [sys.executable, str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_says_what_the_function_says() -> None:
    done = pl.sweep(SMALL, AXES, chat(), jobs=1, hardware="l4")
    assert [(row["eviction"], row["num_blocks"]) for row in done.rows] == [
        ("lru", 48),
        ("lru", 64),
        ("fifo", 48),
        ("fifo", 64),
    ]
    for row in done.rows:
        config = pl.Config.from_json(row["config"])
        assert config == SMALL.replace(eviction=row["eviction"], num_blocks=row["num_blocks"])
        single = pl.simulate(config, chat(), hardware="l4").summary()
        for key in ("tokens_per_s", "ttft_p95", "hit_ratio", "preemptions", "requests"):
            assert row[key] == single[key], key
        assert row["error"] is None
        assert row["seconds"] > 0
        assert json.loads(row["options"])["hardware"] == "l4"
        assert row["pagedlab"]
        assert row["python"].startswith("3.")
    assert len({row["point"] for row in done.rows}) == 4
    assert not done.interrupted


@pytest.mark.parametrize("how", ["simulate", "replay"])
def test_processes_change_nothing(how: str) -> None:
    given = pl.workloads.zipf(num_requests=200, blocks=200)
    axes: dict[str, Any] = {"num_blocks": [16, 48, 32], "eviction": ["lru", "belady", "lfu"]}
    one, two = (pl.sweep(SMALL, axes, given, how, jobs=jobs, path=None) for jobs in (1, 2))
    assert numbers(one) == numbers(two)
    assert [row["num_blocks"] for row in two.rows] == [16] * 3 + [48] * 3 + [32] * 3
    refused = [row["eviction"] for row in two.rows if row["error"]]
    assert refused == (["belady"] * 3 if how == "simulate" else [])


def test_replay_counts_as_replay_does() -> None:
    given = pl.workloads.conversations(sessions=8)
    axes = {
        "eviction": ["lru", pl.make("eviction", "lfu")],
        "num_blocks": [20, 80],
        "semantics": ["prefix", "plain"],
    }
    done = pl.sweep(pl.Config(), axes, given, "replay", jobs=1, block_size=8)
    for row in done.rows:
        single = pl.replay(
            given, row["eviction"], row["num_blocks"], semantics=row["semantics"], block_size=8
        )
        assert (row["hits"], row["accesses"]) == (single.hits, single.accesses)
        assert row["request_hit_ratio"] == pytest.approx(single.requests["hit_ratio"].mean())
        assert row["requests_hit"] == (single.requests.hits == single.requests.blocks).sum()
        assert row["requests_missed"] == (single.requests.hits == 0).sum()
        assert row["miss_ratio"] == single.miss_ratio
        assert json.loads(row["config"])["num_blocks"] == row["num_blocks"]


def test_replay_takes_what_replay_takes() -> None:
    ids = [1, 2, 3, 1, 2, 3]
    done = pl.sweep(pl.Config(num_blocks=2), {"eviction": ["lru", "belady"]}, ids, "replay", jobs=1)
    assert [row["hits"] for row in done.rows] == [0, 2]


def test_run_stays_in_this_process_unless_told_otherwise(served: list[int]) -> None:
    stub = StubExecutor()
    done = pl.sweep(SMALL, AXES, chat(), "run", executor=stub, clock="step", check=True)
    assert sorted(served) == [0, 1, 2, 3]
    single = pl.run(SMALL.replace(num_blocks=48), chat(), executor=stub, clock="step").summary()
    assert done.rows[0]["ttft_mean"] == single["ttft_mean"]
    assert done.rows[0]["kernel_used"] == single["kernel"]


def test_measures_of_ones_own() -> None:
    own: dict[str, Callable[[Any], Any]] = {
        "in_time": lambda run: run.goodput(ttft=1.0).share,
        "steps": lambda run: np.int64(len(run.columns("steps")["step"])),
    }
    done = pl.sweep(SMALL, AXES, chat(), jobs=1, measures=own)
    run = pl.simulate(SMALL.replace(num_blocks=48), chat())
    assert done.rows[0]["in_time"] == run.goodput(ttft=1.0).share
    assert done.rows[0]["steps"] == len(run.steps)
    bad = pl.sweep(SMALL, {}, chat(), jobs=1, measures={"whole": lambda run: run})
    assert "must be a number" in bad.rows[0]["error"]
    with pytest.raises(ConfigError, match="as another column is"):
        pl.sweep(SMALL, AXES, chat(), jobs=1, measures={"eviction": len})


# ---- axes ----------------------------------------------------------------------------------------------------------


def test_rates_of_a_workload_and_of_its_function() -> None:
    axes = {"rate": [2.0, 8.0], "scale_rate": [1, 3]}
    given = pl.sweep(SMALL, axes, chat(), jobs=1)
    for row in given.rows:
        changed = at_rate(chat(), row["rate"]).scale_rate(row["scale_rate"])
        assert row["ttft_mean"] == pl.simulate(SMALL, changed).summary()["ttft_mean"]
    arrivals = [r.arrival for r in at_rate(chat(), 5.0)]
    assert (len(arrivals) - 1) / (max(arrivals) - min(arrivals)) == pytest.approx(5.0)
    made = pl.sweep(SMALL, {"rate": [2.0, 8.0]}, chat, jobs=1)
    assert [r["ttft_mean"] for r in made.rows] == [
        pl.simulate(SMALL, chat(rate=rate)).summary()["ttft_mean"] for rate in (2.0, 8.0)
    ]
    with pytest.raises(WorkloadError, match="all at once"):
        pl.sweep(SMALL, {"rate": [2.0]}, pl.workloads.mixed_lengths(num_requests=4), jobs=1)
    with pytest.raises(WorkloadError, match="above 0"):
        pl.sweep(SMALL, {"rate": [0]}, chat(), jobs=1)


def test_a_seed_is_the_workloads() -> None:
    done = pl.sweep(SMALL, {"seed": [3, 4], "turns": np.array([1, 2])}, chat, jobs=1)
    for row in done.rows:
        single = pl.simulate(SMALL, chat(seed=row["seed"], turns=row["turns"])).summary()
        assert row["ttft_mean"] == single["ttft_mean"]
    assert len({row["workload_digest"] for row in done.rows}) == 4
    with pytest.raises(ConfigError, match="given as it is"):
        pl.sweep(SMALL, {"seed": [0, 1]}, chat(), jobs=1)
    run = pl.sweep(SMALL, {"seed": [5]}, [[1, 2, 3]], "run", executor=StubExecutor(), clock="step")
    assert pl.Config.from_json(run.rows[0]["config"]).seed == run.rows[0]["seed"] == 5


def test_several_workloads_are_an_axis() -> None:
    given = {"short": chat(turns=1), "long": chat, "named": "mixed-lengths"}
    done = pl.sweep(SMALL, {"eviction": ["lru"]}, given, jobs=1)
    assert done.axes == {"eviction": ["lru"], "workload": ["short", "long", "named"]}
    assert [row["requests"] for row in done.rows] == [6, 12, 64]
    some = pl.sweep(SMALL, {"workload": ["long"]}, given, jobs=1)
    assert [row["workload"] for row in some.rows] == ["long"]
    with pytest.raises(ConfigError, match="did you mean 'short'"):
        pl.sweep(SMALL, {"workload": ["shrt"]}, given, jobs=1)


def test_arguments_of_the_function_and_parameters_of_policies() -> None:
    axes = {
        "hardware": {"small": "l4", "big": "h100-sxm"},
        "swap.min_hits": [0, 2],
        "num_blocks": [64, "fit"],
        "temperature": [0.5],
    }
    done = pl.sweep(SMALL.replace(swap="host"), axes, chat(), jobs=1)
    frame = done.to_frame()
    assert list(frame.columns[:4]) == list(axes)
    assert frame.error.isna().all()
    speed = frame.groupby("hardware").tokens_per_s.mean()
    assert speed["big"] > speed["small"]
    sizes = {row["num_blocks"]: json.loads(row["config"])["num_blocks"] for row in done.rows}
    assert sizes[64] == 64
    assert sizes["fit"] > 1000


@pytest.mark.parametrize(
    ("axes", "options", "said"),
    [
        ({"evction": ["lru"]}, {}, "did you mean 'eviction'"),
        ({"hardwre": ["l4"]}, {}, "did you mean 'hardware'"),
        ({"temprature": [1]}, {}, "did you mean 'temperature'"),
        ({"turn": [1]}, {}, "did you mean 'turns'"),
        ({"workload.trns": [1]}, {}, "did you mean 'turns'"),
        ({"config.num_block": [1]}, {}, "did you mean 'num_blocks'"),
        ({"eviction.k": [1]}, {}, "no parameter 'k'"),
        ({"eviction": ["lruu", "lru"]}, {}, "did you mean 'lru'"),
        ({"eviction": "lru"}, {}, "a list of values"),
        ({"eviction": []}, {}, "empty"),
        ({"eviction": ["lru", "lru"]}, {}, "twice"),
        ({"eviction": ["lru", pl.policies.LRU()]}, {}, "twice"),
        ({"eviction": {"a": "lru", "b": pl.policies.LRU()}}, {}, "are the same"),
        ({"hardware": ["l4"]}, {"hardware": "h100-sxm"}, "given twice"),
        ({}, {"hardwre": "l4"}, "did you mean 'hardware'"),
        ({"seconds": [1]}, {}, "as a column is"),
        ({"semantics": ["plain"]}, {}, "no axis 'semantics'"),
        ([("eviction", ["lru"])], {}, "must map names"),
        ({}, {"jobs": 0}, "jobs"),
        ({}, {"how": "guess"}, "how must be one of"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    axes: Any, options: dict[str, Any], said: str, served: list[int]
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        pl.sweep(SMALL, axes, chat, **{"jobs": 1, **options})
    assert "\n" not in str(caught.value)
    assert not served


def test_a_replay_has_no_use_for_other_fields() -> None:
    with pytest.raises(ConfigError, match="reads nothing but eviction and num_blocks"):
        pl.sweep(SMALL, {"max_num_seqs": [1, 2]}, chat(), "replay", jobs=1)


# ---- failing -------------------------------------------------------------------------------------------------------


class Broken(Eviction):
    """Falls over when it is asked."""

    def priority(self, block: Any) -> float:
        raise RuntimeError("out of\nideas <b>")


def test_a_failing_point_is_a_row_and_the_others_go_on(tmp_path: Path, served: list[int]) -> None:
    axes = {"eviction": ["lru", Broken(), "fifo"]}
    file = tmp_path / "sweep.parquet"
    for _ in range(2):
        done = pl.sweep(SMALL.replace(num_blocks=24), axes, chat(), jobs=1, path=file)
        assert [row["error"] for row in done.rows] == [None, "RuntimeError: out of ideas <b>", None]
        assert done.rows[1]["ttft_mean"] is None
        assert done.rows[2]["ttft_mean"] > 0
        assert list(done.errors) == ["eviction=Broken"]
        assert "<b>" not in done._repr_html_()
    assert served == [0, 1, 2, 1]  # what failed is tried again


def test_a_combination_that_contradicts_itself_is_a_row_too(tmp_path: Path) -> None:
    axes = {"swap": ["drop", "host"], "host_blocks": [0, 64]}
    done = pl.sweep(SMALL, axes, chat(), jobs=1, path=tmp_path / "sweep.json")
    assert [row["error"] is None for row in done.rows] == [True, True, False, True]
    assert "host_blocks must be at least 1" in done.rows[2]["error"]
    assert numbers(pl.load_sweep(tmp_path / "sweep.json")) == numbers(done)


def test_a_dead_process_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "sweep.parquet"
    pl.sweep(SMALL, {"num_blocks": [48, 64]}, chat(), jobs=1, path=file)
    with pytest.raises(PagedLabError, match="process died"):
        pl.sweep(
            SMALL,
            {"num_blocks": [48, 64, 80, 96]},
            chat(),
            jobs=2,
            path=file,
            outputs=lambda r, s: os._exit(3),
        )
    assert len(pl.load_sweep(file).rows) == 2


def test_work_that_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="cannot be sent to other processes"):
        pl.sweep(SMALL, AXES, chat(), jobs=2, outputs=lambda r, s: lock)


# ---- files and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_a_file_comes_back_whole(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "deep" / f"sweep{suffix}"
    axes = {"num_blocks": [48, "fit"], "max_tokens": [None, 8], "watermark": [0, 0.1]}
    done = pl.sweep(SMALL, axes, chat(), jobs=1, path=file)
    loaded = pl.load_sweep(file)
    assert loaded.rows == done.rows
    assert loaded.facts["versions"]["python"]
    assert loaded.facts["hardware"]
    assert loaded.axes == done.axes
    assert not loaded.interrupted
    assert repr(loaded) == repr(done)
    assert loaded._repr_html_() == done._repr_html_()
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    if suffix == ".parquet":
        assert pd.read_parquet(file).tokens_per_s.tolist() == [row["tokens_per_s"] for row in done.rows]
    assert loaded.save(tmp_path / "copy.json") == tmp_path / "copy.json"
    assert pl.load_sweep(tmp_path / "copy.json").rows == done.rows


def test_what_is_there_is_not_done_again(tmp_path: Path, served: list[int]) -> None:
    file = tmp_path / "sweep.parquet"
    whole = pl.sweep(SMALL, {"eviction": ["lru", "fifo", "lfu"], "num_blocks": [48, 64]}, chat(), jobs=1)
    del served[:]
    pl.sweep(SMALL, {"eviction": ["lru", "fifo"], "num_blocks": [48]}, chat(), jobs=1, path=file)
    assert len(served) == 2
    more = pl.sweep(SMALL, {"num_blocks": [64, 48], "eviction": ["lfu", "lru"]}, chat(), jobs=1, path=file)
    assert len(served) == 5  # three of these four are new
    assert [(r["num_blocks"], r["eviction"]) for r in more.rows] == [
        (n, e) for n in (64, 48) for e in ("lfu", "lru")
    ]
    there = pl.load_sweep(file)  # the one that was not asked for is still in it
    assert repr(there) == "<sweep of 2 num_blocks × 3 eviction: 5 of 5 points>"
    full = pl.sweep(
        SMALL, {"eviction": ["lru", "fifo", "lfu"], "num_blocks": [48, 64]}, chat(), jobs=1, path=file
    )
    assert len(served) == 6
    assert numbers(full) == numbers(whole)
    before = file.stat().st_mtime_ns
    pl.sweep(SMALL, {"eviction": ["lru", "fifo"], "num_blocks": [48]}, chat(), jobs=1, path=file)
    assert len(served) == 6
    assert file.stat().st_mtime_ns == before
    pl.sweep(SMALL, AXES, chat(), jobs=1, path=file, resume=False)
    assert len(served) == 10
    assert len(pl.load_sweep(file).rows) == 4


def test_other_options_are_other_points(tmp_path: Path, served: list[int]) -> None:
    file = tmp_path / "sweep.json"
    for options in (
        {},
        {"hardware": "l4"},
        {"max_tokens": 4},
        {"measures": {"steps": lambda run: len(run.steps)}},
        {},
    ):
        pl.sweep(SMALL, {"eviction": ["lru"]}, chat(), jobs=1, path=file, **options)
    pl.sweep(SMALL.replace(max_num_seqs=2), {"eviction": ["lru"]}, chat(), jobs=1, path=file)
    assert len(served) == 5
    assert len(pl.load_sweep(file).rows) == 5


def test_an_edited_policy_is_another_point(tmp_path: Path, served: list[int]) -> None:
    def defined(body: str, spaces: str = "") -> Any:
        text = "from pagedlab.policies import Eviction\n" + spaces + "FACTOR = 2\n"
        text += f"def score(block): return {body}\n"
        text += "class Mine(Eviction):\n    def priority(self, block): return score(block) * FACTOR\n"
        scope: dict[str, Any] = {"__name__": "__main__"}
        exec(text, scope)
        return scope["Mine"]()

    file = tmp_path / "sweep.json"
    for policy in (
        defined("block.depth"),
        defined("block.depth", "\n\n"),  # the same, further down
        defined("-block.depth"),
        defined("block.depth"),
    ):
        pl.sweep(SMALL, {"eviction": {"mine": policy}}, chat(), jobs=1, path=file)
    assert len(served) == 2


IDENTITY = """
import json, sys
import pagedlab as pl

class Mine(pl.policies.Eviction):
    words: str = "x"
    def priority(self, block):
        return block.depth if block.session in {"a", "b", "c"} else helper(block)

def helper(block):
    return len({"x", "y"} & {block.session})

requests = [pl.Request(request_id=str(i), prompt=list(range(40)), salt="tenant") for i in range(3)]
given = pl.Workload("mine", tuple(requests))
axes = {"eviction": ["lru", Mine(words="y")], "cost": [pl.make("cost", "roofline")]}
done = pl.sweep(pl.Config(), axes, given, jobs=1, measures={"m": lambda run: len(set("abc"))},
                outputs=pl.simulate(pl.Config(), given))
print(json.dumps([row["point"] for row in done.rows]))
"""


def test_points_are_the_same_in_every_process(tmp_path: Path) -> None:
    said = [script(tmp_path, IDENTITY, env={**os.environ, "PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    assert said[0] == said[1]
    assert len(set(json.loads(said[0]))) == 2


class Explosive:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (99,))


def foreign(path: Path) -> Iterator[bytes]:
    """Contents that are no sweep."""
    yield b""
    yield pickle.dumps(Explosive())
    pl.sweep(SMALL, {}, chat(), jobs=1, path=path)
    whole = path.read_bytes()
    yield whole[: len(whole) // 2]
    if path.suffix == ".json":
        yield from (b"{", b"[]", b"null", b"[" * 100_000, b'{"format": 1}', b'{"rows": []}', b"\xff\xfe")
        yield whole.replace(b'"format": 1', b'"format": 99')
        yield whole.replace(b'"kind": "sweep"', b'"kind": "run"')
        yield whole.replace(b'"axes": {}', b'"axes": 7')
        yield whole.replace(b'"point"', b'"pint"')
    else:
        pd.DataFrame({"point": ["a"]}).to_parquet(path)
        yield path.read_bytes()
        table = pa.table({"x": [1]}).replace_schema_metadata({b"pagedlab": b"[" * 100_000})
        pq.write_table(table, path)
        yield path.read_bytes()


@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_what_is_no_sweep_is_left_alone(tmp_path: Path, suffix: str, served: list[int]) -> None:
    file = tmp_path / f"sweep{suffix}"
    contents = list(foreign(tmp_path / f"whole{suffix}"))
    del served[:]
    for content in contents:
        file.write_bytes(content)
        for resume in (True, False):
            with pytest.raises(ResultsError, match=r"left alone|this version reads format 1") as caught:
                pl.sweep(SMALL, AXES, chat(), jobs=1, path=file, resume=resume)
            assert "\n" not in str(caught.value)
            assert file.name in str(caught.value)
        with pytest.raises(ResultsError):
            pl.load_sweep(file)
        assert file.read_bytes() == content
    assert not served


def test_a_sweep_of_something_else_is_left_alone(tmp_path: Path, served: list[int]) -> None:
    file = tmp_path / "sweep.json"
    pl.sweep(SMALL, AXES, chat(), jobs=1, path=file)
    before = file.read_bytes()
    del served[:]
    for workload in (chat(seed=1), pl.workloads.mixed_lengths, {"chat": chat(seed=1)}):
        with pytest.raises(ResultsError, match="another workload"):
            pl.sweep(SMALL, AXES, workload, jobs=1, path=file)
    with pytest.raises(ResultsError, match="how='simulate'"):
        pl.sweep(SMALL, AXES, chat(), "replay", jobs=1, path=file)
    with pytest.raises(ResultsError, match=r"ends in \.parquet or \.json"):
        pl.sweep(SMALL, AXES, chat(), jobs=1, path=tmp_path / "sweep.csv")
    with pytest.raises(ResultsError, match="no such file"):
        pl.load_sweep(tmp_path / "nowhere.json")
    assert file.read_bytes() == before
    assert not served


def test_the_file_can_be_read_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedlab.lab.sweep.book.PAUSE", 0.0)
    file = tmp_path / "sweep.parquet"
    seen: list[tuple[int, bool]] = []

    def look(run: pl.Run) -> int:
        there = pl.load_sweep(file)
        seen.append((len(there.rows), there.interrupted))
        time.sleep(0.1)
        return 0

    pl.sweep(SMALL, AXES, chat(), jobs=1, path=file, measures={"look": look})
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)
    assert seen[0] == (0, True)
    assert seen[-1][0] >= 2
    assert not pl.load_sweep(file).interrupted


def test_a_file_that_cannot_be_written_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sweep.json"
    pl.sweep(SMALL, {"eviction": ["lru"]}, chat(), jobs=1, path=file)
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(ResultsError, match="No space left"):
        pl.sweep(SMALL, AXES, chat(), jobs=1, path=file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]


# ---- processes -----------------------------------------------------------------------------------------------------

NOTEBOOK = """
from __future__ import annotations

import os, sys
from typing import ClassVar

import pagedlab as pl

@pl.register("eviction", "mine")
class Mine(pl.policies.Eviction):
    "By depth."
    table: ClassVar[dict[str, int]] = {}
    sign: int = 1
    def priority(self, block):
        return helper(block) * self.sign

class Unregistered(Mine):
    pass

def helper(block):
    return block.depth

@pl.register("swap", "keep-mine")
class Keep(pl.policies.Swap):
    "Its host tier asks for a policy by name."
    uses_host = True
    def store(self, block, tier):
        return True
    def tier_eviction(self, tier):
        return "mine"

def made(seed=0):
    with open(sys.argv[1], "a") as log:
        log.write(f"{os.getpid()}\\n")
    return pl.workloads.chat(seed, conversations=6, turns=3, max_tokens=16)

axes = {
    "eviction": ["mine", Unregistered(sign=-1)],
    "swap": ["drop", "keep-mine"],
    "num_blocks": [32, 40],
    "preemption": ["recompute", "swap"],
}
own = {"pid": lambda run: os.getpid()}
rows = [pl.sweep(pl.Config(), axes, made, jobs=jobs, measures=own).rows for jobs in (1, 2)]
different = ("seconds", "pid", "point")
same = [[{k: v for k, v in row.items() if k not in different} for row in some] for some in rows]
assert same[0] == same[1]
assert {row["error"] for row in rows[1]} == {None}, rows[1]
assert len({row["ttft_mean"] for row in rows[1]}) > 4
assert {row["pid"] for row in rows[0]} == {os.getpid()}
print(os.getpid(), *{row["pid"] for row in rows[1]})
"""


def test_policies_of_a_script_work_in_processes_that_get_the_workload_once(tmp_path: Path) -> None:
    log = tmp_path / "made"
    me, *others = script(tmp_path, NOTEBOOK, str(log)).split()
    assert 1 <= len(others) <= 2
    assert me not in others
    made = log.read_text().split()
    for pid in others:
        assert made.count(pid) == 1
    assert made.count(me) <= 3


SLOW = """
import os, sys, time
import pagedlab as pl

class Slow(pl.policies.Eviction):
    def reset(self, **more):
        print("begin", flush=True)
        time.sleep(0.4)
        super().reset(**more)
    def priority(self, block):
        return block.last_released

jobs, file = int(sys.argv[1]), sys.argv[2]
sizes = list(range(64, 76))
done = pl.sweep(pl.Config(eviction=Slow()), {"num_blocks": sizes}, "mixed-lengths", jobs=jobs, path=file)
print("end", done.interrupted, len(done.rows), flush=True)
"""


def children(pid: int) -> set[int]:
    """Worker processes of a process: not joblib's trackers of files and semaphores, which wait for it to end."""
    psutil = pytest.importorskip("psutil")
    found = psutil.Process(pid).children(recursive=True)
    return {p.pid for p in found if "resource_tracker" not in " ".join(p.cmdline())}


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_what_is_there_and_leaves_nobody(tmp_path: Path, jobs: int) -> None:
    psutil = pytest.importorskip("psutil")
    file = tmp_path / "sweep.parquet"
    (tmp_path / "script.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "script.py"), str(jobs), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        begun = 0
        for line in process.stdout:
            begun += line.startswith("begin")
            if begun == 2 * jobs + 1:
                break
        workers_there = children(process.pid)
        assert len(workers_there) == (2 if jobs == 2 else 0)
        # As a terminal does: to the whole group.
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert "end True" in rest
    assert not [pid for pid in workers_there if psutil.pid_exists(pid)]
    there = pl.load_sweep(file)
    assert there.interrupted
    assert 1 <= len(there.rows) < 12
    assert f"end True {len(there.rows)}" in rest
    assert all(row["error"] is None for row in there.rows)


def test_processes_end_with_the_sweep() -> None:
    pl.sweep(SMALL, {"num_blocks": [48, 64]}, chat(), jobs=2)
    assert not children(os.getpid())


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sweep.parquet"
    whole = pl.sweep(SMALL, AXES, chat(), jobs=1)
    before = signal.getsignal(signal.SIGINT)
    serve, seen = Work.serve, []

    def pressed(self: Work, number: int) -> Any:
        seen.append(number)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return serve(self, number)

    monkeypatch.setattr(Work, "serve", pressed)
    first = pl.sweep(SMALL, AXES, chat(), jobs=1, path=file)
    assert first.interrupted
    assert pl.load_sweep(file).interrupted
    assert numbers(first) == numbers(whole)[:2]
    second = pl.sweep(SMALL, AXES, chat(), jobs=1, path=file)
    assert not second.interrupted
    assert numbers(second) == numbers(whole)
    assert len(seen) == 5
    assert signal.getsignal(signal.SIGINT) is before


class Pressing(Eviction):
    """Somebody presses Ctrl-C in the middle of a run."""

    pressed: ClassVar[bool] = False

    def priority(self, block: Any) -> float:
        if not Pressing.pressed:
            Pressing.pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0


def test_a_run_that_was_stopped_halfway_is_no_row() -> None:
    axes = {"eviction": ["lru", Pressing(), "fifo"]}
    done = pl.sweep(SMALL.replace(num_blocks=24), axes, chat(), jobs=1)
    assert done.interrupted
    assert [row["eviction"] for row in done.rows] == ["lru"]


# ---- shown ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown() -> pl.Sweep:
    axes = {
        "eviction": {"l$r$u <i>": "lru", "fifo": "fifo"},
        "num_blocks": [32, 48, 64],
        "scale_rate": [1, 2],
    }
    return pl.sweep(SMALL, axes, {"<b>chat</b>": chat()}, jobs=1)


def test_best_says_which_end_is_better(shown: pl.Sweep) -> None:
    frame = shown.to_frame()
    assert shown.best("ttft_mean")["ttft_mean"] == frame.ttft_mean.min()
    assert shown.best("tokens_per_s")["tokens_per_s"] == frame.tokens_per_s.max()
    assert shown.best("tokens_per_s", highest=False)["tokens_per_s"] == frame.tokens_per_s.min()
    with pytest.raises(ConfigError, match="highest=True"):
        shown.best("mean_batch_size")
    with pytest.raises(ConfigError, match="did you mean 'ttft_mean'"):
        shown.best("ttft_men")
    with pytest.raises(ConfigError, match="no point has a number"):
        shown.best("kernel_used", highest=True)


def test_pivot_is_in_the_order_of_the_axes(shown: pl.Sweep) -> None:
    table = shown.pivot("ttft_mean", "num_blocks", "eviction")
    assert list(table.index) == [32, 48, 64]
    assert list(table.columns) == ["l$r$u <i>", "fifo"]
    cells = [r["ttft_mean"] for r in shown.rows if (r["num_blocks"], r["eviction"]) == (48, "fifo")]
    assert table.loc[48, "fifo"] == pytest.approx(sum(cells) / 2)
    assert shown.pivot("ttft_mean", "num_blocks", aggregate="max")[32] == max(
        r["ttft_mean"] for r in shown.rows if r["num_blocks"] == 32
    )
    with pytest.raises(ConfigError, match="did you mean 'eviction'"):
        shown.pivot("ttft_mean", "evction")


def test_plot_draws_a_line_for_each_value(shown: pl.Sweep) -> None:
    figure = shown.plot("ttft_mean", by="eviction")
    (ax,) = figure.axes
    assert ax.get_xlabel() == "num_blocks"
    assert "ttft_mean (s)" in ax.get_ylabel()
    assert "scale_rate" in ax.get_ylabel()
    table = shown.pivot("ttft_mean", "num_blocks", "eviction")
    for line, name in zip(ax.get_lines(), table, strict=True):
        assert list(line.get_xdata()) == [32, 48, 64]
        assert list(line.get_ydata()) == pytest.approx(list(table[name]))
    assert figure._repr_png_().startswith(b"\x89PNG")
    bars = shown.plot("hit_ratio", x="eviction", by="num_blocks")
    assert len(bars.axes[0].patches) == 6
    assert bars.png().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no axis 'sise'"):
        shown.plot("ttft_mean", x="sise")


def test_names_are_escaped(shown: pl.Sweep) -> None:
    html = shown._repr_html_()
    assert "l$r$u &lt;i&gt;" in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert "12 of 12 points" in html


def test_importing_it_starts_nothing() -> None:
    code = (
        "import sys, pagedlab.lab.sweep as s; "
        "assert not {'joblib', 'torch', 'matplotlib', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bar_counts_points(capsys: pytest.CaptureFixture[str]) -> None:
    pl.sweep(SMALL, AXES, chat(), jobs=1, progress=True)
    assert "/4 [" in capsys.readouterr().err
    pl.sweep(SMALL, AXES, chat(), jobs=1)
    assert capsys.readouterr().err == ""


def test_a_service_level_adds_goodput(tmp_path: Path, served: list[int]) -> None:
    file = tmp_path / "sweep.json"
    done = pl.sweep(SMALL, {"num_blocks": [24, 64]}, chat(), jobs=1, slo={"ttft": 0.05}, path=file)
    for row in done.rows:
        run = pl.simulate(SMALL.replace(num_blocks=row["num_blocks"]), chat())
        assert row["goodput_share"] == run.goodput(ttft=0.05).share
    pl.sweep(SMALL, {"num_blocks": [24, 64]}, chat(), jobs=1, slo={"ttft": 0.06}, path=file)
    assert len(served) == 4
    with pytest.raises(ConfigError, match="a replay has no times"):
        pl.sweep(SMALL, {}, chat(), "replay", slo={"ttft": 1.0})


# ---- the command line ----------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["sweep", *arguments])


def test_the_command_goes_on_with_its_file(tmp_path: Path, served: list[int]) -> None:
    file, picture = tmp_path / "sweep.parquet", tmp_path / "sweep.png"
    common = (
        "mixed-lengths",
        "--requests",
        "8",
        "--jobs",
        "1",
        "--out",
        str(file),
        "--set",
        "eviction=lru,fifo",
    )
    first = invoke(*common, "--set", "num_blocks=48")
    assert first.exit_code == 0, first.output
    assert "2 of 2 points" in first.stdout
    more = invoke(*common, "--set", "num_blocks=48,64", "--json", "--plot", str(picture))
    assert more.exit_code == 0, more.output
    assert len(served) == 4
    said = json.loads(more.stdout)
    assert said["axes"] == {"eviction": ["lru", "fifo"], "num_blocks": [48, 64]}
    assert said["results"] == pl.load_sweep(file).rows
    assert picture.read_bytes().startswith(b"\x89PNG")
    invoke(*common, "--set", "num_blocks=48", "--no-resume")
    assert len(served) == 6


def test_the_command_replays() -> None:
    axes = ("--set", "eviction=lru,belady", "--set", "num_blocks=16,64", "--set", "semantics=plain")
    done = invoke("zipf", "--how", "replay", "--jobs", "1", *axes)
    assert done.exit_code == 0, done.output
    assert "miss ratio" in done.stdout
    assert "4 of 4 points" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("chat", "--set", "evction=lru"), "did you mean 'eviction'"),
        (("chat", "--set", "eviction=lru", "--set", "eviction=fifo"), "comes twice"),
        (("chat", "--how", "guess"), "how must be one of"),
        (("chatt",), "did you mean 'chat'"),
        (("chat", "--out", "rows.csv"), "ends in .parquet or .json"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
