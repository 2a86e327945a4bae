"""A real vLLM run, simulated after a fit on its first requests. Skipped where the shared runs are not at hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pagedlab import cli
from pagedlab.costs import Calibrated
from pagedlab.costs.vllm_log import VllmRun
from pagedlab.errors import ConfigError, WorkloadError
from pagedlab.lab.vllm_run import (
    MOVED_FIT_ON,
    Reproduction,
    Simulator,
    calibrate,
    reproduce,
    requests_of,
)
from pagedlab.workloads import load

DATA = Path(os.environ.get("PAGEDLAB_DATA") or Path(__file__).parents[2] / "shared" / "data")

LLAMA = ("vllm_runs/rtxpro6000-llama-3.1-8b", "workloads/sharegpt-llama-3.1-8b-300-sps10.jsonl.gz")
QWEN = ("vllm_runs/rtxpro6000-qwen3-32b", "workloads/sharegpt-qwen3-32b-300-sps10.jsonl.gz")


def paths(which: tuple[str, str]) -> tuple[Path, Path]:
    if not (DATA / which[0]).is_dir():
        pytest.skip(f"no vLLM runs: PAGEDLAB_DATA is not set and {DATA} does not hold them")
    return DATA / which[0], DATA / which[1]


def means(error: dict[str, float]) -> list[float]:
    return [abs(error[f"{kind}_mean"]) for kind in ("ttft", "tpot", "latency")]


@pytest.fixture(scope="module")
def llama() -> Reproduction:
    return reproduce(*paths(LLAMA))


def test_llama_on_one_card(llama: Reproduction) -> None:
    assert (llama.hit_tokens, llama.prompt_tokens) == (19_520, 257_239)
    assert max(means(llama.error)) < 0.015
    assert max(means(llama.error_rest)) < 0.025
    assert llama.error["latency_mape"] < 0.015
    headings, rows = llama.table()
    assert headings == ["", "all 300", "from 101"]
    assert len(rows) == 15
    assert llama.plot().axes[0].get_legend() is not None
    assert json.dumps(llama.as_dict())


def test_the_same_coefficients_move_to_another_model_on_two_cards(llama: Reproduction) -> None:
    folder, workload = paths(QWEN)
    moved = llama.fit.cost.scaled(
        "qwen3-32b",
        "rtx-pro-6000",
        from_model="llama-3.1-8b",
        from_hardware="rtx-pro-6000",
        to_tp=2,
    )
    before = reproduce(folder, workload, source=llama, fit_on=0)
    assert before.fit.cost == moved
    assert max(means(before.error)) < 0.10
    after = reproduce(folder, workload, source=llama)
    assert after.fitted_on == MOVED_FIT_ON == 20
    assert max(means(after.error)) < 0.02
    assert after.fit.prior == moved
    with pytest.raises(ConfigError, match="exclude each other"):
        reproduce(folder, workload, source=llama, prior=moved)


def test_the_command_moves_a_fit(llama: Reproduction, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, workload = map(str, paths(QWEN))
    source = list(map(str, paths(LLAMA)))

    def fitted_once(run: str, given: str, **options: Any) -> Reproduction:
        return llama if [run, given] == source else reproduce(run, given, **options)

    monkeypatch.setattr("pagedlab.lab.vllm_run.reproduce", fitted_once)
    command = ["reproduce", "vllm-run", folder, "--workload", workload, "--from", source[0]]
    result = CliRunner().invoke(cli.app, [*command, "--from-workload", source[1], "--fit-on", "0", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["results"]["fitted_on"] == 0
    assert said["results"]["from"]["cost"] == llama.fit.cost.get_params()
    assert said["results"]["cost"] != said["results"]["from"]["cost"]
    assert max(means(said["error"])) < 0.10
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    assert (
        result.stderr
        == "pagedlab: --from and --from-workload belong together: another run, and its requests\n"
    )


def test_qwen_on_two_cards() -> None:
    done = reproduce(*paths(QWEN))
    assert max(means(done.error)) < 0.015
    assert max(means(done.error_rest)) < 0.025
    assert done.error["latency_mape"] < 0.015


def test_the_fit_reads_nothing_that_was_measured_later(tmp_path: Path) -> None:
    """Whatever the later requests' time stamps say, the fit is the same."""
    folder, workload = paths(LLAMA)
    shutil.copytree(folder, tmp_path / "run")
    file = tmp_path / "run" / "requests.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[40:]:
        row["last_token_ts"] += 1000.0
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (tmp_path / "run" / "timeseries.csv").unlink()
    given = load(workload)
    fits = []
    for path in (folder, tmp_path / "run"):
        run = VllmRun.load(path)
        prior = Calibrated.prior(run.model, "rtx-pro-6000")
        fits.append(calibrate(run.before(20), Simulator(run, given), prior).cost)
    assert fits[0] == fits[1]


def test_another_workload_is_refused() -> None:
    folder, _ = paths(LLAMA)
    run = VllmRun.load(folder)
    with pytest.raises(WorkloadError, match="prompt tokens"):
        requests_of(run, load("mixed-lengths", num_requests=300))
    with pytest.raises(WorkloadError, match="the run has 300 requests"):
        requests_of(run, load("mixed-lengths", num_requests=3))
    with pytest.raises(ConfigError, match="fit_on must be from 0 to 300"):
        reproduce(*paths(LLAMA), fit_on=301)
