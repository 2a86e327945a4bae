"""Mutation testing: small changes are made to the code, one at a time, and the tests have to notice each.

    python benchmarks/mutants.py --package cache --sample 300 --seed 0 --minutes 20

A survivor is a change that every test accepted: a test is missing, or the change makes no difference
(``results/mutants-equivalent.md`` says why). Stopped at any moment, the same command goes on where it was; verdicts
lie in ``build/mutants``. Texts of raised errors are not changed, nor is what stands outside functions.
Needs mutmut 3 (``pip install -e ".[dev]"``) and a system with fork.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutants"
EQUIVALENT = ROOT / "benchmarks" / "results" / "mutants-equivalent.md"
BATCH = 400
"""Mutants a call of mutmut, which runs the tests once without a change before it begins."""

PACKAGES: dict[str, dict[str, Any]] = {
    "cache": {
        "only": ["pagedlab/cache/*.py"],
        "but": ["pagedlab/cache/replay.py"],
        "tests": ["pool", "accounting", "allocators", "cache_machine", "gaps", "events", "tenants"],
    },
    "replay": {
        "only": ["pagedlab/cache/replay.py"],
        "tests": [
            "replay",
            "replay_loops",
            "tenants::test_a_reserved_share_is_a_tier_of_its_own",
            "tenants::test_a_reserved_share_of_no_block_keeps_nothing",
        ],
        "skip": "mooncake_as_others or streams_as_others or processes",
    },
    "policies": {
        "only": ["pagedlab/policies/*.py"],
        "tests": [
            "allocators",
            "eviction",
            "gaps",
            "layouts",
            "lookup",
            "ordering",
            "preemption",
            "prefetch",
            "policy_edges",
            "registry",
            "replay::test_belady_is_the_optimum",
            "replay::test_belady_tree_names_several_at_once",
            "replay::test_belady_tree_prunes_leaves",
            "replay::test_every_access_is_told_once",
            "replay::test_next_uses",
            "replay::test_nobody_beats_belady",
            "replay::test_nobody_beats_belady_on_prefixes_that_fit",
            "replay::test_plain_is_a_plain_cache",
            "replay::test_prefix_is_a_cache_of_prefixes",
            "replay::test_the_future_is_refused_where_there_is_none",
            "reservation",
            "scheduler",
            "shelf",
            "shelf_kv",
            "tenants",
            "view",
            "wrappers",
        ],
    },
    "engine": {
        "only": ["pagedlab/engine/*.py"],
        # Its protocols are checked at run time: a method more, and nobody has them all.
        "but": ["pagedlab/engine/orders.py"],
        "tests": [
            "engine",
            "scheduler",
            "ordering",
            "preemption",
            "reservation",
            "faults",
            "events",
            "view",
            "accounting",
            "law5_stub",
            "law6",
            "prefetch",
            "disk_tier::test_who_lies_in_a_spoiled_host_block_starts_over",
            "disk_tier::test_a_disk_that_fails_never_changes_what_is_said",
        ],
        "skip": "real_model or planted_bug or comparison or tells_of_every_load or not_vacuous or paging_wastes"
        " or columns_and_frames or order_of_submission or every_prefetcher or policies_never_change"
        " or eviction_protocol or where_not_all or two_tenants",
    },
}
"""The files that are changed, and the tests that are quick and reach them: those of a file, or one of them. ``skip``
names slow ones among these.
"""

ARGUMENTS = ["-p", "no:cacheprovider", "--no-header"]

CONFIG = """
[tool.mutmut]
source_paths = ["pagedlab"]
only_mutate = {only}
do_not_mutate = {but}
do_not_mutate_patterns = {patterns}
pytest_add_cli_args = {arguments}
pytest_add_cli_args_test_selection = {tests}
timeout_multiplier = 2.0
timeout_constant = 10.0
track_dependencies = false
use_git_change_detection = false
"""


def raising(only: list[str]) -> list[str]:
    """Patterns for the lines of ``raise`` statements: what an error says is not tried."""
    lines = set()
    for path in sorted((ROOT / "pagedlab").rglob("*.py")):
        if not mutated(path.relative_to(ROOT), {"only": only}):
            continue
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Raise):
                lines |= set(text.splitlines()[node.lineno - 1 : node.end_lineno])
    return [f"^{re.escape(line)}$" for line in sorted(lines) if line.strip() not in (")", "(")]


def mutated(path: Path, chosen: dict[str, Any]) -> bool:
    """Whether mutmut changes a file. Patterns are those of fnmatch, where ``*`` reaches into sub-packages."""
    return any(fnmatch(path.as_posix(), p) for p in chosen["only"]) and not any(
        fnmatch(path.as_posix(), p) for p in chosen.get("but", [])
    )


def bring_up_to_date(work: Path, package: str) -> None:
    """Copy what changed since the last call into the work folder, beside mutmut's own copy."""
    chosen = PACKAGES[package]
    tests = []
    for file, one, test in (name.partition("::") for name in chosen["tests"]):
        if (ROOT / f"tests/test_{file}.py").is_file():
            tests.append(f"tests/test_{file}.py{one}{test}")
    only, but = chosen["only"], chosen.get("but", [])
    config = CONFIG.format(
        only=json.dumps(only),
        but=json.dumps(but),
        tests=json.dumps(tests),
        arguments=json.dumps([*ARGUMENTS, *(["-k", f"not ({chosen['skip']})"] if "skip" in chosen else [])]),
        patterns=json.dumps(raising(only)),
    )
    work.mkdir(parents=True, exist_ok=True)
    (work / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + config)
    here = set()
    for folder in ("pagedlab", "tests"):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT)
            if not path.is_file() or "__pycache__" in relative.parts:
                continue
            here.add(relative)
            target = work / relative
            if target.is_file() and target.read_bytes() == path.read_bytes():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            copy = work / "mutants" / relative
            if copy.is_file() and not mutated(relative, chosen):
                shutil.copyfile(path, copy)
    for folder in ("pagedlab", "tests"):
        for path in [*(work / folder).rglob("*.py"), *(work / "mutants" / folder).rglob("*.py")]:
            relative = path.relative_to(
                work / "mutants" if "mutants" in path.relative_to(work).parts else work
            )
            if relative not in here:
                path.unlink()


