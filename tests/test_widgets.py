"""The widgets' logic, without a browser."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from typing import Any

import ipywidgets as ipw
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagedlab as pl
from pagedlab import registry
from pagedlab.engine.engine import Engine
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.executors.stub import StubExecutor
from pagedlab.policies.base import Parameter
from pagedlab.widgets import BlockMap, ConfigForm, LiveRun
from pagedlab.widgets import blockmap as bm
from pagedlab.widgets.controls import one_line, parameter_widget

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    pl.list_policies()
    monkeypatch.setattr(
        registry, "_classes", {slot: dict(names) for slot, names in registry._classes.items()}
    )


def requests(n: int = 12, *, prompt: int = 20, output: int = 12, n_samples: int = 1) -> list[Request]:
    """All with the same first half of the prompt."""
    return [
        Request(
            request_id=f"chat-{i}",
            prompt=(*range(prompt // 2), *[(i * 7 + j) % 60 for j in range(prompt - prompt // 2)]),
            sampling=SamplingParams(max_tokens=output, n=n_samples, temperature=float(n_samples > 1)),
        )
        for i in range(n)
    ]


def small(**override: Any) -> pl.Config:
    return pl.Config(**{"num_blocks": 24, "block_size": 4, "max_num_seqs": 4, **override})


# ---- the block map -----------------------------------------------------------------------------------------------

states = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        *[
            st.tuples(
                st.lists(st.integers(0, bm.NUM_CODES - 1), min_size=n, max_size=n),
                st.lists(st.integers(-(2**31), 2**31 - 1), min_size=n, max_size=n),
            )
        ]
        * 2
    )
)


def as_state(drawn: tuple[list[int], list[int]]) -> tuple[bm.Codes, bm.Notes]:
    return np.array(drawn[0], np.uint8), np.array(drawn[1], np.int32)


@given(states)
def test_delta_leads_from_one_state_to_the_other(drawn: Any) -> None:
    before, after = as_state(drawn[0]), as_state(drawn[1])
    delta = bm.encode_delta(before, after)
    # Through bytes, as the page gets it.
    received = bm.Delta(
        np.frombuffer(delta.where.tobytes(), "<u4"),
        np.frombuffer(delta.codes.tobytes(), np.uint8),
        np.frombuffer(delta.notes.tobytes(), "<i4"),
    )
    bm.apply_delta(before, received)
    assert np.array_equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert received.nbytes == 9 * len(delta.where)


@given(states)
def test_frame_round_trip(drawn: Any) -> None:
    codes, notes = as_state(drawn[0])
    back = bm.decode_frame(bm.encode_frame(codes, notes))
    assert np.array_equal(back[0], codes)
    assert np.array_equal(back[1], notes)


class Wire:
    """Stands where the page is, and keeps up by frames and deltas alone."""

    def __init__(self, block_map: BlockMap, monkeypatch: pytest.MonkeyPatch) -> None:
        self.map = block_map
        self.frames = self.deltas = 0
        self.state = as_state(([0] * block_map.n_blocks, [0] * block_map.n_blocks))
        monkeypatch.setattr(block_map, "send_state", self._frame)
        monkeypatch.setattr(block_map, "send", self._delta)

    def _frame(self, key: str) -> None:
        if key != "frame":
            return
        self.frames += 1
        codes, notes = bm.decode_frame(self.map.get_state("frame")["frame"])
        self.state = codes.copy(), notes.copy()

    def _delta(self, content: dict[str, Any], buffers: list[bytes]) -> None:
        assert content == {"kind": "delta"}
        self.deltas += 1
        where, codes, notes = buffers
        bm.apply_delta(
            self.state,
            bm.Delta(
                np.frombuffer(where, "<u4"), np.frombuffer(codes, np.uint8), np.frombuffer(notes, "<i4")
            ),
        )


def test_page_keeps_up_with_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(small(null_block=True), StubExecutor())
    for request in requests():
        engine.add(request)
    block_map = BlockMap(24, max_fps=1e9)
    wire = Wire(block_map, monkeypatch)
    while engine.step():
        codes, notes, names = bm.read_pool(engine)
        block_map.show(codes, notes, names)
        assert np.array_equal(wire.state[0], codes)
        assert np.array_equal(wire.state[1], notes)
    assert wire.deltas > wire.frames >= 1


def test_last_state_is_never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def burst() -> None:
        for i in range(50):
            block_map.show([i % bm.NUM_CODES] * 100)
        await asyncio.sleep(0.15)

    block_map = BlockMap(100, max_fps=20)
    wire = Wire(block_map, monkeypatch)
    asyncio.run(burst())
    assert wire.state[0][0] == 49 % bm.NUM_CODES
    assert wire.frames + wire.deltas < 50


def test_state_of_a_reloaded_page_is_the_current_one() -> None:
    block_map = BlockMap(4, max_fps=1e-9)
    block_map.show([1, 2, 3, 4])
    block_map.show([5, 6, 7, 8])  # not sent: too soon
    assert bm.decode_frame(block_map.get_state()["frame"])[0].tolist() == [5, 6, 7, 8]


def test_codes_say_what_the_pool_says() -> None:
    engine = Engine(
        small(null_block=True, max_num_seqs=8, reservation="max", max_model_len=32), StubExecutor()
    )
    for request in requests(6, n_samples=2):
        engine.add(request)
    for _ in range(6):
        engine.step()
    codes, notes, names = bm.read_pool(engine)
    for block in engine.cache.device.blocks:
        code = codes[block.index]
        if block.index == 0:
            assert code == bm.NULL
        elif block.ref_count > 1:
            assert (code, notes[block.index]) == (bm.SHARED, block.ref_count)
        elif block.ref_count == 1:
            assert bm.SEQUENCE <= code < bm.SHARED or code == bm.CLAIMED
            assert names[str(notes[block.index])].startswith("chat-")
        elif block.key is not None:
            assert (code, notes[block.index]) == (bm.CACHED, block.hits)
        else:
            assert code == bm.FREE
    assert (codes == bm.CLAIMED).any()
    assert (codes == bm.SHARED).any()


def test_host_tier_is_shown() -> None:
    config = small(num_blocks=10, swap="host", preemption="swap", host_blocks=16)
    engine = Engine(config, StubExecutor())
    for request in requests(4, output=16):
        engine.add(request)
    seen: set[int] = set()
    while engine.step():
        codes, _, _ = bm.read_pool(engine, bm.DEVICE + 1)
        seen |= {min(int(c), bm.SHARED) if c < bm.SHARED else int(c) for c in codes}
        for block in range(16):
            assert bm.describe_block(engine, block, bm.DEVICE + 1).startswith(f"block {block} · ")
    assert bm.CACHED in seen
    assert bm.read_pool(Engine(small(), StubExecutor()), bm.DEVICE + 1)[0].size == 0


def test_described_block_names_its_holders() -> None:
    engine = Engine(small(), StubExecutor())
    for request in requests(2):
        engine.add(request)
    engine.step()
    engine.step()
    held = next(b for b in engine.cache.device.blocks if b.ref_count == 1)
    assert "chat-" in bm.describe_block(engine, held.index)
    assert bm.describe_block(engine, 10**6) == ""


def test_wrong_number_of_blocks_is_refused_and_resize_helps() -> None:
    block_map = BlockMap(4)
    with pytest.raises(ValueError, match="codes for 4 blocks"):
        block_map.show([0] * 5)
    block_map.resize(5, title="five")
    block_map.show([bm.CACHED] * 5)
    assert block_map.counts()["cached"] == 5
    assert block_map.title == "five"


@pytest.mark.parametrize("num_blocks", [1, 17, 300, 5000])
def test_picture_for_viewers_without_a_kernel(num_blocks: int) -> None:
    image = pytest.importorskip("PIL.Image")
    block_map = BlockMap(num_blocks, title="device")
    block_map.show(np.arange(num_blocks) % bm.NUM_CODES)
    bundle, _ = block_map._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "image/png" in bundle
    picture = image.open(BytesIO(block_map.png()))
    assert len(picture.convert("RGB").getcolors(1 << 24)) >= min(num_blocks, 6)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_palettes_have_a_colour_for_everything(theme: str) -> None:
    palette = bm.PALETTES[theme]
    assert len(palette) == bm.NUM_CODES + 4
    assert all(len(c) == 7 and int(c[1:], 16) >= 0 for c in palette)
    kinds = [palette[bm.FREE], *palette[bm.SEQUENCE : bm.SHARED], palette[bm.SHARED], palette[bm.CACHED]]
    assert len(set(kinds)) == len(kinds)


def test_map_is_wider_than_high() -> None:
    for n in (1, 56, 256, 1000, 100_000):
        cols = bm.default_columns(n)
        assert cols >= 16
        assert cols >= 2 * -(-n // cols) or n == 1


# ---- the form ----------------------------------------------------------------------------------------------------


def test_form_gives_the_config_that_it_was_given() -> None:
    config = small(
        eviction="lfu", swap="host", host_blocks=7, preemption="swap", null_block=True, watermark=0.1, seed=3
    )
    form = ConfigForm(config)
    assert form.config == config
    assert form.error is None


def test_every_policy_of_every_slot_can_be_chosen() -> None:
    form = ConfigForm()
    for slot in registry.SLOTS:
        for row in pl.list_policies(slot):
            if getattr(registry.lookup_class(slot, row["name"]), "needs_future", False):
                assert row["name"] not in form.slot(slot).choice.options, "no run can serve it"
                continue
            form.slot(slot).choice.value = row["name"]
            policy = form.slot(slot).policy()
            assert policy.name == row["name"]
            assert policy.get_params() == {p["name"]: p["default"] for p in row["params"]}
        form.config = pl.Config()


def test_parameters_reach_the_config() -> None:
    form = ConfigForm()
    form.slot("prefetch").choice.value = "queue-lookahead"
    form.slot("prefetch").control("depth").value = 3
    form.slot("preemption").control("victim").value = "priority"
    form.size("num_blocks").value = 99
    form.size("host_blocks").value = "5"
    config = form.config
    assert config.prefetch == pl.make("prefetch", "queue-lookahead", depth=3)
    assert config.preemption == pl.make("preemption", "recompute", victim="priority")
    assert (config.num_blocks, config.host_blocks) == (99, 5)
    assert form.preset.value == "custom"
    form.size("host_blocks").value = ""
    assert form.config.host_blocks is None
    form.size("disk_blocks").value = "70"
    assert form.config.disk_blocks == 70


def test_preset_sets_the_policies_and_keeps_the_sizes() -> None:
    form = ConfigForm(small())
    form.preset.value = "orca-max"
    assert form.config == pl.Config.preset("orca-max", num_blocks=24, block_size=4, max_num_seqs=4)
    assert form.preset.value == "orca-max"
    form.slot("lookup").choice.value = "radix"
    assert form.preset.value == "custom"
    form.preset.value = "default"
    assert form.config == small()


def test_impossible_config_is_one_line_in_the_form() -> None:
    form = ConfigForm(small())
    heard: list[pl.Config] = []
    form.on_change(heard.append)
    form.slot("swap").choice.value = "host"
    assert len(heard) == 1
    form.size("host_blocks").value = "0"
    assert form.error is not None
    assert "host_blocks must be at least 1" in form.error
    assert "\n" not in form.error
    assert "host_blocks must be at least 1" in form.children[-1].value
    assert len(heard) == 1
    with pytest.raises(pl.ConfigError):
        _ = form.config
    form.size("host_blocks").value = "4"
    assert form.error is None
    assert form.children[-1].value == ""
    assert heard[-1].host_blocks == 4


def test_text_that_is_no_number_is_an_error_too() -> None:
    form = ConfigForm()
    form.size("host_blocks").value = EVIL
    assert form.error is not None
    assert EVIL in form.error
    assert_only_text(form.children[-1].value)


def test_policy_registered_in_a_cell_appears_and_a_new_version_takes_over() -> None:
    form = ConfigForm(small())

    def define(default: int) -> None:
        @pl.register("eviction", "mine")
        class Mine(pl.policies.Eviction):
            weight: int = pl.policies.param(default, low=0, high=50, unit="hits", help="how much")

            def priority(self, block: Any) -> float:
                return self.weight * block.hits

    define(2)
    form.refresh()
    form.slot("eviction").choice.value = "mine"
    assert form.config.eviction.get_params() == {"weight": 2}  # type: ignore[union-attr]
    assert isinstance(form.slot("eviction").control("weight"), ipw.IntSlider)
    form.slot("eviction").control("weight").value = 9
    define(4)
    form.refresh()
    assert form.config.eviction.get_params() == {"weight": 9}  # type: ignore[union-attr]
    assert type(form.config.eviction) is registry.lookup_class("eviction", "mine")


def test_object_without_a_name_can_be_kept() -> None:
    class Nameless(pl.policies.Eviction):
        bias: float = pl.policies.param(0.5, low=0, high=1, help="bias")

        def priority(self, block: Any) -> float:
            return self.bias

    form = ConfigForm(small(eviction=Nameless(bias=0.25)))
    assert form.config.eviction == Nameless(bias=0.25)
    form.slot("eviction").choice.value = "lru"
    assert form.config.eviction == pl.make("eviction", "lru")
    form.slot("eviction").choice.value = "Nameless (object)"
    assert isinstance(form.config.eviction, Nameless)


@pytest.mark.parametrize(
    ("parameter", "kind"),
    [
        (Parameter("a", int, 3, low=1, high=9), ipw.IntSlider),
        (Parameter("a", int, 3, low=1), ipw.BoundedIntText),
        (Parameter("a", float, 0.5, low=0, high=1), ipw.FloatSlider),
        (Parameter("a", float, 0.5), ipw.BoundedFloatText),
        (Parameter("a", bool, True), ipw.Checkbox),
        (Parameter("a", str, "x", choices=("x", "y")), ipw.Dropdown),
        (Parameter("a", str, "x"), ipw.Text),
        (Parameter("a", object, None), ipw.Text),
    ],
)
def test_control_fits_the_parameter(parameter: Parameter, kind: type[ipw.Widget]) -> None:
    control = parameter_widget(parameter, parameter.default)
    assert type(control) is kind
    assert control.disabled == (parameter.type is object)


def test_tooltip_says_help_and_range() -> None:
    control = parameter_widget(Parameter("depth", int, 8, help="how far", low=1, high=64, unit="requests"), 8)
    assert control.tooltip == "how far. Allowed: from 1 to 64"
    assert control.description == "depth (requests)"


# ---- nothing that comes from a user is HTML ----------------------------------------------------------------------


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)


def assert_only_text(html: str, allowed: tuple[str, ...] = ()) -> None:
    parser = _Tags()
    parser.feed(html)
    assert set(parser.tags) <= set(allowed), html


def every_widget(widget: ipw.Widget) -> Iterator[ipw.Widget]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from every_widget(child)


def test_names_and_help_of_policies_are_shown_as_text() -> None:
    @pl.register("eviction", EVIL)
    class Evil(pl.policies.Eviction):
        __doc__ = f"{EVIL} does nothing."
        weight: int = pl.policies.param(1, low=0, help=EVIL, unit=EVIL)

        def priority(self, block: Any) -> float:
            return 0

    form = ConfigForm()
    form.slot("eviction").choice.value = EVIL
    assert form.config.eviction == Evil()
    shown = list(every_widget(form))
    for html in (w for w in shown if isinstance(w, ipw.HTML)):
        assert_only_text(html.value, ("style",))
    # Descriptions are text unless a widget says otherwise.
    assert not any(getattr(w, "description_allow_html", False) for w in shown)


def test_request_names_are_shown_as_text() -> None:
    async def watch() -> LiveRun:
        work = [
            Request(request_id=f"{EVIL}-{i}", prompt=(1, 2, i), sampling=SamplingParams(max_tokens=3))
            for i in range(3)
        ]
        live = LiveRun(small(), work, delay=0, executor=StubExecutor(), clock="step")
        await live.wait()
        return live

    live = asyncio.run(watch())
    assert live.state == "finished"
    for html in (w for w in every_widget(live) if isinstance(w, ipw.HTML)):
        assert_only_text(html.value, ("style", "div", "span", "b"))


# ---- the live run ------------------------------------------------------------------------------------------------


def text_of(live: LiveRun) -> str:
    return next(
        w for w in every_widget(live) if isinstance(w, ipw.HTML) and "pl-status" in w._dom_classes
    ).value


def test_live_run_ends_by_itself_and_says_the_same_as_run() -> None:
    async def watch() -> LiveRun:
        live = LiveRun(small(), requests(), delay=0, executor=StubExecutor(), clock="step")
        assert live.state == "ready"
        assert await live.wait() is live.run
        return live

    live = asyncio.run(watch())
    assert live.state == "finished"
    assert "finished" in text_of(live)
    assert live.start_button.description == "Run again"
    assert live.stop_button.disabled
    assert live.run is not None
    expected = pl.run(small(), requests(), executor=StubExecutor(), clock="step", progress=False)
    assert live.run.tokens == expected.tokens
    # The map shows the end: nothing runs, prefixes are cached.
    counts = live.maps[bm.DEVICE].counts()
    assert counts["running"] == counts["shared"] == 0
    assert counts["cached"] > 0


def test_stop_pause_and_resume() -> None:
    async def watch() -> LiveRun:
        live = LiveRun(small(), requests(40), delay=0.001, executor=StubExecutor(), clock="step")
        live.start()
        live.start()  # once is enough
        while live.engine is None or len(live.engine.steps) < 3:
            await asyncio.sleep(0.001)
        live.pause_button.click()
        assert live.state == "paused"
        await asyncio.sleep(0.02)
        held = len(live.engine.steps)
        await asyncio.sleep(0.02)
        assert len(live.engine.steps) == held
        live.pause_button.click()
        while len(live.engine.steps) == held:
            await asyncio.sleep(0.001)
        live.speed.value = 0.0
        assert live.live is not None
        assert live.live.delay == 0.0
        live.speed.value = 0.01
        live.stop_button.click()
        run = await live.wait()
        assert run is live.run
        return live

    live = asyncio.run(watch())
    assert live.state == "stopped"
    assert live.run is not None
    assert live.run.interrupted
    assert live.engine is not None
    live.engine.check()


def test_buttons_may_be_pressed_on_another_thread() -> None:
    async def watch() -> LiveRun:
        live = LiveRun(small(), requests(40), delay=0.001, executor=StubExecutor(), clock="step")
        await asyncio.to_thread(live.start_button.click)
        while live.engine is None or len(live.engine.steps) < 3:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(live.pause_button.click)
        await asyncio.to_thread(live.stop_button.click)
        await live.wait()
        return live

    assert asyncio.run(watch()).state == "stopped"


def test_fault_is_one_line_and_the_next_run_works() -> None:
    class Broken(pl.policies.Eviction):
        def priority(self, block: Any) -> float:
            raise RuntimeError(f"nothing\nworks {EVIL}")

    async def watch() -> LiveRun:
        live = LiveRun(
            ConfigForm(small(eviction=Broken())), requests(), delay=0, executor=StubExecutor(), clock="step"
        )
        assert await live.wait() is None
        return live

    live = asyncio.run(watch())
    assert live.state == "failed"
    assert live.error == f"RuntimeError: nothing works {EVIL}"
    assert_only_text(text_of(live), ("div", "span", "b"))
    assert live.run is None

    async def again() -> None:
        live.source = small()
        live.start()
        await live.wait()

    asyncio.run(again())
    assert live.state == "finished"


def test_form_is_read_at_every_start() -> None:
    async def watch() -> None:
        form = ConfigForm(small())
        live = LiveRun(form, requests(), delay=0, executor=StubExecutor(), clock="step")
        first = await live.wait()
        form.slot("lookup").choice.value = "none"
        form.size("num_blocks").value = 40
        assert live.maps[bm.DEVICE].n_blocks == 40
        live.start()
        second = await live.wait()
        assert first is not None
        assert second is not None
        assert (first.config.num_blocks, second.config.num_blocks) == (24, 40)
        assert second.summary()["hit_ratio"] == 0 < first.summary()["hit_ratio"]
        assert first.tokens == second.tokens
        form.size("host_blocks").value = "many"
        live.start()
        assert await live.wait() is None
        assert live.error == form.error

    asyncio.run(watch())


def test_start_outside_an_event_loop_is_refused_by_name() -> None:
    live = LiveRun(small(), requests(1), executor=StubExecutor())
    with pytest.raises(pl.PagedLabError, match="event loop"):
        live.start()


def test_host_map_shows_only_with_a_host_tier() -> None:
    with_host = LiveRun(small(swap="host", host_blocks=12), requests(1))
    assert with_host.maps[1].n_blocks == 12
    assert with_host.maps[1].layout.display is None
    assert with_host.maps[2].layout.display == "none"
    assert LiveRun(small(), requests(1)).maps[1].layout.display == "none"


def test_disk_map_shows_only_with_a_disk_tier() -> None:
    with_disk = LiveRun(small(swap="disk", host_blocks=12, disk_blocks=30), requests(1))
    assert [m.n_blocks for m in with_disk.maps.values()] == [24, 12, 30]
    assert all(m.layout.display is None for m in with_disk.maps.values())


def test_a_disk_tier_is_drawn_and_described() -> None:
    config = small(num_blocks=10, swap="disk", host_blocks=3, disk_blocks=40)
    engine = Engine(config, StubExecutor())
    for request in requests(8):
        engine.add(request)
    engine.run()
    codes, _, names = bm.read_pool(engine, 2)
    cached = [i for i, b in enumerate(engine.cache.pools[2].blocks) if b.key is not None]
    assert len(codes) == 40
    assert cached
    assert [i for i, code in enumerate(codes) if code == bm.CACHED] == cached
    assert not names
    assert "cached, reusable" in bm.describe_block(engine, cached[0], 2)
    assert bm.describe_block(engine, 40, 2) == ""


def test_one_line() -> None:
    assert one_line(pl.ConfigError("wrong\nhere")) == "wrong here"
    assert one_line(ValueError("odd")) == "ValueError: odd"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_widgets_are_loaded_on_first_use_only() -> None:
    code = (
        "import sys, pagedlab, pagedlab.widgets\n"
        "assert not {'ipywidgets', 'anywidget', 'torch'} & set(sys.modules), 'too early'\n"
        "pagedlab.widgets.BlockMap(4)\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
