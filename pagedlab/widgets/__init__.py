"""Faces for JupyterLab: a form over the policies, a live run, a map of the blocks.

Imported on first use, so that ``import pagedlab`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedlab.widgets.blockmap import BlockMap
    from pagedlab.widgets.controls import ConfigForm
    from pagedlab.widgets.live import LiveRun

__all__ = ["BlockMap", "ConfigForm", "LiveRun"]

_HOMES = {"BlockMap": "blockmap", "ConfigForm": "controls", "LiveRun": "live"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
