"""Work in this process, or in several: joblib's loky starts them, and each reads the work from a file once.

Policies are sent by value where the workers could not import them (notebook cells, scripts), and registered there under
the names that they have here. Workers do not outlive the sweep: the next one is to see the code as it is then.
"""

from __future__ import annotations

import pickle
import signal
import tempfile
import warnings
from collections.abc import Generator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pagedlab.errors import ConfigError, PagedLabError
from pagedlab.lab.sweep.work import Outcome, Work
from pagedlab.policies.base import Policy
from pagedlab.registry import _classes, register

_Registered = tuple[str, str, type[Policy]]
Outcomes = Generator[tuple[int, Outcome], None, None]


def here(work: Work, order: Sequence[int]) -> Outcomes:
    """Yield the number and outcome of each job, in this order."""
    for number in order:
        yield number, work.serve(number)


def in_processes(work: Work, order: Sequence[int], jobs: int) -> Outcomes:
    """Yield the number and outcome of each job as it is done by one of ``jobs`` processes, which begin in this order.

    Closing the generator, or an exception in it, ends the processes. Raises `ConfigError` if the work cannot be sent,
    `PagedLabError` if a process dies.
    """
    from cloudpickle import dumps
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import BrokenProcessPool

    registered = [(slot, name, cls) for slot, known in _classes.items() for name, cls in known.items()]
    try:
        parcel = dumps((registered, _annotations(registered, work), work))
    except Exception as error:
        raise ConfigError(
            f"this work cannot be sent to other processes ({type(error).__name__}: {error}); jobs=1 does it in this one"
        ) from error
    with tempfile.TemporaryDirectory(prefix="pagedlab-sweep-") as folder:
        file = Path(folder) / "work"
        file.write_bytes(parcel)
        del parcel
        outcomes: Any = None
        finished = False
        try:
            parallel = Parallel(
                n_jobs=jobs,
                backend="loky",
                return_as="generator_unordered",
                batch_size=1,
                initializer=_leave_interrupts_to_the_parent,
            )
            outcomes = parallel(delayed(_serve)(str(file), number) for number in order)
            yield from outcomes
            finished = True
        except BrokenProcessPool as error:
            raise PagedLabError(
                "a worker process died, perhaps for want of memory (fewer jobs need less); what was done is kept"
            ) from error
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # joblib warns of what is given up here on purpose
                if outcomes is not None:
                    outcomes.close()
                get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=not finished)


def _annotations(registered: list[_Registered], work: Work) -> list[tuple[type, dict[str, Any]]]:
    """Return what the annotations of scripts' policies mean: a worker has not imported what they are written with."""
    held = (value for job in work.jobs for value in (*vars(job.config).values(), *job.options.values()))
    known = {cls for _, _, cls in registered} | {type(value) for value in held if isinstance(value, Policy)}
    scripted = {base for policy in known for base in policy.__mro__ if base.__module__ == "__main__"}
    found = []
    for cls in scripted:
        try:
            resolved = get_type_hints(cls, include_extras=True)
        except Exception:
            continue  # what is wrong with it is said where it is used
        found.append((cls, {name: resolved[name] for name in vars(cls).get("__annotations__", {})}))
    return found


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches all processes of a terminal; who asked for the work ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _serve(file: str, number: int) -> tuple[int, Outcome]:
    return number, _read(file).serve(number)


@cache
def _read(file: str) -> Work:
    try:
        registered, annotations, work = pickle.loads(Path(file).read_bytes())
    except Exception as error:
        raise ConfigError(
            f"a worker process cannot read its work ({type(error).__name__}: {error}); jobs=1 does it in this process"
        ) from None
    for cls, resolved in annotations:
        cls.__annotations__ = resolved
    for slot, name, cls in registered:
        register(slot, name)(cls)
    assert isinstance(work, Work)
    return work
