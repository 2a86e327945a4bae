"""The laws are tried on policies that break them, each caught by its law, and on all that are registered."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import broken_policies
import numpy as np
import pytest
from broken_policies import BROKEN, Broken
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from typer.testing import CliRunner

import pagedlab as pl
from pagedlab import cli
from pagedlab.errors import ConfigError, LawBroken
from pagedlab.policies import Allocator, Block, Eviction, Kernel, Scheduler, param
from pagedlab.policies.view import View
from pagedlab.registry import SLOTS, lookup_class, policy_names
from pagedlab.testing import LawWarning, checks_for, parametrize_with_checks, policy_machine
from pagedlab.testing import strategies as pst
from pagedlab.testing.check import try_law
from pagedlab.testing.driver import Broke
from pagedlab.testing.drivers import driver_class, has_driver
from pagedlab.testing.search import budget, search
from pagedlab.testing.subject import Subject, find_policy

QUICK = 60
"""Examples of the profile: half of it is tried for each law."""


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """There are some thousand searches here; only the deep profile makes them longer."""
    before = settings.get_current_profile_name()
    if settings.default.max_examples < 1000:  # type: ignore[union-attr]
        settings.register_profile("quick", settings.get_profile(before), max_examples=QUICK)
        settings.load_profile("quick")
    yield
    settings.load_profile(before)


def broken(name: str) -> Any:
    return getattr(broken_policies, name)()


def story(name: str, law: str) -> str:
    """What is said of a law that a broken policy breaks."""
    subject = Subject(broken(name))
    (check,) = [check for check in checks_for(subject.slot) if check.name == law]
    row = try_law(check, subject)
    assert row.status == "failed", row
    return row.detail


# ---- every policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{slot}:{name}" for slot in SLOTS for name in policy_names(slot)])
def test_every_registered_policy_keeps_the_laws(name: str) -> None:
    table = pl.check_policy(name)
    assert table.passed
    assert [row.check for row in table] == [check.name for check in checks_for(name.partition(":")[0])]
    skipped = {row.check: row.detail for row in table if row.status == "skipped"}
    assert not any("no stream got to its end" in reason for reason in skipped.values()), skipped


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.policy.__name__)
def test_a_broken_policy_breaks_its_law_by_name(case: Broken) -> None:
    table = pl.check_policy(case.policy, on_fail=None)
    failed = {row.check: row.detail for row in table.failed}
    assert case.law in failed
    assert failed.keys() <= {case.law, *case.also}, failed


def test_streams_are_the_same_whatever_is_loaded(tmp_path: Path) -> None:
    """Hypothesis likes the numbers in the source of what it takes for one's own modules."""
    (tmp_path / "mine.py").write_text(f"NUMBERS = {list(range(100, 800, 7))}\n")
    script = "from pagedlab.testing.search import drawn; print(drawn(12, 40))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", load + script], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout
        for load in ("", "import mine; ")
    }
    assert len(outputs) == 1


def test_every_law_is_broken_by_somebody() -> None:
    """A law that no policy breaks may be one that cannot fail."""
    caught = {law for case in BROKEN for law in (case.law, *case.also)}
    assert {check.name for slot in SLOTS for check in checks_for(slot)} == caught
    assert len({case.policy for case in BROKEN}) == len(BROKEN) > 60
    assert {case.policy.slot for case in BROKEN} == set(SLOTS)


def test_laws_have_names_and_words() -> None:
    for slot in SLOTS:
        checks = checks_for(slot)
        assert len({check.name for check in checks}) == len(checks)
        for check in checks:
            assert check.summary.endswith(".")
            assert "\n" not in check.summary
            assert len(check.summary) > 20
    with pytest.raises(ConfigError, match=r"evictoin.*did you mean 'eviction'"):
        checks_for("evictoin")


