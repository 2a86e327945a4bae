"""pagedlab: a laboratory for the KV cache of large language models.

>>> import pagedlab as pl
>>> pl.Config(eviction="lfu").eviction
LFU()

Names are loaded when they are first asked for, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedlab import policies as policies
    from pagedlab import testing as testing
    from pagedlab import workloads as workloads
    from pagedlab.config import PRESETS as PRESETS
    from pagedlab.config import Config as Config
    from pagedlab.engine.request import Hints as Hints
    from pagedlab.engine.request import Request as Request
    from pagedlab.engine.request import SamplingParams as SamplingParams
    from pagedlab.errors import ConfigError as ConfigError
    from pagedlab.errors import InvariantBroken as InvariantBroken
    from pagedlab.errors import LawBroken as LawBroken
    from pagedlab.errors import ModelNotServed as ModelNotServed
    from pagedlab.errors import PagedLabError as PagedLabError
    from pagedlab.errors import PolicyError as PolicyError
    from pagedlab.errors import RequestTooLarge as RequestTooLarge
    from pagedlab.errors import ResultsError as ResultsError
    from pagedlab.errors import WorkloadError as WorkloadError
    from pagedlab.events import EventLog as EventLog
    from pagedlab.lab.compare import Comparison as Comparison
    from pagedlab.lab.compare import compare as compare
    from pagedlab.lab.grid import expand as expand
    from pagedlab.lab.live import Live as Live
    from pagedlab.lab.live import start as start
    from pagedlab.lab.replay import replay as replay
    from pagedlab.lab.replayed import MissRatioCurve as MissRatioCurve
    from pagedlab.lab.replayed import Replay as Replay
    from pagedlab.lab.results import Run as Run
    from pagedlab.lab.saved import load_run as load_run
    from pagedlab.lab.session import run as run
    from pagedlab.lab.simulate import simulate as simulate
    from pagedlab.lab.sweep import Sweep as Sweep
    from pagedlab.lab.sweep import load_sweep as load_sweep
    from pagedlab.lab.sweep import sweep as sweep
    from pagedlab.registry import list_policies as list_policies
    from pagedlab.registry import make as make
    from pagedlab.registry import register as register
    from pagedlab.testing.check import check_policy as check_policy
    from pagedlab.workloads import Workload as Workload

__version__ = "0.1.0"

_HOME = {
    "Comparison": "pagedlab.lab.compare",
    "Config": "pagedlab.config",
    "ConfigError": "pagedlab.errors",
    "EventLog": "pagedlab.events",
    "Hints": "pagedlab.engine.request",
    "InvariantBroken": "pagedlab.errors",
    "LawBroken": "pagedlab.errors",
    "Live": "pagedlab.lab.live",
    "MissRatioCurve": "pagedlab.lab.replayed",
    "ModelNotServed": "pagedlab.errors",
    "PRESETS": "pagedlab.config",
    "PagedLabError": "pagedlab.errors",
    "PolicyError": "pagedlab.errors",
    "Replay": "pagedlab.lab.replayed",
    "Request": "pagedlab.engine.request",
    "RequestTooLarge": "pagedlab.errors",
    "ResultsError": "pagedlab.errors",
    "Run": "pagedlab.lab.results",
    "SamplingParams": "pagedlab.engine.request",
    "Sweep": "pagedlab.lab.sweep",
    "Workload": "pagedlab.workloads",
    "WorkloadError": "pagedlab.errors",
    "check_policy": "pagedlab.testing.check",
    "compare": "pagedlab.lab.compare",
    "expand": "pagedlab.lab.grid",
    "list_policies": "pagedlab.registry",
    "load_run": "pagedlab.lab.saved",
    "load_sweep": "pagedlab.lab.sweep",
    "make": "pagedlab.registry",
    "register": "pagedlab.registry",
    "replay": "pagedlab.lab.replay",
    "run": "pagedlab.lab.session",
    "simulate": "pagedlab.lab.simulate",
    "start": "pagedlab.lab.live",
    "sweep": "pagedlab.lab.sweep",
}
_MODULES = ("policies", "workloads", "errors", "widgets", "testing")

__all__ = sorted([*_HOME, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(f"pagedlab.{name}")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'pagedlab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
