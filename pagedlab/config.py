"""A configuration: one policy per slot, the sizes of the pool, and nothing that is not data.

>>> import pagedlab as pl
>>> cfg = pl.Config(eviction="lfu", num_blocks=128)
>>> pl.Config.from_json(cfg.to_json()) == cfg
True
>>> cfg.replace(lookup="none").lookup
NoLookup()
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pagedlab.errors import ConfigError, nearest
from pagedlab.policies.base import Policy
from pagedlab.policies.block import DISK, HOST
from pagedlab.policies.bounds import refuse_future
from pagedlab.registry import SLOTS, is_registered, make

if TYPE_CHECKING:
    from pagedlab.policies import (
        Allocator,
        Eviction,
        Kernel,
        Layout,
        Lookup,
        Preemption,
        Prefetch,
        Reservation,
        Scheduler,
        Swap,
    )

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class Policies(NamedTuple):
    """One policy for each of the ten decisions."""

    allocator: Allocator
    reservation: Reservation
    lookup: Lookup
    eviction: Eviction
    swap: Swap
    preemption: Preemption
    prefetch: Prefetch
    scheduler: Scheduler
    layout: Layout
    kernel: Kernel


@dataclass(kw_only=True)
class Config:
    """What a run needs to know. A slot takes a registered name or a policy object; both are checked at
    once.
    """

    model: str = "tiny"
    """``"tiny"``, a local folder, or a hub name."""
    dtype: str = "auto"
    """Type of weights and cache; ``"auto"`` takes the model's own."""
    device: str = "cpu"
    """Where model and cache lie in a run: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``."""

    allocator: str | Policy = "free-list"
    reservation: str | Policy = "on-demand"
    lookup: str | Policy = "chained-hash"
    eviction: str | Policy = "lru"
    swap: str | Policy = "drop"
    preemption: str | Policy = "recompute"
    prefetch: str | Policy = "none"
    scheduler: str | Policy = "chunked-prefill"
    layout: str | Policy = "padded"
    kernel: str | Policy = "auto"

    num_blocks: int = 256
    """Blocks of the device tier."""
    block_size: int = 16
    """Tokens a block."""
    host_blocks: int | None = None
    """Blocks of the host tier; None: as many as the device has if a policy uses the host, else none."""
    disk_blocks: int | None = None
    """Blocks of the disk tier, below the host's; None: four times the host's if the swap policy uses a disk. Without
    such a policy there is no disk tier."""
    disk_path: str | None = None
    """Folder for the disk tier's file; None: where temporary files go. A simulation has none."""
    max_num_seqs: int = 16
    """Sequences that may run at once."""
    max_num_batched_tokens: int = 512
    """Tokens computed in one step at most (a prompt that may not be cut can exceed it, alone)."""
    max_model_len: int | None = None
    """Longest sequence in tokens; None: what the model allows."""
    watermark: float = 0.0
    """Share of the pool kept free when a request is admitted beside others."""
    null_block: bool = False
    """Never hand out block 0 (vLLM's null block)."""
    async_scheduling: bool = False
    """Plan each step while the one before it runs (vLLM's default): arrivals are seen a step later, and the seats and
    blocks of who ends come free a step later."""
    wait_for_prefix: bool = False
    """Hold a request back while the next block of its prefix is being computed for another one, so that requests that
    come together share what they have in common."""
    prefetch_budget: int = 64
    """Blocks that prefetch may have under way at once (on a real machine: in one step)."""
    seed: int = 0
    """Seed of requests that bring none."""
    num_threads: int | None = None
    """Threads of the model and the kernel; None: leave as they are."""

    def __post_init__(self) -> None:
        for slot in SLOTS:
            given = getattr(self, slot)
            if isinstance(given, str):
                setattr(self, slot, make(slot, given))
            elif isinstance(given, type) and issubclass(given, Policy):
                setattr(self, slot, given())
            elif not isinstance(given, Policy):
                raise ConfigError(f"{slot} must be a policy or its name, not {given!r}")
            if (policy := getattr(self, slot)).slot != slot:
                raise ConfigError(f"{slot}={policy!r} is a policy for slot {policy.slot!r}")
        self._check_sizes()

    def _check_sizes(self) -> None:
        for name, low in (
            ("num_blocks", 1),
            ("block_size", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("prefetch_budget", 1),
            ("seed", 0),
        ):
            _whole(name, getattr(self, name), low)
        for name, low in (("host_blocks", 0), ("disk_blocks", 0), ("max_model_len", 1), ("num_threads", 1)):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), low)
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must be a name or a folder, not {self.model!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype {self.dtype!r} is unknown; known: {', '.join(DTYPES)}{nearest(str(self.dtype), DTYPES)}"
            )
        if not isinstance(self.device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device {self.device!r} is unknown; allowed: cpu, cuda, cuda:0, cuda:1, ...")
        if (
            isinstance(self.watermark, bool)
            or not isinstance(self.watermark, int | float)
            or not 0 <= self.watermark < 1
        ):
            raise ConfigError(f"watermark must be a share from 0 to below 1, not {self.watermark!r}")
        for name in ("null_block", "async_scheduling", "wait_for_prefix"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.null_block and self.num_blocks < 2:
            raise ConfigError("null_block takes one block, so num_blocks must be at least 2")
        policies = self.policies()
        swap, allocator = policies.swap, policies.allocator
        if policies.eviction.reserves and allocator.contiguous:
            raise ConfigError(
                f"eviction={self.policy('eviction')!r} keeps blocks out of others' reach, so "
                f"allocator={allocator.name or type(allocator).__name__!r} could wait for a run of blocks for ever; "
                "allowed: an allocator of single blocks, like free-list or fifo"
            )
        if self.host_blocks == 0 and swap.uses_host:
            raise ConfigError(f"swap={swap.name!r} needs a host tier: host_blocks must be at least 1")
        if self.disk_blocks == 0 and swap.uses_disk:
            raise ConfigError(f"swap={swap.name!r} needs a disk tier: disk_blocks must be at least 1")
        if self.disk_path is not None and (not isinstance(self.disk_path, str) or not self.disk_path):
            raise ConfigError(f"disk_path must be a folder or None, not {self.disk_path!r}")
        refuse_future(make("eviction", swap.tier_eviction(tier)) for tier in (HOST, DISK))

    def policy(self, slot: str) -> Policy:
        """Return the policy object of a slot, as configured (runs work on clones)."""
        policy = getattr(self, slot)
        assert isinstance(policy, Policy)
        return policy

    def policies(self) -> Policies:
        """Return fresh clones of all ten, for one run."""
        return Policies(**{slot: self.policy(slot).clone() for slot in SLOTS})  # type: ignore[arg-type]

    @property
    def num_host_blocks(self) -> int:
        """Blocks of the host tier once None is resolved."""
        if self.host_blocks is not None:
            return self.host_blocks
        policies = self.policies()
        return self.num_blocks if policies.swap.uses_host or policies.preemption.wants_host else 0

    @property
    def num_disk_blocks(self) -> int:
        """Blocks of the disk tier: 0 unless the swap policy uses one."""
        if not self.policies().swap.uses_disk:
            return 0
        return 4 * self.num_host_blocks if self.disk_blocks is None else self.disk_blocks

    @property
    def watermark_blocks(self) -> int:
        """Blocks that the watermark keeps free."""
        return math.ceil(self.watermark * self.num_blocks)

    def replace(self, **override: Any) -> Self:
        """Return a copy with some fields changed.

        Raises `ConfigError` for a field that does not exist, with the nearest names.
        """
        known = [f.name for f in fields(self)]
        for key in override:
            if key not in known:
                raise ConfigError(
                    f"a config has no field {key!r}; it has: {', '.join(known)}{nearest(key, known)}"
                )
        values = {name: getattr(self, name) for name in known}
        return type(self)(**{**values, **override})

    @classmethod
    def preset(cls, name: str, **override: Any) -> Self:
        """Return the configuration that stands for a known system: see `PRESETS`."""
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; known: {', '.join(PRESETS)}{nearest(name, PRESETS)}")
        return cls().replace(**{**PRESETS[name], **override})

    # ---- as data -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data. `ConfigError` if a policy is not registered: a file can only name it."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Policy):
                if not is_registered(value):
                    raise ConfigError(
                        f"{f.name}={value!r} is not registered, so a file cannot name it; "
                        f"decorate its class with @pagedlab.register({f.name!r}, 'a-name')"
                    )
                value = {"name": value.name, "params": value.get_params()}
            out[f.name] = value
        return out

    def describe(self) -> dict[str, Any]:
        """Return what differs from a file only in naming unregistered policies by their class, for
        display.
        """
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Policy):
                value = {
                    "name": value.name or type(value).__name__,
                    "params": value.get_params(),
                    "registered": is_registered(value),
                }
            out[f.name] = value
        return out

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the configuration as JSON, and write it to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: Any, where: str = "config") -> Self:
        """Build from plain data: names of registered policies and sizes, nothing else."""
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: a config is a JSON object, not {type(data).__name__}")
        values: dict[str, Any] = {}
        try:
            for key, value in data.items():
                values[key] = _named(key, value) if key in SLOTS and isinstance(value, dict) else value
            return cls().replace(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Read JSON text, or a file. `ConfigError` names the file, and the line of a syntax error."""
        where, text = "config", str(source)
        if isinstance(source, Path) or not text.lstrip().startswith("{"):
            where = str(source)
            try:
                text = Path(source).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not a text file"
                raise ConfigError(
                    f"{where}: {reason}; expected a JSON config, or a preset: {', '.join(PRESETS)}"
                ) from None
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}:{error.lineno}: not valid JSON: {error.msg}") from None
        except (RecursionError, ValueError) as error:
            raise ConfigError(f"{where}: not a config: {error}") from None
        return cls.from_dict(data, where)

    @classmethod
    def load(cls, name_or_path: str) -> Self:
        """Return a preset by name, or else read a file."""
        return cls.preset(name_or_path) if name_or_path in PRESETS else cls.from_json(Path(name_or_path))

    def _repr_html_(self) -> str:
        from html import escape

        left = "style='text-align:left'"
        rows = "".join(
            f"<tr><th {left}>{slot}</th><td {left}>{escape(repr(self.policy(slot)))}</td></tr>"
            for slot in SLOTS
        )
        sizes = f"{self.num_blocks} blocks of {self.block_size} tokens, at most {self.max_num_seqs} sequences"
        return f"<table><caption>{escape(self.model)}: {sizes}</caption>{rows}</table>"


def _named(slot: str, value: dict[str, Any]) -> Policy:
    """Build the policy that a file names."""
    unknown = set(value) - {"name", "params", "registered"}
    if unknown or not isinstance(value.get("name"), str) or not isinstance(value.get("params", {}), dict):
        raise ConfigError(f'{slot} must be a name or {{"name": ..., "params": {{...}}}}')
    return make(slot, value["name"], **value.get("params", {}))


def _whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be a whole number of at least {low}, not {value!r}")


_CONTIGUOUS = {"allocator": "first-fit", "lookup": "none", "scheduler": "iteration-level"}

PRESETS: dict[str, dict[str, Any]] = {
    "vllm": {"allocator": "fifo", "null_block": True},
    "vllm-v0": {
        "lookup": "none",
        "reservation": "full-prompt",
        "scheduler": "prefill-first",
        "watermark": 0.01,
    },
    "sglang": {"lookup": "radix"},
    "orca-max": {**_CONTIGUOUS, "reservation": "max"},
    "orca-pow2": {**_CONTIGUOUS, "reservation": "pow2"},
    "orca-oracle": {**_CONTIGUOUS, "reservation": "oracle"},
    "fastertransformer": {**_CONTIGUOUS, "reservation": "max", "scheduler": "static-batch"},
    "hf-static": {
        **_CONTIGUOUS,
        "reservation": "oracle",
        "scheduler": "static-batch",
        "kernel": "gather-sdpa",
    },
}
"""Known systems as differences from the default configuration, which is PagedAttention with prefix
caching."""
