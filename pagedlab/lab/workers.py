"""Work in this process, or in several: joblib's loky starts them, and each reads the work from a file once.

Policies are sent by value where the workers could not import them (notebook cells, scripts), and registered there under
the names that they have here. Workers do not outlive the work: the next ones are to see the code as it is then.
"""

from __future__ import annotations

import pickle
import signal
import tempfile
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar, get_type_hints

from pagedlab.errors import ConfigError, PagedLabError
from pagedlab.policies.base import Policy
from pagedlab.registry import _classes, register

_Registered = tuple[str, str, type[Policy]]
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Work(Protocol[T_co]):
    """Jobs by number, and what they share; it is sent to each process once."""

    def serve(self, number: int) -> T_co:
        """Work off one job. `KeyboardInterrupt` if somebody stopped it."""

    def policies(self) -> Iterable[Policy]:
        """Return the policy objects among what is sent: what their annotations mean is sent with them."""


def here(work: Work[T], order: Sequence[int]) -> Generator[tuple[int, T], None, None]:
    """Yield the number and outcome of each job, in this order."""
    for number in order:
        yield number, work.serve(number)


def in_processes(work: Work[T], order: Sequence[int], jobs: int) -> Generator[tuple[int, T], None, None]:
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
    with tempfile.TemporaryDirectory(prefix="pagedlab-work-") as folder:
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


def _annotations(registered: list[_Registered], work: Work[Any]) -> list[tuple[type, dict[str, Any]]]:
    """Return what the annotations of scripts' policies mean: a worker has not imported what they are written with."""
    known = {cls for _, _, cls in registered} | set(map(type, work.policies()))
    scripted = {base for policy in known for base in policy.__mro__ if base.__module__ == "__main__"}
    found = []
    for cls in scripted:
        try:
            resolved = get_type_hints(cls, include_extras=True)
        except Exception:
            continue  # what is wrong with it is said where it is used
        found.append((cls, {name: resolved[name] for name in vars(cls).get("__annotations__", {})}))
    return found


def cores() -> int:
    """Return the processor cores that this process may use."""
    from joblib import cpu_count

    return int(cpu_count())


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches all processes of a terminal; who asked for the work ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _serve(file: str, number: int) -> tuple[int, Any]:
    return number, _read(file).serve(number)


@cache
def _read(file: str) -> Work[Any]:
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
    return work  # type: ignore[no-any-return]


class Interrupts:
    """While it is entered, Ctrl-C raises `KeyboardInterrupt` where it is let in, and when it is pressed twice.

    Elsewhere it is remembered until it is. Only the main thread can take signals.
    """

    def __init__(self) -> None:
        self._mine = threading.current_thread() is threading.main_thread()
        self._asked = self._open = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if self._mine:
            self._before = signal.signal(signal.SIGINT, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler if self._before is None else self._before)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._open or self._asked:
            raise KeyboardInterrupt
        self._asked = True

    @contextmanager
    def let_in(self) -> Iterator[None]:
        """Let Ctrl-C in; one that was pressed before raises at once."""
        self._open = True
        try:
            if self._asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._open = False
