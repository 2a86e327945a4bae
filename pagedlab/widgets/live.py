"""`LiveRun`: watch a run, slow it down, stop it.

The run is an asyncio task of the notebook's event loop, so the kernel goes on hearing buttons. A button's callback may
arrive on another thread (widget messages travel beside the cells); whatever it asks for is handed to that loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from html import escape
from importlib.resources import files
from typing import Any

import ipywidgets as ipw

from pagedlab import events as ev
from pagedlab.config import Config
from pagedlab.engine.clock import WallClock
from pagedlab.engine.engine import Engine
from pagedlab.errors import PagedLabError
from pagedlab.lab.live import Live
from pagedlab.lab.live import start as start_live
from pagedlab.lab.results import Run
from pagedlab.policies.block import DEVICE, DISK, HOST, TIER_NAMES
from pagedlab.widgets.blockmap import DISK_LABELS, HOST_LABELS, BlockMap, describe_block, name_of, read_pool
from pagedlab.widgets.controls import ConfigForm, one_line

_STYLE = f"<style>{files('pagedlab.widgets').joinpath('static/live.css').read_text(encoding='utf-8')}</style>"

_TOLD = {
    ev.REQUEST_ADMITTED: "{who} admitted",
    ev.REQUEST_RESUMED: "{who} resumed ({detail})",
    ev.REQUEST_PREEMPTED: "{who} preempted ({detail})",
    ev.REQUEST_FINISHED: "{who} finished ({detail})",
    ev.REQUEST_REFUSED: "{who} refused: {detail}",
    ev.PREFIX_HIT: "{who} hit a cached prefix of {detail}",
    ev.BLOCK_REMOVED: "{n} blocks evicted",
    ev.BLOCKS_SAVED: "{n} blocks saved to the host",
    ev.BLOCKS_LOADED: "{n} blocks loaded from the {medium}",
    ev.BLOCKS_PREFETCHED: "{n} blocks prefetched",
    ev.TIER_FAULT: "a block of the {medium} was lost: {detail}",
}
_TICKER_LINES = 4
_RECENT_STEPS = 32


class LiveRun(ipw.VBox):
    """Start, pause and stop a run, and watch its blocks.

    ``config`` may be a `ConfigForm`: it is read at every start. ``delay`` is the pause after a step in seconds, also on
    the slider. ``start()`` is what the button does; ``await live.wait()`` starts if nobody has, and returns the `Run`
    (of the steps done, if it was stopped), as does ``live.run`` afterwards. A fault shows as one line and ``run``
    stays None.
    """

    def __init__(
        self,
        config: Config | ConfigForm,
        workload: Any,
        *,
        delay: float = 0.05,
        max_fps: float = 15.0,
        ticker: bool = True,
        **options: Any,
    ) -> None:
        self.source = config
        self.workload = workload
        self.options = options
        self.run: Run | None = None
        """The result, once the run has ended or was stopped."""
        self.error: str | None = None
        """The fault that ended the run, in one line."""
        self.state = "ready"
        """ready, loading, running, paused, finished, stopped or failed."""
        self.live: Live | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop = _running_loop()
        self._stop_asked = False
        self._seen_events = 0
        self._told: deque[str] = deque(maxlen=_TICKER_LINES)
        self._shown_at = 0.0

        self.start_button = _button("Start", "play", "pl-start", "start the run", self.start)
        self.pause_button = _button(
            "Pause", "pause", "pl-pause", "pause after this step, or go on", self._toggle
        )
        self.stop_button = _button(
            "Stop", "stop", "pl-stop", "stop after this step and keep what there is", self.stop
        )
        self.speed = ipw.FloatSlider(
            value=delay,
            min=0.0,
            max=max(0.5, delay),
            step=0.01,
            description="delay",
            readout_format=".2f",
            tooltip="seconds to wait after each step",
            style={"description_width": "40px"},
            layout=ipw.Layout(width="260px"),
        )
        self.speed.add_class("pl-speed")
        self.speed.observe(self._delay_changed, "value")
        toolbar = ipw.HBox([self.start_button, self.pause_button, self.stop_button, self.speed])
        toolbar.add_class("pl-toolbar")
        self._status = ipw.HTML()
        self._status.add_class("pl-status")
        self.maps = {
            DEVICE: BlockMap(1, max_fps=max_fps),
            HOST: BlockMap(1, max_fps=max_fps, labels=HOST_LABELS, max_cell=12),
            DISK: BlockMap(1, max_fps=max_fps, labels=DISK_LABELS, max_cell=12),
        }
        for tier, block_map in self.maps.items():
            block_map.add_class(f"pl-map-{TIER_NAMES[tier]}")
            block_map.observe(lambda change, tier=tier: self._select(tier), "selected")
        self._detail = ipw.Label()
        self._detail.add_class("pl-detail")
        self._ticker = ipw.HTML()
        self._ticker.layout.display = None if ticker else "none"
        style = ipw.HTML(_STYLE, layout=ipw.Layout(display="none"))
        super().__init__([style, toolbar, self._status, *self.maps.values(), self._detail, self._ticker])
        self.add_class("pl-live")
        self._set_state("ready")
        if isinstance(config, ConfigForm):
            config.on_change(self._form_changed)
        if (now := self._config()) is not None:
            self._lay_out(now)

    # ---- what buttons and programs ask for ---------------------------------------------------------------------

    def start(self) -> None:
        """Start the run, unless one is under way. `PagedLabError` outside an event loop."""
        self._on_loop(self._start)

    def stop(self) -> None:
        """Stop after the step at hand; what was done is kept in ``run``."""
        self._stop_asked = True
        if self.live is not None:
            self._on_loop(self.live.stop)

    def pause(self) -> None:
        """Hold the run after the step at hand."""
        if self.live is not None and self.state == "running":
            self._on_loop(self.live.pause)
            self._set_state("paused")

    def resume(self) -> None:
        """Go on after `pause`."""
        if self.live is not None and self.state == "paused":
            self._on_loop(self.live.resume)
            self._set_state("running")

    async def wait(self) -> Run | None:
        """Wait for the end and return the run; None if it failed (``error`` says why)."""
        if self.state == "ready" and self._task is None:
            self._start()
        if self._task is not None:
            await asyncio.shield(self._task)
        return self.run

    @property
    def engine(self) -> Engine | None:
        """The engine of the run under way, or of the last one."""
        return self.live.engine if self.live is not None else None

    # ---- the run -----------------------------------------------------------------------------------------------

    def _on_loop(self, action: Callable[[], None]) -> None:
        """Do it now, or on the loop that runs the engine if this is another thread."""
        here = _running_loop()
        if self._loop is None or self._loop is here or self._loop.is_closed():
            action()
        else:
            self._loop.call_soon_threadsafe(action)

    def _start(self) -> None:
        if self._task is not None and not self._task.done():
            return
        self._loop = _running_loop()
        if self._loop is None:
            raise PagedLabError(
                "a live run needs a running event loop, as a notebook has; in a script use pl.run"
            )
        self._stop_asked = False
        self.run, self.error, self.live = None, None, None
        self._seen_events = 0
        self._told.clear()
        self._set_state("loading")
        self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        await asyncio.sleep(0.02)  # lets the page show "loading" before the model is
        try:
            config = self.source.config if isinstance(self.source, ConfigForm) else self.source
            self._lay_out(config)
            self.live = live = start_live(config, self.workload, delay=self.speed.value, **self.options)
            live.on_step(lambda _: self._stepped())
            if self._stop_asked:
                live.stop()
            self._set_state("running")
            self.run = await live.wait()
            self._set_state("stopped" if self.run.interrupted else "finished")
        except asyncio.CancelledError:
            if self.live is not None:
                self.live.stop()
            self._set_state("stopped")
            raise
        except Exception as error:  # whatever a policy or a model does wrong belongs in the status line
            self.error = one_line(error)
            self._set_state("failed")
        finally:
            self._draw(last=True)

    def _stepped(self) -> None:
        if time.monotonic() - self._shown_at >= 0.1:
            self._show_status()
        if self.maps[DEVICE].due:
            self._draw()

    # ---- what is shown -----------------------------------------------------------------------------------------

    def _config(self) -> Config | None:
        try:
            return self.source.config if isinstance(self.source, ConfigForm) else self.source
        except Exception:  # the form says it
            return None

    def _form_changed(self, config: Config) -> None:
        if self._task is None or self._task.done():
            self._on_loop(lambda: self._lay_out(config))

    def _lay_out(self, config: Config) -> None:
        """Give the maps the sizes of ``config``."""
        sizes = (config.num_blocks, config.num_host_blocks, config.num_disk_blocks)
        for tier, n in enumerate(sizes):
            self.maps[tier].layout.display = None if n else "none"
            title = f"{TIER_NAMES[tier].capitalize()}: {n:,} blocks of {config.block_size} tokens"
            self.maps[tier].resize(max(n, 1), title=title)

    def _draw(self, *, last: bool = False) -> None:
        engine = self.engine
        if engine is None:
            return
        for tier, block_map in self.maps.items():
            codes, notes, names = read_pool(engine, tier)
            if len(codes) == block_map.n_blocks:
                block_map.show(codes, notes, names)
                if last:
                    block_map.flush()
        self._show_detail()
        self._tell(engine)
        if last:
            self._show_status()

    def _tell(self, engine: Engine) -> None:
        """Add what happened since the last look to the ticker."""
        if len(engine.events) == self._seen_events:
            return
        told = (event for event in engine.events.since(self._seen_events) if event.kind in _TOLD)
        for event in deque(told, maxlen=_TICKER_LINES):
            who = event.detail if event.kind == ev.REQUEST_ADMITTED else _who(engine, event.seq_id)
            line = _TOLD[event.kind].format(
                who=name_of(who),
                n=len(event.blocks),
                medium=event.medium,
                detail=name_of(event.detail, limit=60),
            )
            if event.kind == ev.BLOCK_REMOVED and event.medium != "device":
                line += f" from the {event.medium}"
            self._told.append(f"step {event.step:>4}  {_singular(line)}")
        self._seen_events = len(engine.events)
        self._ticker.value = f"<div class='pl-ticker'>{escape(chr(10).join(self._told))}</div>"

    def _select(self, tier: int) -> None:
        if self.maps[tier].selected >= 0:
            for other, block_map in self.maps.items():
                if other != tier:
                    block_map.selected = -1
        self._show_detail()

    def _show_detail(self) -> None:
        chosen = [(tier, m.selected) for tier, m in self.maps.items() if m.selected >= 0]
        engine = self.engine
        if engine is None or not chosen:
            text = "" if engine is None else "Hover over a block for its holder; click to follow one."
        else:
            text = describe_block(engine, chosen[0][1], chosen[0][0])
        if self._detail.value != text:
            self._detail.value = text

    def _set_state(self, state: str) -> None:
        self.state = state
        busy = state in ("loading", "running", "paused")
        self.start_button.disabled = busy
        self.start_button.description = "Start" if state == "ready" or busy else "Run again"
        self.pause_button.disabled = state not in ("running", "paused")
        self.pause_button.description = "Resume" if state == "paused" else "Pause"
        self.pause_button.icon = "play" if state == "paused" else "pause"
        self.stop_button.disabled = not busy
        self._show_status()

    def _show_status(self) -> None:
        self._shown_at = time.monotonic()
        words = [f"<span class='pl-state'>{self.state}</span>"]
        if self.error is not None:
            words = [f"<span class='pl-state pl-failed'>failed: {escape(self.error)}</span>"]
        if (engine := self.engine) is not None and engine.steps:
            words += [f"<span>{name} <b>{value}</b></span>" for name, value in _figures(engine)]
        self._status.value = f"<div class='pl-stats'>{' '.join(words)}</div>"

    def _toggle(self) -> None:
        if self.state == "paused":
            self.resume()
        else:
            self.pause()

    def _delay_changed(self, change: Any) -> None:
        if self.live is not None:
            self.live.delay = change["new"]


def _figures(engine: Engine) -> list[tuple[str, str]]:
    """Return the figures of the status line."""
    totals, recent = engine.totals, engine.steps[-_RECENT_STEPS:]
    seconds = sum(step.duration for step in recent) / 1e12
    tokens = sum(step.decode_tokens + step.prefill_tokens for step in recent)
    if isinstance(engine.clock, WallClock):
        speed = "tokens/s", f"{tokens / seconds:,.0f}" if seconds else "–"
    else:
        speed = "tokens/step", f"{tokens / len(recent):,.1f}"
    return [
        ("step", f"{len(engine.steps):,}"),
        ("running", str(len(engine.running))),
        ("waiting", str(len(engine.waiting))),
        speed,
        ("hit ratio", f"{totals.hit_tokens / totals.prompt_tokens:.0%}" if totals.prompt_tokens else "–"),
        ("preemptions", f"{totals.preemptions:,}"),
    ]


def _who(engine: Engine, seq_id: int) -> str:
    for seq in (*engine.running, *engine.waiting, *reversed(engine.finished)):
        if seq.seq_id == seq_id:
            return seq.request_id
    return f"sequence {seq_id}"


def _singular(line: str) -> str:
    return line.replace("1 blocks ", "1 block ", 1) if line.startswith("1 blocks ") else line


def _button(text: str, icon: str, css_class: str, tooltip: str, action: Callable[[], None]) -> ipw.Button:
    button = ipw.Button(description=text, icon=icon, tooltip=tooltip, layout=ipw.Layout(width="110px"))
    button.add_class(css_class)
    button.on_click(lambda _: action())
    return button


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
