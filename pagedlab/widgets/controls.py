"""`ConfigForm`: a configuration as a form, one row a slot.

Every text that comes from a policy (its name, help and docstring) is shown as text, never as HTML.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import ipywidgets as ipw

from pagedlab.config import PRESETS, Config
from pagedlab.errors import PagedLabError
from pagedlab.policies.base import Parameter, Policy
from pagedlab.registry import SLOTS, is_registered, lookup_class, policy_names

DECIDES = {
    "allocator": "which physical blocks to hand out",
    "reservation": "how much a request claims at admission",
    "lookup": "how a prompt finds its cached prefix",
    "eviction": "which unused cached block to give up",
    "swap": "what becomes of an evicted block",
    "preemption": "whom to stop when memory is short, and how",
    "prefetch": "what to bring up the tiers before it is asked for",
    "scheduler": "which sequences run this step, with how many tokens",
    "layout": "how block tables are encoded for the kernel",
    "kernel": "how attention reads the blocks",
}
SIZES: dict[str, tuple[str, str]] = {
    "num_blocks": ("blocks", "blocks of the device tier"),
    "block_size": ("tokens a block", "tokens that one block holds"),
    "host_blocks": ("host blocks", "blocks of the host tier; empty: the device's number if a policy uses it"),
    "disk_blocks": (
        "disk blocks",
        "blocks of the disk tier; empty: four times the host's if a policy uses it",
    ),
    "max_num_seqs": ("sequences", "sequences that may run at once"),
    "max_num_batched_tokens": ("tokens a step", "token budget: tokens computed in one step at most"),
}
_MAY_BE_EMPTY = ("host_blocks", "disk_blocks")
CUSTOM = "custom"
DEFAULT = "default"

_STYLE = f"<style>{files('pagedlab.widgets').joinpath('static/form.css').read_text(encoding='utf-8')}</style>"


def parameter_widget(parameter: Parameter, value: Any) -> ipw.Widget:
    """Return the control that fits a parameter's type and range; its help is the tooltip."""
    label = f"{parameter.name} ({parameter.unit})" if parameter.unit else parameter.name
    low, high = parameter.low, parameter.high
    allowed = f" Allowed: {'' if low is None else f'from {low:g} '}{'' if high is None else f'to {high:g}'}".rstrip()
    common: dict[str, Any] = {
        "description": label,
        "tooltip": parameter.help + (f".{allowed}" if low is not None or high is not None else ""),
        "style": {"description_width": "initial"},
        "layout": ipw.Layout(width="auto", min_width="150px"),
    }
    narrow = {**common, "layout": ipw.Layout(width=f"{60 + 7 * (len(label) + max(5, len(str(value))))}px")}
    if parameter.type is bool:
        return ipw.Checkbox(value=value, indent=False, **common)
    if parameter.choices is not None:
        return ipw.Dropdown(options=list(parameter.choices), value=value, **common)
    if parameter.type is int:
        first, last = -(1 << 53) if low is None else int(low), 1 << 53 if high is None else int(high)
        if last - first <= 1000:
            return ipw.IntSlider(value=value, min=first, max=last, **common)
        return ipw.BoundedIntText(value=value, min=first, max=last, **narrow)
    if parameter.type is float:
        least, most = -1e300 if low is None else low, 1e300 if high is None else high
        if low is not None and high is not None:
            step = (most - least) / 100
            return ipw.FloatSlider(
                value=value, min=least, max=most, step=step, readout_format=".3g", **common
            )
        return ipw.BoundedFloatText(value=value, min=least, max=most, **narrow)
    if parameter.type is str:
        return ipw.Text(value=value, continuous_update=False, **narrow)
    return ipw.Text(value=repr(value), disabled=True, **narrow)


