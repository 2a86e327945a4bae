"""Grids of configurations: every combination of a few values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pagedlab.config import Config
from pagedlab.errors import ConfigError
from pagedlab.policies.base import Policy
from pagedlab.registry import check_slot


def expand(config: Config, axes: Mapping[str, Sequence[Any]]) -> dict[str, Config]:
    """Return one configuration for each combination, named after what differs.

    ``axes`` maps fields of a configuration to values; ``"swap.min_hits"`` is a parameter of the policy in that slot.

    >>> import pagedlab as pl
    >>> list(expand(pl.Config(), {"eviction": ["lru", "lfu"], "block_size": [8]}))
    ['eviction=lru block_size=8', 'eviction=lfu block_size=8']
    """
    for name, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"{name} needs a list of values to go through, not {values!r}")
    grid: dict[str, Config] = {}
    for chosen in itertools.product(*axes.values()):
        title = " ".join(f"{name}={_label(value)}" for name, value in zip(axes, chosen)) or "config"
        if title in grid:
            raise ConfigError(f"the combination {title!r} comes twice")
        grid[title] = with_values(config, dict(zip(axes, chosen)))
    return grid


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return ``config`` with fields (``"eviction"``) and parameters of policies (``"swap.min_hits"``) changed."""
    changed = config.replace(**{name: v for name, v in values.items() if "." not in name})
    for name, value in values.items():
        slot, dot, parameter = name.partition(".")
        if dot:
            policy = changed.policy(check_slot(slot)).clone(**{parameter: value})
            changed = changed.replace(**{slot: policy})
    return changed


def _label(value: Any) -> str:
    if isinstance(value, Policy):
        params = ",".join(f"{k}={v}" for k, v in value.get_params().items())
        name = value.name or type(value).__name__
        return f"{name}({params})" if params else name
    return str(value)


def differences(configs: Mapping[str, Config]) -> dict[str, dict[str, str]]:
    """Return, for each field in which the configurations differ, its value in each of them."""
    described = {name: config.describe() for name, config in configs.items()}
    fields = next(iter(described.values())) if described else {}
    found: dict[str, dict[str, str]] = {}
    for field in fields:
        values = {name: _shown(d[field]) for name, d in described.items()}
        if len(set(values.values())) > 1:
            found[field] = values
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        params = ", ".join(f"{k}={v}" for k, v in value["params"].items())
        return f"{value['name']}({params})" if params else str(value["name"])
    return str(value)
