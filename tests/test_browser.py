"""The quickstart in a real JupyterLab: run it, see the blocks move, press Stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import labdriver
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
STATUS = ".pl-live .pl-status"
CANVAS = ".pl-map-device canvas.pl-blockmap-canvas"
PIXELS = f"""() => {{
    const canvas = document.querySelector('{CANVAS}');
    return [canvas.width, canvas.height, canvas.toDataURL()];
}}"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(labdriver.why_not() is not None, reason=str(labdriver.why_not())),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[labdriver.NotebookPage]:
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(NOTEBOOKS / "01_quickstart.ipynb", folder)
    with labdriver.LabServer(folder, env={"PAGEDLAB_FAST": ""}) as server, labdriver.Browser() as browser:
        yield browser.open(server, "01_quickstart.ipynb")


def test_block_map_moves_and_stop_stops(opened: labdriver.NotebookPage, tmp_path: Path) -> None:
    page = opened.page
    opened.run_all()

    # It runs, and the pixels follow.
    page.wait_for_function(
        f"() => /running\\s*step \\d/.test(document.querySelector('{STATUS}')?.innerText ?? '')"
    )
    opened.show(".pl-live")
    before = page.evaluate(PIXELS)
    page.wait_for_function(f"(before) => ({PIXELS})()[2] !== before", arg=before[2])
    width, height, after = page.evaluate(PIXELS)
    assert width > 300
    assert height > 30
    assert after != before[2]
    page.wait_for_function(
        "() => JSON.parse(document.querySelector('.pl-map-device .pl-blockmap').dataset.counts).running > 0"
    )

    # Who holds a block is told on hovering; a click follows it.
    page.locator(CANVAS).hover(position={"x": 60, "y": 8})
    page.wait_for_function(
        "() => /^block \\d+ · /.test(document.querySelector('.pl-blockmap-tip').textContent)"
    )
    page.locator(CANVAS).click(position={"x": 60, "y": 8})
    page.wait_for_function("() => /^block \\d+ · /.test(document.querySelector('.pl-detail').innerText)")
    picture = opened.screenshot(tmp_path / "live.png", ".pl-live")
    assert picture.stat().st_size > 10_000

    # Stop is heard while the next cell waits for the run, and the run ends before its time.
    page.locator("button.pl-stop").click()
    page.wait_for_function(f"() => /^\\s*stopped/.test(document.querySelector('{STATUS}').innerText)")
    counts = json.loads(page.locator(".pl-map-device .pl-blockmap").get_attribute("data-counts"))
    assert sum(counts.values()) == 56
    still = page.evaluate(PIXELS)[2]
    opened.wait_idle()
    assert page.evaluate(PIXELS)[2] == still
    assert page.locator(STATUS).inner_text().split()[0] == "stopped"
    waiting = page.evaluate(f"() => +document.querySelector('{STATUS}').innerText.match(/waiting (\\d+)/)[1]")
    running = page.evaluate(f"() => +document.querySelector('{STATUS}').innerText.match(/running (\\d+)/)[1]")
    assert waiting + running > 0, "it was stopped, so somebody was still at work"

    opened.screenshot(tmp_path / "quickstart.png")
    assert opened.cell_errors() == []
    assert opened.errors() == []


def test_map_comes_back_after_a_reload(opened: labdriver.NotebookPage) -> None:
    page = opened.page
    counts = "() => document.querySelector('.pl-map-device .pl-blockmap')?.dataset.counts"
    before = page.evaluate(counts)
    page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save') }")
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(f"(before) => ({counts})() === before", arg=before)
    assert opened.errors() == []
