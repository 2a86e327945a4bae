"""A real JupyterLab in a headless Chromium: on loopback, with a configuration of its own, gone afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
_CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
]
_OWN_FOLDERS = {
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "IPYTHONDIR": "ipython",
    "MPLCONFIGDIR": "matplotlib",
}


def why_not() -> str | None:
    """Return why no browser test can run here, or None if one can."""
    for module in ("playwright", "jupyterlab"):
        try:
            __import__(module)
        except ImportError:
            return f"{module} is not installed"
    if not CHROMIUM or not Path(CHROMIUM).exists():
        return "no Chromium found (install it, or name it in the variable CHROMIUM)"
    return None


class LabServer:
    """JupyterLab over ``root``, with a token, its own settings and no access from outside."""

    def __init__(
        self, root: Path, *, env: dict[str, str] | None = None, dark: bool = False, timeout: float = 60
    ) -> None:
        self.root, self.env, self.dark, self.timeout = root, env or {}, dark, timeout

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        env = {**os.environ, **self.env}
        for variable, name in _OWN_FOLDERS.items():
            (self.folder / name).mkdir()
            env[variable] = str(self.folder / name)
        self._set("notebook-extension", "tracker", {"windowingMode": "none"})
        self._set("docmanager-extension", "plugin", {"autosave": False})
        self._set("apputils-extension", "notification", {"fetchNews": "false", "checkForUpdates": False})
        if self.dark:
            self._set("apputils-extension", "themes", {"theme": "JupyterLab Dark"})
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.token = secrets.token_hex(16)
        self.url = f"http://127.0.0.1:{port}"
        self._log = (self.folder / "server.log").open("wb")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
                *(f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.root}"),
                *("--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"),
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                *("--LabApp.extension_manager=readonly", "--ServerApp.terminals_enabled=False"),
            ],
            env=env,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _set(self, extension: str, name: str, values: dict[str, Any]) -> None:
        folder = self.folder / "settings" / "@jupyterlab" / extension
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jupyterlab-settings").write_text(json.dumps(values))

    def _wait_until_up(self) -> None:
        ask = urllib.request.Request(
            f"{self.url}/api/status", headers={"Authorization": f"token {self.token}"}
        )
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(ask, timeout=1) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"JupyterLab did not come up:\n{(self.folder / 'server.log').read_text()[-3000:]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Browser:
    """Headless Chromium."""

    def __init__(self, *, width: int = 1100, height: int = 950, scale: float = 1.0) -> None:
        self._context = {
            "viewport": {"width": width, "height": height},
            "device_scale_factor": scale,
            "reduced_motion": "reduce",
        }

    def __enter__(self) -> Self:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        try:
            self._browser = self._playwright.chromium.launch(
                executable_path=CHROMIUM, headless=True, args=_CHROMIUM_ARGS
            )
        except BaseException:
            self._playwright.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._browser.close()
        self._playwright.stop()

    def open(self, server: LabServer, notebook: str, *, timeout: float = 60) -> NotebookPage:
        """Open a notebook of the server's folder and wait until its kernel is idle."""
        page = self._browser.new_context(**self._context).new_page()
        page.set_default_timeout(timeout * 1000)
        opened = NotebookPage(page)
        page.goto(
            f"{server.url}/doc/tree/{notebook}?reset&token={server.token}", wait_until="domcontentloaded"
        )
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook .jp-Cell")
        page.wait_for_function(
            "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        return opened


class NotebookPage:
    """An open notebook; ``page`` is the Playwright page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.console: list[tuple[str, str]] = []
        page.on("console", lambda message: self.console.append((message.type, message.text)))
        page.on("pageerror", lambda error: self.console.append(("pageerror", str(error))))

    def run_all(self) -> None:
        """Start all cells; returns at once."""
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until no cell is running or queued."""
        self.page.wait_for_function(
            """() => { const panel = window.jupyterapp.shell.currentWidget;
                return panel.sessionContext.session?.kernel?.status === 'idle' && panel.content.widgets.every(
                    c => c.model.type !== 'code' || c.model.executionState === 'idle') }""",
            timeout=timeout * 1000,
        )

    def cell_errors(self) -> list[str]:
        """Return the errors that cells show."""
        found: list[str] = self.page.evaluate(
            """() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap(
                c => c.model.type !== 'code' ? [] : c.model.sharedModel.outputs.filter(
                    o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`))"""
        )
        return found

    def errors(self) -> list[str]:
        """Return what the page itself complained of: uncaught exceptions and console errors."""
        return [text for kind, text in self.console if kind in ("error", "pageerror")]

    def show(self, selector: str) -> None:
        """Scroll the first match to the top of the page."""
        self.page.locator(selector).first.evaluate("node => node.scrollIntoView({ block: 'start' })")

    def screenshot(self, path: Path, selector: str | None = None) -> Path:
        """Save a picture of the page, or of one element."""
        (self.page if selector is None else self.page.locator(selector).first).screenshot(path=path)
        return path
