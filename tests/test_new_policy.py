"""``pagedlab new-policy``: what it writes works, can be installed, and nothing is ever overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pagedlab.cli import app
from pagedlab.cli.new_policy import class_name, write_package
from pagedlab.cli.templates import TEMPLATES
from pagedlab.errors import ConfigError
from pagedlab.registry import SLOTS

HERE = Path(__file__).resolve().parent.parent


def python(*arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, (path, str(HERE))))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_there_is_a_template_for_every_slot() -> None:
    assert tuple(TEMPLATES) == SLOTS


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One package a slot."""
    parent = tmp_path_factory.mktemp("packages")
    for slot in SLOTS:
        write_package(f"my-{slot}-2", slot, parent)
    return parent


def test_the_tests_that_are_written_pass(packages: Path) -> None:
    tests = [str(path) for path in sorted(packages.glob("*/tests/*.py"))]
    assert len(tests) == len(SLOTS)
    sources = os.pathsep.join(str(path) for path in packages.glob("*/src"))
    done = python(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        *tests,
        cwd=packages,
        path=sources,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_what_is_written_is_clean(packages: Path) -> None:
    for folder in packages.iterdir():
        for command in (["check", "--select", "E,F,W,I,B,UP"], ["format", "--check"]):
            done = python("-m", "ruff", *command, "--isolated", "--line-length", "110", ".", cwd=folder)
            assert done.returncode == 0, done.stdout + done.stderr


def test_an_installed_package_is_selectable_by_name(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    result = CliRunner().invoke(app, ["new-policy", "my-lru", "--dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "pagedlab-my-lru"
    assert str(folder) in result.output
    site = tmp_path / "site"
    installed = python(
        "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
        "--disable-pip-version-check", "--target", str(site), str(folder), cwd=tmp_path,
    )  # fmt: skip
    if "No module named pip" in installed.stderr:
        pytest.skip("pip is not installed")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    code = (
        "import sys, pagedlab as pl; names = [r['name'] for r in pl.list_policies('eviction')]; "
        "assert 'my-lru' in names; c = pl.Config(eviction='my-lru'); "
        "assert pl.Config.from_json(c.to_json()) == c; print(c.eviction)"
    )
    done = python("-c", code, cwd=tmp_path, path=str(site))
    assert done.stdout.strip() == "MyLru(most=4)", done.stderr
    assert "my-lru" not in python("-m", "pagedlab.cli", "list", "eviction", cwd=tmp_path).stdout


def refused(tmp_path: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["new-policy", *arguments, "--dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    (line,) = result.output.strip().splitlines()
    return line


@pytest.mark.parametrize(
    "name", ["", "My-LRU", "my_lru", "-x", "x-", "a--b", "1st", "../up", "a/b", "a b", "ü", "x" * 61, "a\n"]
)
def test_names_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a policy's name"):
        write_package(name, "eviction", tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = write_package("mine", "eviction", tmp_path)
    (folder / "README.md").write_text("my own words")
    assert "there already" in refused(tmp_path, "mine")
    assert (folder / "README.md").read_text() == "my own words"


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    assert "there is a eviction policy" not in refused(tmp_path, "Mine")
    assert "'lru' already" in refused(tmp_path, "lru")
    assert "did you mean 'eviction'" in refused(tmp_path, "mine", "--slot", "evicton")
    assert "no slot 'cost'" in refused(tmp_path, "mine", "--slot", "cost")
    assert "is no folder" in refused(tmp_path / "nowhere", "mine")


def test_class_names_do_not_meet_what_the_module_imports() -> None:
    assert class_name("my-lru-2") == "MyLru2"
    assert class_name("eviction") == "EvictionPolicy"
    assert class_name("none") == "NonePolicy"
