"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pagedlab import cli
from pagedlab.cli.lab import lab_command
from pagedlab.config import PRESETS
from pagedlab.engine.engine import Engine

SUMMARY = re.compile(r"^— (\d+) tokens, [\d.,e+]+ tokens/s · KV waste [\d.]+% · prefix hits [\d.]+%$")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Tests share their cores with each other, and `tiny` is too small to gain from more."""
    import torch

    torch.set_num_threads(1)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in result.output
    return lines[0]


def answer(*arguments: str) -> Any:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# ---- list ----------------------------------------------------------------------------------------------------------


def test_list_shows_every_slot_and_its_parameters() -> None:
    result = invoke("list")
    assert result.exit_code == 0
    for word in ("eviction", "lfu", "chunked-prefill", "radix", "min_hits"):
        assert word in result.stdout


def test_list_json() -> None:
    said = answer("list", "eviction", "--json")
    assert set(said) >= {"command", "versions", "hardware", "results"}
    assert {"lru", "lfu", "fifo"} <= {row["name"] for row in said["results"]}


def test_the_command_starts_quickly() -> None:
    """What a command needs is imported when it is called."""
    heavy = {"torch", "transformers", "numba", "pandas", "matplotlib", "numpy", "rich.table"}
    code = f"import sys, pagedlab.cli; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"pagedlab \d+\.\d+\.\d+\n", result.stdout)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_unknown_slot() -> None:
    assert "did you mean 'eviction'" in refused("list", "evction")


def test_unknown_policy() -> None:
    assert "did you mean 'lru'" in refused("generate", "--prompt", "x", "--set", "eviction=lruu")
    assert "did you mean 'lfu'" in refused("compare", "chat", "--set", "eviction=lru,lfuu")


def test_unknown_field_preset_workload_benchmark_and_way() -> None:
    assert "did you mean 'num_blocks'" in refused("generate", "--prompt", "x", "--set", "num_block=3")
    assert "did you mean 'sglang'" in refused("generate", "--prompt", "x", "--config", "sglan")
    assert "did you mean 'vllm'" in refused("compare", "chat", "--preset", "vlm")
    assert "did you mean 'chat'" in refused("compare", "chatt")
    assert "did you mean 'engine'" in refused("bench", "engin")
    assert "--how" in refused("compare", "chat", "--how", "guess")


@pytest.mark.parametrize(
    "setting",
    [
        "eviction",
        "=lru",
        "num_blocks=many",
        "num_blocks=-1",
        "swap.min_hit=1",
        "swap.min_hits=-1",
        "nowhere.x=1",
    ],
)
def test_bad_settings(setting: str) -> None:
    assert refused("generate", "--prompt", "x", "--set", "swap=host", "--set", setting)


@pytest.mark.parametrize(
    "option", [("--temperature", "-1"), ("--top-p", "0"), ("--max-tokens", "0"), ("-n", "0")]
)
def test_bad_sampling(option: tuple[str, str]) -> None:
    assert refused("generate", "--prompt", "x", *option)


def test_config_file_errors_carry_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text('{\n  "num_blocks": 64,\n  "eviction": lru\n}\n')
    assert f"{file}:3:" in refused("generate", "--prompt", "x", "--config", str(file))
    file.write_text('{"eviction": "lruu"}')
    assert str(file) in refused("generate", "--prompt", "x", "--config", str(file))
    assert "missing.json" in refused("generate", "--prompt", "x", "--config", str(tmp_path / "missing.json"))


def test_missing_model_folder(tmp_path: Path) -> None:
    assert "no-such-model" in refused("generate", "--prompt", "x", "--model", str(tmp_path / "no-such-model"))


def test_prompt_longer_than_the_model() -> None:
    line = refused("generate", "--prompt", "word " * 3000)
    assert "2048 are available" in line


def test_empty_prompt_starts_a_document() -> None:
    """The tokenizer puts the beginning-of-text token in front, so there is something to continue."""
    assert len("".join(generated("--prompt", "", "--max-tokens", "8"))) > 8


def test_report_that_cannot_be_written(tmp_path: Path) -> None:
    where = str(tmp_path / "no" / "report.html")
    assert "report.html" in refused(
        "compare", "chat", "--requests", "1", "--max-tokens", "1", "--report", where
    )


# ---- generate ------------------------------------------------------------------------------------------------------


def generated(*arguments: str) -> list[str]:
    result = invoke("generate", "--prompt", "def read(self, path):", *arguments)
    assert result.exit_code == 0, result.output
    *text, last = result.stdout.splitlines()
    assert SUMMARY.match(last), last
    return text


@pytest.fixture(scope="module")
def plain() -> list[str]:
    return generated("--max-tokens", "24")


def test_generate_continues_the_prompt(plain: list[str]) -> None:
    assert plain[0].startswith("def read(self, path):")
    assert len("".join(plain)) > 40


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_says_the_same(preset: str, plain: list[str]) -> None:
    assert generated("--max-tokens", "24", "--config", preset) == plain


def test_a_config_file(tmp_path: Path, plain: list[str]) -> None:
    file = tmp_path / "small.json"
    file.write_text('{"num_blocks": 8, "block_size": 8, "eviction": {"name": "lfu", "params": {}}}')
    assert generated("--max-tokens", "24", "--config", str(file)) == plain


def test_samples_and_seeds() -> None:
    drawn = ("--max-tokens", "8", "-n", "3", "--temperature", "1.0", "--seed", "7", "--top-k", "50")
    one = generated(*drawn)
    assert sum(line.startswith("--- sample") for line in one) == 3
    assert generated(*drawn) == one


def test_markup_in_a_prompt_is_text() -> None:
    result = invoke("generate", "--prompt", "[bold]x[/bold] = [1]", "--max-tokens", "2")
    assert result.stdout.startswith("[bold]x[/bold] = [1]")


# ---- compare, demo, bench, lab -------------------------------------------------------------------------------------


def test_compare_json_and_report(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    said = answer(
        "compare", "chat", "--set", "eviction=lru,lfu", "--set", "preemption=swap,recompute", "--num-blocks", "64",
        "--requests", "6", "--max-tokens", "6", "--json", "--report", str(report),
    )  # fmt: skip
    assert len(said["results"]) == 4
    assert said["same_output"] is True
    for row in said["results"]:
        assert row["finished"] == 6
        assert row["tokens_per_s"] > 0
        kinds = ("stored", "reserved", "internal", "external", "cached", "free")
        assert sum(row[f"{k}_share"] for k in kinds) == pytest.approx(1.0)
    assert report.read_text().startswith("<!doctype html>")


def test_compare_counts_goodput_by_a_service_level() -> None:
    command = ("compare", "chat", "--how", "simulate", "--model", "llama-3.1-8b", "--requests", "6")
    rows = answer(*command, "--slo", "ttft=0.5", "--slo", "tpot=1", "--json")["results"]
    assert rows[0]["goodput_share"] == 1.0
    assert rows[0]["itl_p90"] > 0
    assert "goodput/s" in invoke(*command, "--slo", "ttft=0.5").stdout
    assert "goodput/s" not in invoke(*command).stdout
    assert "did you mean 'ttft'" in refused(*command, "--slo", "ttf=1")
    for text in ("ttft", "ttft=fast", "=1"):
        assert refused(*command, "--slo", text)


def test_compare_replays_and_measures_the_distance_to_belady() -> None:
    command = ("compare", "scan-loop", "--how", "replay", "--requests", "60", "--set", "eviction=lru,mru")
    shown = invoke(*command, "--set", "num_blocks=8,16").stdout
    assert "belady" in shown
    assert "16 blocks" in shown
    lru, mru, belady = answer(*command, "--num-blocks", "8", "--json")["results"]
    assert (lru["eviction"], mru["eviction"], belady["eviction"]) == ("lru", "mru", "belady")
    assert belady["distance_to_belady"] == 0
    assert lru["distance_to_belady"] == pytest.approx(belady["hit_ratio"] - lru["hit_ratio"])


@pytest.mark.parametrize("option", [("--hardware", "h100"), ("--slo", "ttft=1"), ("--set", "swap=host")])
def test_a_replay_has_no_engine(option: tuple[str, str]) -> None:
    assert refused("compare", "scan-loop", "--how", "replay", *option).startswith(f"pagedlab: {option[0]}")


@pytest.mark.parametrize("width", [100, 160])
def test_a_comparison_of_many_is_printed_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedlab.cli.output._NO_TERMINAL", width)
    command = ("compare", "chat", "--how", "simulate", "--model", "llama-3.1-8b", "--requests", "8")
    sets = (
        "--set",
        "eviction=lru,lfu,fifo",
        "--set",
        "preemption=recompute,swap",
        "--set",
        "lookup=radix,none",
    )
    result = invoke(*command, "--num-blocks", "40", *sets)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for word, times in (("eviction=lfu", 4), ("preemption=recompute", 6), ("lookup=none", 6)):
        assert words.count(word) == times, "no name is broken within a word"
    heads = [line for line in lines if line.strip().startswith("TTFT mean")]
    assert 1 < len(heads) <= 5, "as many side by side as there is room for"
    assert sum(line.count("ms") + len(re.findall(r"\d s\b", line)) for line in heads) == 12


def test_compare_presets_by_name() -> None:
    result = invoke(
        "compare", "mixed-lengths", "--preset", "vllm,orca-max", "--requests", "3", "--max-tokens", "4"
    )
    assert result.exit_code == 0, result.output
    assert "orca-max" in result.stdout
    assert "same output" in result.stdout


def test_bench_prints_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    fake = ModuleType("pagedlab.bench.cache")
    fake.main = lambda json=False: [{"what": "admit", "per_s": 1234.5}]  # type: ignore[attr-defined]
    monkeypatch.setattr("pagedlab.cli.bench.import_module", lambda name: fake)
    assert answer("bench", "cache", "--json")["results"] == [{"what": "admit", "per_s": 1234.5}]
    assert "admit" in invoke("bench", "cache").stdout


def test_bench_writes_its_result_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from types import ModuleType

    from pagedlab.lab.plots import Figure

    fake, calls = ModuleType("pagedlab.bench.kernel"), []
    fake.main = lambda json=False: calls.append(1) or [{"ratio": 0.5}]  # type: ignore[attr-defined]
    fake.summary = lambda rows: [{"least": rows[0]["ratio"]}]  # type: ignore[attr-defined]
    fake.draw = lambda rows: Figure()  # type: ignore[attr-defined]
    monkeypatch.setattr("pagedlab.cli.bench.import_module", lambda name: fake)
    monkeypatch.setenv("PAGEDLAB_BENCH_SECONDS", "1")
    out = tmp_path / "result.json"
    assert "least" in invoke("bench", "kernel", "--out", str(out)).stdout
    written = json.loads(out.read_text())
    assert written["command"] == "bench kernel"
    assert (written["results"], written["summary"]) == ([{"ratio": 0.5}], [{"least": 0.5}])
    assert written["settings"]["PAGEDLAB_BENCH_SECONDS"] == "1"
    assert {"versions", "hardware", "seconds"} < set(written)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "ends in .json" in refused("bench", "kernel", "--out", str(tmp_path / "result.png"))
    assert "no such directory" in refused(
        "bench", "kernel", "--out", str(tmp_path / "nowhere" / "result.json")
    )
    assert len(calls) == 1


def test_lab_keeps_its_token_and_its_address(tmp_path: Path) -> None:
    command = lab_command(tmp_path, ["--ServerApp.ip=0.0.0.0", "--no-browser"])
    assert command[-1] == "--ServerApp.ip=127.0.0.1"
    assert not [part for part in command if ".token" in part or "password" in part]


@pytest.mark.slow
def test_demo_writes_its_report(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = invoke("demo", "--out", str(report))
    assert result.exit_code == 0, result.output
    assert "same output" in result.stdout
    assert report.stat().st_size > 50_000


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the step of that number of the second engine: the first one warms up."""
    engines: list[Engine] = []
    plain_step = Engine.step

    def pressing(engine: Engine) -> bool:
        if engine not in engines:
            engines.append(engine)
        if len(engines) == 2 and len(engine.steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain_step(engine)

    monkeypatch.setattr(Engine, "step", pressing)


def test_ctrl_c_prints_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(10, monkeypatch)
    result = invoke("generate", "--prompt", "import", "--max-tokens", "100")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("— 11 tokens")
    assert result.stdout.splitlines()[-1].endswith("interrupted")


def test_ctrl_c_in_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedlab.lab.session.warm_up", lambda *_, **__: None)
    interrupt_at(3, monkeypatch)
    said = answer("compare", "chat", "--set", "eviction=lru,lfu,fifo", "--requests", "4", "--json")
    assert said["interrupted"] is True
    assert len(said["results"]) == 2


def test_ctrl_c_before_there_is_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedlab.lab.session.warm_up", press)
    result = invoke("generate", "--prompt", "import")
    assert result.exit_code == 130
    assert result.stderr == "pagedlab: interrupted\n"