class _SlotRow(ipw.VBox):
    """A slot: its name, the policy chosen, what that one does, and its parameters."""

    def __init__(self, policy: Policy, changed: Callable[[], None]) -> None:
        self.slot = policy.slot
        self._changed = changed
        self._object: Policy | None = None
        """A policy that no name stands for, offered as it is."""
        self._shown: type[Policy] | None = None
        self._controls: dict[str, ipw.Widget] = {}
        name = ipw.Label(self.slot, tooltip=DECIDES[self.slot], layout=ipw.Layout(width="92px"))
        name.add_class("pl-name")
        self.choice = ipw.Dropdown(tooltip=DECIDES[self.slot], layout=ipw.Layout(width="170px"))
        self.choice.add_class(f"pl-slot-{self.slot}")
        self._note = ipw.Label(layout=ipw.Layout(flex="1 1 0", min_width="0"))
        self._note.add_class("pl-note")
        row = ipw.HBox([name, self.choice, self._note])
        row.add_class("pl-row")
        self._params = ipw.HBox()
        self._params.add_class("pl-params")
        super().__init__([row])
        self._row = row
        self.choice.observe(self._chosen, "value")
        self.set(policy)

    def set(self, policy: Policy) -> None:
        """Show ``policy``, registered or not."""
        self._object = None if is_registered(policy) else policy
        self._offer(self._object_label if self._object is not None else policy.name)
        self._show(type(policy), policy.get_params())

    @property
    def _object_label(self) -> str:
        assert self._object is not None
        return f"{type(self._object).__name__} (object)"

    def _offer(self, value: str) -> None:
        # A bound that must know the future cannot be run.
        names = policy_names(self.slot)
        options = [n for n in names if not getattr(lookup_class(self.slot, n), "needs_future", False)]
        if self._object is not None:
            options = [*options, self._object_label]
        self.choice.unobserve(self._chosen, "value")
        if tuple(options) != tuple(self.choice.options):
            self.choice.options = options
        self.choice.value = value if value in options else options[0]
        self.choice.observe(self._chosen, "value")

    def refresh(self) -> bool:
        """Offer what is registered now; True if that changes what the row stands for."""
        self._offer(self.choice.value)
        cls = self._class()
        if cls is self._shown:
            return False
        old = self._values()
        self._show(cls, {p.name: old[p.name] for p in cls.params() if p.name in old})
        return True

    def _class(self) -> type[Policy]:
        if self._object is not None and self.choice.value == self._object_label:
            return type(self._object)
        return lookup_class(self.slot, self.choice.value)

    def _chosen(self, change: object) -> None:
        try:
            self._show(self._class(), {})
        except PagedLabError:
            self._params.children = ()
        self._changed()

    def _show(self, cls: type[Policy], values: dict[str, Any]) -> None:
        """Show what ``cls`` does and its parameters, those not in ``values`` at their defaults."""
        self._shown = cls
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        self._note.value = self._note.tooltip = "" if summary.startswith(f"{cls.__name__}(") else summary
        self._controls = {}
        for parameter in cls.params():
            value = values.get(parameter.name, parameter.default)
            try:
                control = parameter_widget(parameter, value)
            except Exception:  # a value that no control can show (a default outside its own range, say)
                control = ipw.Text(value=repr(value), description=parameter.name, disabled=True)
            control.observe(lambda change: self._changed(), "value")
            self._controls[parameter.name] = control
        self._params.children = tuple(self._controls.values())
        self.children = (self._row, self._params) if self._controls else (self._row,)

    def _values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self._controls.items() if not control.disabled}

    def control(self, name: str) -> ipw.Widget:
        """Return the widget of a parameter."""
        return self._controls[name]

    def policy(self) -> Policy:
        """Return the policy that the row stands for. `ConfigError` if a parameter is not allowed."""
        cls = self._class()
        if self._object is not None and cls is type(self._object):
            return self._object.clone(**self._values())
        return cls.from_params(self._values())


