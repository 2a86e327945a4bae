"""`compare`: several configurations on one workload, side by side."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedlab.config import Config
from pagedlab.errors import ConfigError, ResultsError, nearest
from pagedlab.lab import measures, page, session
from pagedlab.lab.environment import environment
from pagedlab.lab.grid import differences
from pagedlab.lab.job import WorkloadLike, as_workload
from pagedlab.lab.results import Run, same_tokens
from pagedlab.lab.simulate import simulate
from pagedlab.policies.prefetch import ENDS, FATES
from pagedlab.workloads import Workload

if TYPE_CHECKING:
    import pandas as pd

    from pagedlab.lab.plots import Figure

HOW = ("run", "simulate")

_COUNTS = ("hit_ratio", "preemptions", "recomputed_tokens", "swapped_out", "tier_faults", "mean_batch_size")
_MOVED = tuple(f"{what}_{link}" for what in ("blocks", "bytes") for link in measures.LINKS)
_PREFETCH = tuple(f"prefetch_{fate}" for fate in FATES)
_TIMES = tuple(f"{t}_{m}" for t in measures.TIMES for m in ("mean", "p50", "p90", "p95", "p99"))

_SHOWN: tuple[tuple[str, str, Callable[[Any], str] | None], ...] = (
    ("config", "configuration", None),
    ("requests", "requests", None),
    ("refused", "refused", None),
    ("tokens_per_s", "tokens/s", None),
    ("goodput_per_s", "goodput/s", None),
    ("goodput_share", "in time", page.percent),
    ("ttft_mean", "TTFT mean", page.seconds),
    ("ttft_p90", "TTFT p90", page.seconds),
    ("ttft_p99", "TTFT p99", page.seconds),
    ("tpot_mean", "TPOT mean", page.seconds),
    ("itl_p99", "ITL p99", page.seconds),
    ("latency_mean", "latency mean", page.seconds),
    ("queue_time_mean", "queueing mean", page.seconds),
    ("hit_ratio", "prefix hits", page.percent),
    ("preemptions", "preemptions", None),
    ("recomputed_tokens", "recomputed", None),
    ("blocks_to_host", "moved to host", None),
    ("blocks_to_device", "moved to device", None),
    ("blocks_copied", "copied on write", None),
    ("blocks_to_disk", "to disk", None),
    ("blocks_from_disk", "from disk", None),
    ("tier_faults", "disk faults", None),
    ("prefetch_done", "prefetched", None),
    *((f"prefetch_{fate}", f"… {fate}", None) for fate in ENDS),
    ("mean_batch_size", "mean batch", None),
    ("waste", "KV waste", page.percent),
    ("waste_bound", "bound", page.percent),
    *((f"{kind}_share", kind, page.percent) for kind in measures.MEMORY_KINDS),
)
"""Key of a row, heading, and how to write it. What is 0 or unknown everywhere is left out."""
_ALWAYS = ("config", "requests", "tokens_per_s", "goodput_per_s", "goodput_share", "hit_ratio")


class Comparison:
    """Runs of several configurations on one workload, by name, in the order given."""

    def __init__(
        self, runs: Mapping[str, Run], *, how: str = "run", slo: Mapping[str, float] | None = None
    ) -> None:
        if not runs:
            raise ConfigError("there is nothing to compare")
        self.runs = dict(runs)
        self.how = how
        self.slo = None if slo is None else _service_level(slo)
        """The service level that goodput is counted by, as `Run.goodput` takes it; None counts none."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per configuration, as `to_frame` shows them."""
        return [_row(name, r, self.slo) for name, r in self.runs.items()]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per configuration.

        Times are in seconds, with mean, p50, p90, p95 and p99 as in `Run.summary`, and so are blocks and bytes moved
        over each link, and blocks prefetched, by how that ended. With a service level there are ``goodput_per_s`` and
        ``goodput_share``: requests in time per second, and as a share of those finished. The memory shares
        ``stored_share`` … ``free_share`` add up to 1 and are averaged over the time in which requests waited, or over
        the whole run if none did. ``waste`` is the part of the memory held by running sequences that stores nothing
        over that same time, ``waste_bound`` what PagedAttention expects of it: (block_size - 1) / 2 tokens a sequence.
        """
        import pandas as pd

        return pd.DataFrame(self.rows).set_index("config")

    @property
    def same_output(self) -> bool:
        """True if every configuration said the same, token for token."""
        first, *others = self.runs.values()
        return all(same_tokens(first, other) for other in others)

    @property
    def interrupted(self) -> bool:
        """True if somebody stopped the comparison before its work was done."""
        return any(r.interrupted for r in self.runs.values())

    def plot(self) -> Figure:
        """Return bars of speed, latency, hits and memory."""
        from pagedlab.lab import plots

        return plots.of_comparison(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows of text, as terminals and pages show them: what is 0 everywhere is left out."""
        rows = self.rows
        shown = [
            (key, heading, write or page.number)
            for key, heading, write in _SHOWN
            if (key in _ALWAYS and key in rows[0]) or any(row.get(key) for row in rows)
        ]
        return [heading for _, heading, _ in shown], [
            [
                page.moved(row, key.removeprefix("blocks_")) if key in _MOVED else write(row[key])
                for key, _, write in shown
            ]
            for row in rows
        ]

    def verdict(self) -> str:
        """Return one sentence on whether the configurations said the same."""
        if self.how == "simulate":
            return "Simulated: the outputs' lengths are the workload's."
        return (
            "All configurations gave the same output, token for token."
            if self.same_output
            else "The configurations did not all give the same output."
        )

    def to_html(self, path: str | Path) -> Path:
        """Write a report that needs no other file: table, figures, differing settings, versions, hardware."""
        file = Path(path)
        workload = next(iter(self.runs.values())).facts["workload"]
        title = f"pagedlab: {workload['name']}, {len(self.runs)} configurations"
        images = [("Comparison", self.plot()), *((name, r.plot()) for name, r in self.runs.items())]
        sections = [
            f"<h1>{escape(title)}</h1><p>{escape(workload.get('description', ''))} {escape(self.verdict())}</p>",
            "<div class='wide'>" + page.table(*self.table()) + "</div>",
            "<h2>Where they differ</h2>" + self._differences(),
            *(f"<h2>{escape(name)}</h2>{_image(figure, name)}" for name, figure in images),
            "<h2>Measured with</h2>" + _environment_tables(next(iter(self.runs.values())).facts),
        ]
        text = _PAGE.format(title=escape(title), body="\n".join(sections))
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ResultsError(f"{file}: cannot be written: {error.strerror}") from None
        return file

    def _differences(self) -> str:
        found = differences({name: r.config for name, r in self.runs.items()})
        names = list(self.runs)
        return (
            page.table(["", *names], [[f, *(found[f][n] for n in names)] for f in found])
            if found
            else "<p>Nowhere.</p>"
        )

    def __repr__(self) -> str:
        return f"<comparison of {len(self.runs)} configurations: {', '.join(self.runs)}>"

    def _repr_html_(self) -> str:
        headings, rows = self.table()
        return f"<div>{page.table(headings, rows)}<p>{escape(self.verdict())}</p></div>"


