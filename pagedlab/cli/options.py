"""Options that commands share, and the configurations they describe. What is wrong with one raises `ConfigError`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pagedlab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pagedlab.config import Config

GENERATE_BLOCKS = 512
"""Blocks of `generate`'s pool, unless told otherwise: room for a few sequences of 2,048 tokens."""


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a policy (eviction=lfu), one of its parameters "
                 "(swap.min_hits=2) or a size (num_blocks=64). May be repeated."),
]  # fmt: skip
NumBlocks = Annotated[int | None, typer.Option(help="Blocks of the device pool.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per block.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens [default: what model and pool allow].")
]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Sequences that may run at once.")]


def whole_number(text: str, option: str) -> int:
    """Return one of an option's numbers; `ConfigError` names the option."""
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers, as in 5000,10000, not {text!r}") from None


def config_of(
    name: str | None, *, model: str | None, sizes: dict[str, int | None], default_blocks: int | None = None
) -> Config:
    """Return the preset or file ``name`` (None: the defaults) with the sizes that are not None.

    ``default_blocks`` is the pool of a configuration that no file gives a pool to.
    """
    from pagedlab.config import PRESETS, Config

    if name is not None and name not in PRESETS and not Path(name).exists() and Path(name).suffix != ".json":
        raise ConfigError(
            f"no preset or file {name!r}; presets: {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        )
    cfg = Config() if name is None else Config.load(name)
    override: dict[str, Any] = {k: v for k, v in sizes.items() if v is not None}
    if default_blocks is not None and (name is None or name in PRESETS):
        override.setdefault("num_blocks", default_blocks)
    if model is not None:
        override["model"] = model
    return cfg.replace(**override)


def within_pool(cfg: Config) -> Config:
    """Return ``cfg`` with the longest sequence that its pool has room for, unless it says one itself.

    No sequence can be longer than the pool, and saying so keeps reservations of the longest one possible.
    """
    if cfg.max_model_len is not None:
        return cfg
    return cfg.replace(max_model_len=max((cfg.num_blocks - cfg.null_block) * cfg.block_size, 1))


def grid(
    preset: str | None,
    config: str | None,
    model: str | None,
    sizes: dict[str, int | None],
    settings: list[str] | None,
) -> dict[str, Config]:
    """Return every combination of presets (or one configuration) and the values of ``settings``, by name."""
    from pagedlab.lab.grid import expand

    if preset is not None and config is not None:
        raise ConfigError("--preset and --config exclude each other")
    axes = listed(settings)
    names = [None] if preset is None else [p.strip() for p in preset.split(",")]
    configs: dict[str, Config] = {}
    for base in names:
        for title, cfg in expand(config_of(base or config, model=model, sizes=sizes), axes).items():
            full = " ".join(filter(None, (base, title if axes else ""))) or config or "default"
            if full in configs:
                raise ConfigError(f"{full!r} comes twice")
            configs[full] = within_pool(cfg)
    return configs


def listed(settings: list[str] | None) -> dict[str, list[Any]]:
    """Return the values that each ``--set FIELD=A,B,...`` lists."""
    return {
        name: [_value(name, v) for v in text.split(",")] for name, text in map(_assignment, settings or ())
    }


def with_set(cfg: Config, settings: list[str] | None) -> Config:
    """Return ``cfg`` with what ``--set FIELD=VALUE`` changes."""
    from pagedlab.lab.grid import with_values

    return with_values(cfg, {name: _value(name, text) for name, text in map(_assignment, settings or ())})


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ConfigError(f"--set takes FIELD=VALUE, as in eviction=lru, not {text!r}")
    return name.strip(), value.strip()


def _value(name: str, text: str) -> Any:
    """Return a policy's name as it stands, and numbers, true, false and null as what they mean."""
    from pagedlab.registry import SLOTS

    text = text.strip()
    if name in SLOTS:
        return text
    try:
        value = json_module.loads(text)
    except json_module.JSONDecodeError:
        return text
    return value if isinstance(value, bool | int | float | None) else text


def service_level(settings: list[str] | None) -> dict[str, float] | None:
    """Return what ``--slo ttft=SECONDS --slo tpot=SECONDS`` ask for; None if nothing."""
    level: dict[str, float] = {}
    for text in settings or ():
        name, _, value = text.partition("=")
        try:
            level[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f"--slo takes ttft=SECONDS or tpot=SECONDS, as in ttft=0.5, not {text!r}"
            ) from None
    return level or None


def read_cost(path: str) -> Any:
    """Return the cost model that ``pagedlab calibrate --out`` wrote."""
    from pagedlab.costs import Calibrated

    try:
        return Calibrated.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"{path}: {reason}; expected what pagedlab calibrate --out writes") from None