class ConfigForm(ipw.VBox):
    """A form over every slot, its policies' parameters, the sizes and the presets.

    ``config`` is the configuration that it stands for; what cannot be is said in one line at the foot of the form.
    Policies registered in a notebook cell appear when the cell has run. ``slots`` limits the rows shown (the others
    keep what ``config`` brought).

    >>> form = ConfigForm(Config(num_blocks=64))
    >>> form.slot("eviction").choice.value = "lfu"
    >>> form.config.eviction, form.config.num_blocks
    (LFU(), 64)
    """

    def __init__(self, config: Config | None = None, *, slots: Sequence[str] = SLOTS) -> None:
        self._callbacks: list[Callable[[Config], None]] = []
        self._base = Config() if config is None else config
        self._quiet = True
        self.preset = ipw.Dropdown(
            options=[CUSTOM, DEFAULT, *PRESETS],
            value=CUSTOM if config is not None else DEFAULT,
            tooltip="start from the configuration that stands for a known system",
            layout=ipw.Layout(width="170px"),
        )
        self.preset.add_class("pl-preset")
        heading = ipw.Label("preset", layout=ipw.Layout(width="92px"))
        heading.add_class("pl-heading")
        self._model = ipw.Label()
        self._model.add_class("pl-note")
        top = ipw.HBox([heading, self.preset, self._model])
        top.add_class("pl-row")
        self._rows = {
            slot: _SlotRow(self._base.policy(slot), self._edited) for slot in SLOTS if slot in slots
        }
        self._sizes: dict[str, ipw.Widget] = {name: self._size_widget(name) for name in SIZES}
        sizes = ipw.HBox(list(self._sizes.values()))
        sizes.add_class("pl-sizes")
        self._message = ipw.HTML()
        self._message.add_class("pl-error")
        super().__init__([ipw.HTML(_STYLE), top, *self._rows.values(), sizes, self._message])
        self.children[0].layout.display = "none"
        self.add_class("pl-form")
        self._error: str | None = None
        self.preset.observe(self._preset_chosen, "value")
        self._show(self._base)
        self._quiet = False
        self._validate()
        _refresh_after_cells(self)

    def _size_widget(self, name: str) -> ipw.Widget:
        label, help_text = SIZES[name]
        common = {"description": label, "tooltip": help_text, "style": {"description_width": "initial"}}
        width = ipw.Layout(width=f"{68 + 7 * len(label)}px")
        control: ipw.Widget
        if name in _MAY_BE_EMPTY:
            control = ipw.Text(placeholder="auto", continuous_update=False, layout=width, **common)
        else:
            control = ipw.BoundedIntText(value=1, min=1, max=1 << 40, layout=width, **common)
        control.add_class(f"pl-size-{name}")
        control.observe(lambda change: self._edited(), "value")
        return control

    # ---- the configuration -------------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The configuration as the form stands. `ConfigError`, in one line, for one that cannot be."""
        values: dict[str, Any] = {slot: row.policy() for slot, row in self._rows.items()}
        for name, control in self._sizes.items():
            values[name] = control.value
        for name in _MAY_BE_EMPTY:
            text = values[name].strip()
            values[name] = None if text in ("", "auto") else int(text) if text.lstrip("-").isdigit() else text
        return self._base.replace(**values)

    @config.setter
    def config(self, config: Config) -> None:
        self.preset.unobserve(self._preset_chosen, "value")
        self.preset.value = CUSTOM
        self.preset.observe(self._preset_chosen, "value")
        self._load(config)

    @property
    def error(self) -> str | None:
        """The line that the form shows, or None if all is well."""
        return self._error

    def slot(self, name: str) -> _SlotRow:
        """Return the row of a slot: ``choice`` is its dropdown, ``control(parameter)`` a parameter's widget."""
        return self._rows[name]

    def size(self, name: str) -> ipw.Widget:
        """Return the control of a size."""
        return self._sizes[name]

    def on_change(self, callback: Callable[[Config], None]) -> None:
        """Call ``callback(config)`` whenever the form comes to stand for another valid configuration."""
        self._callbacks.append(callback)

    def refresh(self) -> None:
        """Offer the policies that are registered now (done by itself after each notebook cell)."""
        changed = [row.refresh() for row in self._rows.values()]
        if any(changed):
            self._validate()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _load(self, config: Config) -> None:
        self._base = config
        self._quiet = True
        try:
            self._show(config)
        finally:
            self._quiet = False
        self._validate()

    def _show(self, config: Config) -> None:
        for slot, row in self._rows.items():
            row.set(config.policy(slot))
        for name, control in self._sizes.items():
            value = getattr(config, name)
            control.value = ("" if value is None else str(value)) if name in _MAY_BE_EMPTY else value
        self._model.value = f"model {config.model}"

    def _preset_chosen(self, change: Any) -> None:
        name = change["new"]
        if name != CUSTOM:
            keep = {
                k: getattr(self._base, k)
                for k in ("model", "dtype", "device", "max_model_len", "seed", "num_threads")
            }
            keep |= {k: self._sizes[k].value for k in SIZES if k not in _MAY_BE_EMPTY}
            self._load(Config(**keep) if name == DEFAULT else Config.preset(name, **keep))

    def _edited(self) -> None:
        if self._quiet:
            return
        self.preset.unobserve(self._preset_chosen, "value")
        self.preset.value = CUSTOM
        self.preset.observe(self._preset_chosen, "value")
        self._validate()

    def _validate(self) -> None:
        try:
            config = self.config
        except Exception as error:  # a user's policy may raise anything; the form stays usable
            self._error = one_line(error)
            self._message.value = escape(self._error)
            return
        self._error = None
        self._message.value = ""
        for callback in self._callbacks:
            callback(config)


def one_line(error: BaseException) -> str:
    """Return an error as one line of text; the errors that pagedlab raises on purpose speak for themselves."""
    text = " ".join(str(error).split())
    if isinstance(error, PagedLabError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _refresh_after_cells(form: ConfigForm) -> None:
    """Refresh the form after each cell of a notebook, as long as it lives."""
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return
    alive = weakref.ref(form)

    def after_cell(result: object) -> None:
        form = alive()
        if form is None:
            with contextlib.suppress(ValueError):
                shell.events.unregister("post_run_cell", after_cell)
        else:
            form.refresh()

    shell.events.register("post_run_cell", after_cell)