def compare(
    configs: Mapping[str, Config],
    workload: WorkloadLike,
    how: str = "run",
    *,
    warm_up: bool = True,
    slo: Mapping[str, float] | None = None,
    **options: Any,
) -> Comparison:
    """Serve ``workload`` under each configuration and set the results side by side.

    ``how`` is ``"run"``, with the model, or ``"simulate"``; ``options`` are those of the function of that name.
    ``warm_up`` lets each configuration serve a few tokens first, so that compiling its
    kernel does not count. ``slo`` is a service level in seconds, ``{"ttft": 0.5, "tpot": 0.05}`` or one of them, by
    which goodput is counted. Ctrl-C ends the comparison with what is there. An ``executor`` serves every configuration.

    >>> import pagedlab as pl
    >>> from pagedlab.executors.stub import StubExecutor
    >>> grid = pl.expand(pl.Config(num_blocks=96), {"eviction": ["lru", "lfu"]})
    >>> pl.compare(grid, pl.workloads.chat(), executor=StubExecutor(), clock="step").same_output
    True
    """
    if how not in HOW:
        raise ConfigError(f"how must be one of {', '.join(HOW)}, not {how!r}")
    if not isinstance(configs, Mapping) or not configs:
        raise ConfigError("configs must map names to configurations: {'lru': cfg, ...}")
    if slo is not None:
        _service_level(slo)  # before the work, not after it
    given = as_workload(workload)
    if how == "simulate":
        return Comparison(_each(simulate, configs, given, options), how=how, slo=slo)
    if warm_up and options.get("executor") is None:
        for config in configs.values():
            session.warm_up(config, given, fast=options.get("fast", True))
    return Comparison(_each(session.run, configs, given, options), how=how, slo=slo)


def _each(
    serve: Callable[..., Run], configs: Mapping[str, Config], workload: Workload, options: dict[str, Any]
) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for name, config in configs.items():
        runs[name] = serve(config, workload, **options)
        if runs[name].interrupted:
            break
    return runs


def _service_level(slo: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(slo, Mapping):
        raise ConfigError(f"slo must map ttft, tpot or both to seconds, not {slo!r}")
    for name in slo:
        if name not in ("ttft", "tpot"):
            raise ConfigError(f"slo knows ttft and tpot, not {name!r}{nearest(str(name), ('ttft', 'tpot'))}")
    return measures.check_bounds(slo.get("ttft"), slo.get("tpot"))


def _row(name: str, run: Run, slo: dict[str, float] | None = None) -> dict[str, Any]:
    s = run.summary()
    columns = {t: run.arrays(t) for t in ("steps", "memory")}
    rows = measures.while_waiting(columns)
    block_size = int(run.description["block_size"])
    reached = None if slo is None else run.goodput(**slo)
    return {
        "config": name,
        **{k: s[k] for k in ("requests", "finished", "refused", "output_tokens", "duration", "tokens_per_s")},
        **({} if reached is None else {"goodput_per_s": reached.per_s, "goodput_share": reached.share}),
        **{k: s[k] for k in (*_TIMES, *_COUNTS, *_MOVED, *_PREFETCH)},
        **{f"{kind}_share": v for kind, v in measures.memory_shares(columns, rows).items()},
        "waste": measures.waste(columns, rows),
        "waste_bound": measures.half_block_bound(columns, block_size, rows),
        "averaged_over": "waiting" if np.any(columns["steps"]["waiting"]) else "all",
        "interrupted": run.interrupted,
        "kernel": s["kernel"],
        "layout": s["layout"],
        "dtype": s["dtype"],
    }


def _image(figure: Figure, name: str) -> str:
    data = base64.b64encode(figure.png()).decode()
    return f"<img alt='{escape(name, quote=True)}' src='data:image/png;base64,{data}'>"


def _environment_tables(facts: dict[str, Any]) -> str:
    both = facts if "versions" in facts else environment()
    return page.table(("", ""), [*both["versions"].items(), *both["hardware"].items()])


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-size: 13px }} td, th {{ border-bottom: 1px solid #ddd }}
.wide {{ overflow-x: auto }} img {{ max-width: 100% }}
</style></head><body>
{body}
</body></html>
"""