def generate(work: Path) -> None:
    """Write the mutants of every file that has none or has changed. Verdicts on unchanged functions stay."""
    code = (
        "import mutmut.__main__ as m; from mutmut.utils.file_utils import copy_src_dir, copy_also_copy_files;"
        "from mutmut.mutation.trampoline import set_mutant_under_test as under; under('mutant_generation');"
        "from pathlib import Path; Path('mutants').mkdir(exist_ok=True);"
        "copy_src_dir(); copy_also_copy_files(); m.create_mutants(1)"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment(), check=True, stdout=subprocess.DEVNULL
    )


def environment() -> dict[str, str]:
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != ROOT]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HYPOTHESIS_PROFILE": "mutants",
        "PYTHONHASHSEED": "0",
    }


def verdicts(work: Path) -> dict[str, int | None]:
    """Exit code of every mutant, None where it has not been tried."""
    found: dict[str, int | None] = {}
    for meta in sorted((work / "mutants").rglob("*.meta")):
        found |= json.loads(meta.read_text())["exit_code_by_key"]
    return found


def run(work: Path, names: list[str], until: float | None) -> bool:
    """Try mutants; False when the time was over first. What was tried by then is kept."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
    with (work / "mutmut.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=work, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(None if until is None else max(0.0, until - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
    if code:
        raise SystemExit(f"mutmut ended with {code}: {work / 'mutmut.log'} says why")
    return True


def listed_equivalent() -> str:
    return EQUIVALENT.read_text() if EQUIVALENT.is_file() else ""


def report(work: Path, package: str, names: list[str], total: int, seed: int) -> dict[str, object]:
    """Count and print; survivors with their diffs."""
    os.chdir(work)
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    codes = verdicts(work)
    status = {name: status_by_exit_code[codes[name]] for name in names}
    known = listed_equivalent()
    survivors = []
    for name in sorted(n for n, s in status.items() if s in ("survived", "no tests")):
        diff = get_diff_for_mutant(name)
        changed = [line for line in diff.splitlines()[2:] if line[:1] in "+-"]
        where = name.rpartition("__mutmut_")[0]
        same = all(line in known for line in [where, *(c[1:].strip() for c in changed)])
        survivors.append({"name": name, "status": status[name], "equivalent": same, "change": changed})
    counts = Counter(status.values())
    equivalent = sum(s["equivalent"] is True for s in survivors)
    for survivor in survivors:
        mark = " (equivalent)" if survivor["equivalent"] else ""
        print(f"\n{survivor['name']}: {survivor['status']}{mark}")
        print("\n".join(survivor["change"]))
    print(f"\n{package}: {len(names)} of {total} mutants, seed {seed}")
    for what, n in counts.most_common():
        print(f"  {what:<12} {n:>5}")
    print(f"  of the survivors {equivalent} are listed as equivalent")
    return {
        "package": package,
        "seed": seed,
        "mutants": total,
        "sample": len(names),
        "counts": dict(counts),
        "listed as equivalent": equivalent,
        "tests": PACKAGES[package]["tests"],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("mutmut", "hypothesis", "pytest")},
        "survivors": survivors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", choices=[*PACKAGES, "all"], default="all")
    parser.add_argument(
        "--sample", type=int, default=300, help="mutants drawn from a package (all where fewer)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--minutes", type=float, help="stop trying after this time and report")
    parser.add_argument(
        "--again", action="store_true", help="try survivors once more: tests have been written"
    )
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    asked = parser.parse_args()
    out = None if asked.out is None else asked.out.resolve()
    if asked.sample < 1:
        parser.error(f"--sample is {asked.sample} and must be at least 1")
    until = None if asked.minutes is None else time.monotonic() + 60 * asked.minutes
    results = []
    for package in PACKAGES if asked.package == "all" else (asked.package,):
        work = WORK / package
        bring_up_to_date(work, package)
        generate(work)
        everything = sorted(verdicts(work))
        names = Random(asked.seed).sample(everything, min(asked.sample, len(everything)))
        if asked.again:
            (work / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
        codes = verdicts(work)
        todo = [n for n in names if codes[n] is None or (asked.again and codes[n] in (0, 33))]
        while todo and run(work, todo[:BATCH], until):
            todo = todo[BATCH:]
            print(f"{package}: {len(todo)} to go", file=sys.stderr, flush=True)
        results.append(report(work, package, names, len(everything), asked.seed))
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