@pytest.mark.parametrize("slot", ["scheduler", "preemption", "prefetch", "swap"])
def test_the_engine_around_a_policy_is_short_of_memory(slot: str) -> None:
    """Not vacuous: its streams meet preemption, eviction, prefix hits, and traffic between the tiers."""
    seen: Counter[str] = Counter()
    names = {
        "scheduler": "chunked-prefill",
        "preemption": "swap",
        "prefetch": "queue-lookahead",
        "swap": "host",
    }
    subject = Subject(find_policy(f"{slot}:{names[slot]}"))

    def attempt(size: int, codes: list[int]) -> None:
        engine = subject.driver(size, codes).run(codes).engine  # type: ignore[attr-defined]
        seen.update(event.kind for event in engine.events)

    subject.search("none", attempt, share=2.0)
    wanted = [
        "RequestPreempted",
        "RequestResumed",
        "BlockRemoved",
        "PrefixHit",
        "SequenceForked",
        "BlocksCopied",
    ]
    wanted += {"preemption": ["BlocksSaved", "BlocksLoaded"], "prefetch": ["BlocksPrefetched"]}.get(slot, [])
    wanted += {"swap": ["BlocksLoaded"]}.get(slot, [])
    assert all(seen[kind] for kind in wanted), seen


# ---- stories ---------------------------------------------------------------------------------------------------------


def test_stories_can_be_read() -> None:
    assert story("NamesWhatIsInUse", "victims_are_not_in_use") == (
        "insert A, release A, hit A, victims(1) returned A; A is in use"
    )
    assert story("IgnoresProtection", "victims_are_unprotected") == (
        "insert A, release A, victims(1, protected=[A]) returned A; A is protected"
    )
    assert story("ReadsTheClock", "same_input_same_decisions") in (
        "insert A, insert B, release B, release A, victims(1) returned A; the first time: victims(1) returned B",
        "insert A, insert B, release B, release A, victims(2) returned A, B; "
        "the first time: victims(2) returned B, A",
    )
    assert story("LeaksWhenItRefuses", "refusal_changes_nothing").endswith("blocks are free")
    assert "of tenant" in story("IgnoresTheSalt", "salts_isolate")
    assert "growth is declared 'constant', but a request runs" in story(
        "ScansAllAndSaysConstant", "work_grows_as_declared"
    )


def test_a_story_is_short() -> None:
    """Shrinking works: nothing is told that is not needed, whichever stream found it."""
    for name, law, most in (
        ("LookingIsUsing", "looking_is_not_using", 8),
        ("EvictsTheNewest", "short_cuts_are_equal", 8),
        ("AlwaysFits", "fits_tells_the_truth", 3),
        ("NeverForgets", "forgotten_blocks_are_not_found", 4),
        ("StarvesTheLowest", "work_ends", 4),
        ("LosesAnAppend", "appends_are_kept", 18),
    ):
        assert story(name, law).count(", ") <= most, story(name, law)


def test_a_law_that_could_not_be_tried_is_not_called_kept() -> None:
    class NeverStarts(Eviction):
        def reset(self, *, capacity: int) -> None:
            raise MemoryError("no room for a list")

    rows = {row.check: row for row in pl.check_policy(NeverStarts, on_fail=None)}
    assert rows["answers_without_error"].detail == "reset raised MemoryError: no room for a list"
    assert rows["victims_are_found"].status == "skipped"
    assert "see answers_without_error" in rows["victims_are_found"].detail


def test_what_fails_only_now_and_then_is_still_told() -> None:
    calls = iter(range(10**6))

    def attempt(size: int, codes: list[int]) -> None:
        if next(calls) == 7:
            raise Broke("luck", "once")

    with pytest.raises(LawBroken, match="once"):
        search("luck", attempt, longest=9, operations=2)


