"""Whatever is shown as HTML is escaped: prompts, outputs, request ids, errors, names of policies and configurations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import pagedlab as pl
from pagedlab import registry
from pagedlab.executors.stub import StubExecutor

EVIL = "<script>alert('x')</script>\"'&"


class EvilExecutor(StubExecutor):
    """Says nothing but the worst."""

    def detokenize(self, tokens: Sequence[int]) -> str | None:
        return EVIL


@pytest.fixture
def evil_policy() -> Iterator[str]:
    @pl.register("eviction", EVIL)
    class Evil(pl.policies.LRU):
        """LRU by another name."""

    yield EVIL
    del registry._classes["eviction"][EVIL]


def requests() -> list[pl.Request]:
    return [
        pl.Request(request_id=EVIL, prompt=(), text=EVIL, session=EVIL),
        pl.Request(request_id=EVIL + "2", prompt=list(range(5000))),
    ]


def assert_harmless(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "alert('x')" not in html  # the quotes too, for attributes


def test_run(evil_policy: str) -> None:
    run = pl.run(pl.Config(eviction=evil_policy), requests(), executor=EvilExecutor())
    assert EVIL in run.outputs
    assert "<script>" in run.errors[EVIL + "2"]
    assert_harmless(run._repr_html_())


def test_workload() -> None:
    assert_harmless(pl.Workload(EVIL, tuple(requests()), EVIL)._repr_html_())


def test_config(evil_policy: str) -> None:
    assert_harmless(pl.Config(model=EVIL)._repr_html_())
    assert "<script" not in pl.Config(eviction=evil_policy)._repr_html_()


def test_comparison_and_report(evil_policy: str, tmp_path: Path) -> None:
    configs = {EVIL + "$x^$": pl.Config(eviction=evil_policy), "lru": pl.Config()}
    comparison = pl.compare(configs, pl.Workload(EVIL, tuple(requests()), EVIL), executor=EvilExecutor())
    assert_harmless(comparison._repr_html_())
    report = comparison.to_html(tmp_path / "report.html").read_text()
    assert_harmless(report)
    assert "src='data:image/png;base64," in report
    for outside in ("http://", "https://", "<link"):
        assert outside not in report


def test_loaded_run_is_not_trusted_either(tmp_path: Path) -> None:
    pl.run(pl.Config(), requests(), executor=EvilExecutor()).save(tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    file.write_text(file.read_text().replace('"name": "requests"', '"name": "<script>"'))
    assert_harmless(pl.load_run(tmp_path / "run")._repr_html_())
