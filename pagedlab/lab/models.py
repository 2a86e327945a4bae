"""Keeps models loaded between runs: configurations are compared without reading the weights again."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pagedlab.config import Config
from pagedlab.policies.kernel import Kernel
from pagedlab.policies.layout import Layout

if TYPE_CHECKING:
    from pagedlab.executors.model import ModelExecutor

ModelKey = tuple[str, str, str, int]
"""Model, dtype, and for a folder the time of its last change."""


@dataclass(slots=True)
class _Lease:
    """An executor with what it was built from."""

    key: ModelKey
    layout: Layout
    kernel: Kernel
    num_threads: int | None
    fast: bool
    executor: ModelExecutor

    def serves(self, config: Config, fast: bool) -> bool:
        """Whether the executor can be used as it is."""
        return (self.layout, self.kernel, self.num_threads, self.fast) == (
            config.policy("layout"),
            config.policy("kernel"),
            config.num_threads,
            fast,
        )


class ModelShelf:
    """Lends executors, one holder at a time, and keeps the last ``capacity`` that came back."""

    def __init__(self, capacity: int = 2) -> None:
        self.capacity = capacity
        self._idle: list[_Lease] = []
        self._lent: dict[int, _Lease] = {}

    def lease(self, config: Config, *, fast: bool = True) -> ModelExecutor:
        """Return an executor for ``config``: one that came back, one around a model that did, or a new one."""
        if "torch" not in sys.modules:
            # Threads that spin at every barrier starve each other where cores are shared: on two busy cores, two
            # of them served 25 tokens/s and two that sleep 1,200.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from pagedlab.executors.model import ModelExecutor

        key = _key(config)
        idle = [lease for lease in self._idle if lease.key == key]
        ready = [lease for lease in idle if lease.serves(config, fast)]
        if ready:
            lease = ready[-1]
            self._idle.remove(lease)
        else:
            layout, kernel = config.policy("layout"), config.policy("kernel")
            assert isinstance(layout, Layout)
            assert isinstance(kernel, Kernel)
            model, tokenizer = None, None
            if idle:
                self._idle.remove(idle[-1])
                model, tokenizer = idle[-1].executor.release(), idle[-1].executor.loaded.tokenizer
            executor = ModelExecutor(
                config.model if model is None else model,
                layout=layout.clone(),
                kernel=kernel.clone(),
                dtype=None if config.dtype == "auto" else config.dtype,
                device=config.device,
                num_threads=config.num_threads,
                tokenizer=tokenizer,
                fast=fast,
            )
            lease = _Lease(key, layout.clone(), kernel.clone(), config.num_threads, fast, executor)
        self._lent[id(lease.executor)] = lease
        return lease.executor

    def give_back(self, executor: ModelExecutor) -> None:
        """Take an executor back; its cache is given up, its model stays loaded."""
        lease = self._lent.pop(id(executor), None)
        if lease is None:
            return
        executor.prepare(num_blocks=1, block_size=1, host_blocks=0, max_num_seqs=1)
        self._idle.append(lease)
        del self._idle[: -self.capacity]

    def clear(self) -> None:
        """Forget every model that nobody holds."""
        self._idle.clear()


def _key(config: Config) -> ModelKey:
    folder = Path(config.model).expanduser()
    if config.model == "tiny" or not folder.is_dir():
        return config.model, config.dtype, config.device, 0
    changed = max((f.stat().st_mtime_ns for f in folder.iterdir()), default=0)
    return str(folder.resolve()), config.dtype, config.device, changed


SHELF = ModelShelf()
"""The process's own shelf, used by `run` and `start`."""