def test_a_deeper_profile_tries_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget() == max(20, settings.default.max_examples // 2)  # type: ignore[union-attr]


# ---- check_policy ----------------------------------------------------------------------------------------------------


def test_on_fail_says_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    bad = broken("IgnoresProtection")
    with pytest.raises(
        LawBroken, match=r"(?s)IgnoresProtection breaks 1 of \d+ laws.*victims_are_unprotected"
    ):
        pl.check_policy(bad)
    with pytest.raises(AssertionError):
        pl.check_policy(type(bad))
    with pytest.warns(LawWarning, match="A is protected") as caught:
        warned = pl.check_policy(bad, on_fail="warn")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = pl.check_policy(bad, on_fail=None)
    assert [dict(row) for row in quiet] == [dict(row) for row in warned]
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ConfigError, match="on_fail must be"):
        pl.check_policy(bad, on_fail="ignore")


def test_expected_failures_are_no_failures() -> None:
    bad = broken("IgnoresProtection")
    table = pl.check_policy(bad, expected_failed_checks={"victims_are_unprotected": "protection comes later"})
    (row,) = [row for row in table if row.status == "xfail"]
    assert row.check == "victims_are_unprotected"
    assert row.detail.startswith("protection comes later: insert A")
    assert table.passed
    with pytest.raises(LawBroken, match=r"victims_are_found: expected to fail \(too hard\), and it passed"):
        pl.check_policy("lru", expected_failed_checks={"victims_are_found": "too hard"})
    with pytest.raises(ConfigError, match=r"no check 'victims_are_fuond'.*did you mean 'victims_are_found'"):
        pl.check_policy("lru", expected_failed_checks={"victims_are_fuond": "a slip"})


def test_the_table_is_for_people_and_for_programs() -> None:
    table = pl.check_policy(broken("IgnoresProtection"), on_fail=None)
    failed = table.failed[0]
    assert (failed.check, failed.status) == (failed["check"], failed["status"])
    assert {row.status for row in table} == {"passed", "failed", "skipped"}
    assert table[-1] is table[len(table) - 1]
    lines = str(table).splitlines()
    assert lines[0].startswith("eviction IgnoresProtection: ")
    assert "1 failed" in lines[0]
    assert any(line.split()[:2] == ["✗", "victims_are_unprotected"] for line in lines)
    assert any(line.split()[:2] == ["✓", "victims_are_distinct"] for line in lines)
    assert len(lines) == 1 + len(table)
    assert json.loads(json.dumps(table.to_dicts()))[0]["check"] == table[0].check


def test_html_is_escaped() -> None:
    class Sly(Eviction):
        def priority(self, block: Block) -> float:
            raise ValueError("<script>alert(1)</script>")

    Sly.__name__ = "<b>Sly</b>"
    html = pl.check_policy(Sly, on_fail=None)._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html


