"""`sweep`: many configurations, on all cores, in a file that it can go on with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagedlab.config import Config
from pagedlab.errors import ConfigError, nearest
from pagedlab.lab.bar import bar
from pagedlab.lab.compare import _service_level
from pagedlab.lab.sweep import files
from pagedlab.lab.sweep.axes import FUNCTIONS
from pagedlab.lab.sweep.book import Book
from pagedlab.lab.sweep.identity import described, described_config
from pagedlab.lab.sweep.points import Grid, lay_out
from pagedlab.lab.sweep.results import Sweep, load_sweep
from pagedlab.lab.sweep.work import Measure
from pagedlab.lab.workers import Interrupts, cores, here, in_processes

__all__ = ["Sweep", "load_sweep", "sweep"]


def sweep(
    config: Config,
    axes: Mapping[str, Any],
    workload: Any,
    how: str = "simulate",
    *,
    jobs: int | None = None,
    path: str | Path | None = None,
    resume: bool = True,
    progress: bool | None = None,
    slo: Mapping[str, float] | None = None,
    measures: Mapping[str, Measure] | None = None,
    **options: Any,
) -> Sweep:
    """Serve ``workload`` under every combination of the axes' values, and return a row of numbers for each.

    ``how`` is ``"simulate"``, ``"run"`` or ``"replay"``; ``options`` are those of the function of that name, for all
    points (no event log is kept unless ``events=True``). ``axes`` maps names to lists of values, or to mappings that
    give values names: fields of the configuration (``"eviction"``, ``"swap.min_hits"``), arguments of the function
    (``"hardware"``, ``"semantics"``), and of the workload ``"rate"`` (requests a second), ``"scale_rate"`` (a factor),
    ``"workload"`` (which of several, given as a mapping), and the parameters of its function, as ``"seed"``: then
    ``workload`` is that function (``pl.workloads.chat``) or its name. What is meant by a name that several have is
    said in `pagedlab.lab.sweep.axes`.

    Measures are those of `compare`, with ``slo`` as there (``{"ttft": 0.5, "tpot": 0.05}`` in seconds adds goodput), or
    of `replay`. ``measures`` adds columns: functions of each `Run` or `Replay` by name, such as
    ``{"steps": lambda run: len(run.steps)}``.

    ``jobs`` processes share the points; None takes as many as there are cores, but one for ``"run"``, whose model uses
    all cores itself. With 1 everything happens in this process. Policies and functions of a notebook or a script are
    sent by value. The rows are the same whatever ``jobs`` is, but for ``seconds``.

    ``path`` (.parquet or .json) is written as points are done, and complete at any time. If it is there, points that
    are in it are not done again (unless they failed, or ``resume`` is False). A point is known by a digest of its
    configuration, options, workload, and the code of policies and measures that are not pagedlab's own; other points
    of the file are kept in it. A file of another workload, or that holds no sweep, is refused and left alone.

    A point that fails is a row with its ``error``, and the others go on. Ctrl-C keeps what is done, and ``interrupted``
    is True. ``progress``: a bar; None shows one where somebody can see it.

    Raises `ConfigError` for an axis or option that does not exist, or a value that never makes a configuration;
    `ResultsError` for the file; `PagedLabError` if a process dies.

    >>> import pagedlab as pl
    >>> grid = {"eviction": ["lru", "lfu"], "rate": [4, 16]}
    >>> done = pl.sweep(pl.Config(num_blocks=64), grid, pl.workloads.chat, jobs=1)
    >>> len(done.rows), done.best("ttft_mean")["rate"]
    (4, 4)
    """
    if how not in FUNCTIONS:
        raise ConfigError(
            f"how must be one of {', '.join(FUNCTIONS)}, not {how!r}{nearest(str(how), FUNCTIONS)}"
        )
    if not isinstance(config, Config):
        raise ConfigError(f"config must be a pagedlab.Config, not {config!r}")
    if not isinstance(axes, Mapping):
        raise ConfigError("axes must map names to lists of values: {'eviction': ['lru', 'lfu'], ...}")
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise ConfigError(f"jobs must be a whole number of at least 1, or None for all cores, not {jobs!r}")
    file = None if path is None else files.check_path(path)
    if slo is not None and how == "replay":
        raise ConfigError("slo is for simulate and run: a replay has no times")
    level = None if slo is None else _service_level(slo)
    grid = lay_out(config, axes, workload, how, options, measures or {}, level)
    book = Book(grid, how, file, resume)
    book.facts |= {"options": described(options), "config": described_config(config), "slo": level}
    todo = sorted(book.todo, key=lambda n: grid.work.jobs[_job(grid, n)].variant)
    if not todo:
        if book.unwritten:
            book.write(interrupted=False)
        return book.sweep(interrupted=False)
    order = {_job(grid, n): n for n in todo}
    jobs = min(cores() if jobs is None and how != "run" else jobs or 1, len(todo))
    book.write(interrupted=True)
    outcomes = in_processes(grid.work, list(order), jobs) if jobs > 1 else here(grid.work, list(order))
    watch = bar(progress, len(todo), " points")
    interrupted = False
    try:
        with Interrupts() as interrupts:
            try:
                while True:
                    with interrupts.let_in():
                        job, outcome = next(outcomes, (None, None))
                    if job is None or outcome is None:
                        break
                    book.add(order[job], outcome)
                    if watch is not None:
                        watch.update(1)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                outcomes.close()
                if watch is not None:
                    watch.close()
    finally:
        book.write(interrupted=interrupted or bool(book.todo))
    return book.sweep(interrupted=interrupted)


def _job(grid: Grid, number: int) -> int:
    job = grid.points[number].job
    assert job is not None
    return job