def test_policies_are_found_by_what_names_them(tmp_path: Path) -> None:
    assert find_policy("eviction:lru") == find_policy("lru") == find_policy(lookup_class("eviction", "lru"))
    for given_, message in (
        ("fifo", "allocator and eviction"),
        ("lruu", "did you mean 'lru'"),
        ("eviction:lruu", "no eviction policy 'lruu'"),
        ("evictoin:lru", "cannot be imported"),
        ("no-such-thing:X", "is no slot, module or file"),
        ("broken_policies:Nothing", "Nothing is not there"),
        ("broken_policies:BROKEN", "BROKEN is no policy"),
        (str(tmp_path / "none.py") + ":X", "no file"),
        (3, "3 is no policy"),
        (Eviction.victims, "is no policy"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_policy(given_)
    with pytest.raises(ConfigError, match="slot 'cost'"):
        find_policy(lookup_class("cost", "roofline"))
    file = tmp_path / "mine.py"
    file.write_text("from pagedlab.policies import LRU\nclass Mine(LRU): pass\nraise SystemError('no')\n")
    with pytest.raises(ConfigError, match="SystemError: no"):
        find_policy(f"{file}:Mine")


def test_a_class_of_a_notebook_is_checked() -> None:
    """It lives in ``__main__`` or in a function, where plain pickle would not find it."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "import pagedlab as pl\n"
        "class Mine(pl.policies.Eviction):\n"
        "    weight: float = pl.policies.param(1.0, low=0.0, high=9.0, help='of hits')\n"
        "    def priority(self, block):\n"
        "        return self.weight * block.hits, block.last_released\n",
        scope,
    )
    assert pl.check_policy(scope["Mine"](weight=2.0)).passed

    class Local(Eviction):
        counts_hits = True
        depth: int = param(2, low=0, high=4, help="of something")

        def priority(self, block: Block) -> tuple[float, float]:
            return block.hits, -block.depth * self.depth

    assert pl.check_policy(Local(depth=3)).passed


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    code = "import pagedlab as pl; assert pl.check_policy('reservation:max').passed"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_a_kernel_is_not_tried_where_it_cannot_run() -> None:
    class Elsewhere(Kernel):
        devices = ("quantum",)
        implementation = "no.such.module:Nothing"

    rows = {row.check: row for row in pl.check_policy(Elsewhere)}
    for law in ("agrees_with_dense", "unused_slots_cannot_leak"):
        assert rows[law].status == "skipped"
        assert "runs on quantum, not on 'cpu'" in rows[law].detail


def test_a_policy_that_throws_dice_breaks_one_law_and_not_ten() -> None:
    rows = pl.check_policy(broken("DrawsItsOwnNumbersUnseeded"), on_fail=None)
    assert [row.check for row in rows.failed] == ["same_input_same_decisions"]


def test_checking_leaves_the_world_as_it_was() -> None:
    """Whatever it breaks: random numbers go on, clocks are clocks, no trace function stays, the policy is untouched."""
    for name in ("ReadsTheClock", "DrawsFromEverybodysDice", "HoldsALock"):
        policy = broken(name)
        dice = random.getstate(), str(np.random.get_state())  # noqa: NPY002
        clocks = time.time, time.monotonic, sys.gettrace()
        pl.check_policy(policy, on_fail=None)
        assert (random.getstate(), str(np.random.get_state())) == dice  # noqa: NPY002
        assert (time.time, time.monotonic, sys.gettrace()) == clocks
        assert broken_policies.time.time is time.time
        assert vars(policy) == {}


def test_bounds_are_given_the_future() -> None:
    for name in ("belady", "belady-tree", "belady-cost"):
        rows = {row.check: row for row in pl.check_policy(f"eviction:{name}")}
        assert rows["victims_are_found"].status == "passed"
        assert "knows the future" in rows["memory_is_bounded"].detail


# ---- Hypothesis ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_strategies_make_what_they_say(data: st.DataObject) -> None:
    slot = data.draw(st.sampled_from(SLOTS))
    policy = data.draw(pst.policies(slot))
    assert policy.slot == slot
    assert not getattr(policy, "needs_future", False)
    assert data.draw(pst.configs(num_blocks=7)).num_blocks == 7
    requests = data.draw(pst.request_streams(max_requests=3))
    assert 1 <= len(requests) <= 3
    assert all(request.prompt for request in requests)
    trace = data.draw(pst.access_traces(max_keys=5, max_accesses=30))
    assert len(trace) <= 30
    assert set(trace) <= set(range(5))
    assert all(len(set(table)) == len(table) for table in data.draw(pst.block_tables()))
    assert isinstance(data.draw(st.from_type(Eviction)), Eviction)
    assert isinstance(data.draw(st.from_type(Scheduler)), Scheduler)
    assert isinstance(data.draw(st.from_type(Allocator)), Allocator)
    assert isinstance(data.draw(st.from_type(pl.Config)), pl.Config)
    assert isinstance(data.draw(st.from_type(pl.Request)), pl.Request)


def test_traces_are_not_all_alike() -> None:
    quick = settings(max_examples=500, database=None, derandomize=True)
    hot = find(pst.access_traces(), lambda t: len(t) > 6 and len(set(t)) == 1, settings=quick)
    scan = find(pst.access_traces(), lambda t: len(t) > 6 and len(set(t)) == len(t), settings=quick)
    loop = find(pst.access_traces(), lambda t: len(t) > 6 and t[: len(t) // 2] * 2 == t, settings=quick)
    assert hot != scan != loop


def test_strategies_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ConfigError, match="no slot 'evict'"):
        pst.policies("evict")
    with pytest.raises(ConfigError, match="did you mean 'lru'"):
        pst.policies("eviction", ("lruu",))


MACHINE = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
)


@pytest.mark.parametrize("name", ["eviction:lru", "allocator:first-fit", "lookup:radix"])
def test_machines_pass_what_is_right(name: str) -> None:
    slot, _, policy = name.partition(":")
    machine = policy_machine(slot, lambda: pl.make(slot, policy))
    run_state_machine_as_test(machine, settings=settings(MACHINE, max_examples=8))


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("NamesWhatIsInUse", "victims_are_not_in_use"),
        ("AlwaysFits", "fits_tells_the_truth"),
        ("TiresOfBeingAsked", "looking_is_not_using"),
    ],
)
def test_machines_find_what_is_wrong(name: str, law: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls = getattr(broken_policies, name)
    machine = policy_machine(cls.slot, cls)
    assert machine.__name__ == f"{name}Machine"
    with pytest.raises(LawBroken, match=f"^{law}: "):
        run_state_machine_as_test(machine, settings=MACHINE)


def test_machines_refuse_what_they_cannot_drive() -> None:
    with pytest.raises(
        ConfigError, match="'kernel' has no machine; those with one: eviction, allocator, lookup"
    ):
        policy_machine("kernel", lambda: pl.make("kernel", "dense"))
    with pytest.raises(ConfigError, match="no policy of slot 'lookup'"):
        policy_machine("lookup", lambda: pl.make("eviction", "lru"))
    with pytest.raises(ConfigError, match="needs the future"):
        policy_machine("eviction", lambda: pl.make("eviction", "belady"))
    with pytest.raises(ConfigError, match="no state to drive"):
        driver_class("kernel")
    assert not has_driver("kernel")


# ---- pytest ----------------------------------------------------------------------------------------------------------


@parametrize_with_checks([lookup_class("swap", "drop"), "layout:csr"])
def test_decorated(policy: Any, check: Any) -> None:
    check(policy)


def test_decorated_tests_are_named_after_policy_and_law() -> None:
    (mark,) = test_decorated.pytestmark  # type: ignore[attr-defined]
    names = [case.id for case in mark.args[1]]
    assert "drop-answers_are_yes_or_no" in names
    assert "csr-appends_are_kept" in names
    expected = parametrize_with_checks(["lru"], expected_failed_checks={"victims_are_found": "not yet"}).args[
        1
    ]
    (marked,) = [case for case in expected if case.marks]
    assert marked.id == "lru-victims_are_found"
    assert marked.marks[0].kwargs == {"reason": "not yet", "strict": True}


POLICIES = """
from pagedlab.policies import Eviction

class Good(Eviction):
    def priority(self, block):
        return block.hits

class Bad(Eviction):
    def priority(self, block):
        return 0.0
    def victims(self, n, protected=()):
        return super().victims(n)
"""


def run_pytest(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(pl.__file__).parent.parent)
    alone = "--rootdir", str(folder), "-p", "no:cacheprovider", "-p", "no:xdist"
    command = [sys.executable, "-m", "pytest", "-q", *alone, *arguments]
    path = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), root)))
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_plugin_collects_laws_without_test_files(tmp_path: Path) -> None:
    """Loaded by its entry point, and by -p at the same time."""
    (tmp_path / "mine.py").write_text(POLICIES)
    (tmp_path / "test_other.py").write_text("def test_other():\n    raise SystemExit('collected')\n")
    installed = tmp_path / "site" / "other-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    entry = "[pytest11]\npagedlab.testing.plugin = pagedlab.testing.plugin\n"
    (installed / "entry_points.txt").write_text(entry)
    site = str(tmp_path / "site")
    done = run_pytest(
        tmp_path,
        "-p",
        "pagedlab.testing.plugin",
        "--policy",
        "mine:Good",
        "--policy",
        "mine.py:Bad",
        "-k",
        "unprotected or legal or hits",
        PYTHONPATH=site,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED mine.py:Bad::victims_are_unprotected - insert A, release A" in done.stdout
    assert "1 failed" in done.stdout
    assert "Traceback" not in done.stdout
    once = run_pytest(tmp_path, "--policy", "mine:Good", "-k", "distinct or resident", PYTHONPATH=site)
    assert once.returncode == 0, once.stdout + once.stderr
    assert "2 passed" in once.stdout
    refused = run_pytest(tmp_path, "--policy", "mine:Nobody", PYTHONPATH=site)
    assert refused.returncode == 4
    assert "--policy mine:Nobody: mine: Nobody is not there; policies there: Good, Bad" in refused.stderr


def test_the_plugin_leaves_other_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POLICIES)
    (tmp_path / "test_own.py").write_text(
        "import sys\n"
        "from pagedlab.testing import parametrize_with_checks\n"
        "def test_light():\n    assert 'torch' not in sys.modules\n"
        "@parametrize_with_checks(['reservation:max'])\n"
        "def test_laws(policy, check):\n    check(policy)\n"
    )
    done = run_pytest(tmp_path, "-p", "pagedlab.testing.plugin", "-rs", "test_own.py")
    assert done.returncode == 0, done.stdout
    assert "has no reset" in done.stdout
    both = run_pytest(
        tmp_path,
        "-p",
        "pagedlab.testing.plugin",
        "test_own.py",
        "--policy",
        "mine:Good",
        "-k",
        "light or distinct",
    )
    assert "2 passed" in both.stdout, both.stdout


# ---- command line ----------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["check", *arguments])


def test_the_command_prints_a_table_and_stories(tmp_path: Path) -> None:
    file = tmp_path / "policies_of_mine.py"
    file.write_text(POLICIES)
    good, bad = invoke(f"{file}:Good"), invoke(f"{file}:Bad")
    assert good.exit_code == 0, good.output
    assert "✓ victims_are_resident" in good.stdout
    assert bad.exit_code == 1
    assert "✗ victims_are_unprotected" in bad.stdout
    assert "is protected" in bad.stdout
    expected = invoke(f"{file}:Bad", "--expect", "victims_are_unprotected=later")
    assert expected.exit_code == 0
    assert "1 xfail" in expected.stdout


def test_the_command_speaks_json() -> None:
    result = invoke("swap:drop", "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert (said["command"], said["policy"], said["slot"], said["passed"]) == ("check", "drop", "swap", True)
    assert {row["status"] for row in said["results"]} <= {"passed", "skipped"}


@pytest.mark.parametrize(
    "arguments",
    [("eviction:lruu",), ("no_such_module:X",), ("lru", "--expect", "x"), ("lru", "--expect", "x=y")],
)
def test_the_command_refuses_in_one_line(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_importing_pagedlab_needs_no_hypothesis() -> None:
    code = "import sys, pagedlab, pagedlab.config, pagedlab.engine.engine; assert 'hypothesis' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    plugin = "import sys, pagedlab.testing.plugin; assert not {'hypothesis', 'numpy', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", plugin], check=True, timeout=60)


def test_the_view_of_a_driver_is_a_view() -> None:
    from pagedlab.testing.drivers.eviction import World

    assert isinstance(World(), View)
