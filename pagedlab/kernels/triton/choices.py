"""Launches that were measured to be the fastest, kept in a file that processes share.

::

    {"pagedlab launches": {"triton 3.9.0, kernels 41c2a5d09be7": {
        "device=NVIDIA H200 kernel=decode ...": {"launch": {"rows": 16, "tile": 64, ...}, "gain": 1.08}}}}

``PAGEDLAB_TUNING`` names the file, else it is ``triton-launches.json`` in pagedlab's folder for caches; ``off`` does
without any choice. It is written anew under a lock, and replaced whole. The first process that measures a case decides:
who comes later with another result takes the one that is there. Whatever is wrong with the file costs a warning and a
measurement, and never a run; a file that is something else is moved aside (``.old``) before one is written.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pagedlab.folders import cache_folder
from pagedlab.kernels.triton.shapes import Launch

TITLE = "pagedlab launches"
FILE = "triton-launches.json"


class Choice(NamedTuple):
    """A launch, and how many times as fast as the rule it was."""

    launch: Launch
    gain: float = 1.0


class Choices:
    """The choices under one ``stamp`` (what they hold for: versions of Triton and of the kernels), by case.

    Read once, when first asked; without a ``path`` they live in memory. `get` and `add` know only ``launches`` that can
    be taken, so no file can name one that does not work.
    """

    def __init__(self, path: Path | None, stamp: str) -> None:
        self._path, self._stamp = path, stamp
        self._known: dict[str, Choice] | None = None

    def __len__(self) -> int:
        return len(self._read())

    def get(self, case: str, launches: Sequence[Launch]) -> Choice | None:
        """Return what was chosen, or None."""
        found = self._read().get(case)
        if found is None or found.launch in launches:
            return found and found._replace(launch=launches[launches.index(found.launch)])
        warnings.warn(f"{self._path}: {found.launch} is no launch for {case}; it is ignored", stacklevel=2)
        return None

    def add(self, case: str, launches: Sequence[Launch], choice: Choice) -> Choice:
        """Keep ``choice``, unless another process was first; return the one that counts."""
        known = self._read()
        known[case] = choice
        if self._path is not None:
            try:
                known[case] = self._agree(self._path, case, launches, choice)
            except OSError as error:
                warnings.warn(f"{self._path}: launches cannot be kept there: {error}", stacklevel=2)
        return self.get(case, launches) or choice

    def _agree(self, path: Path, case: str, launches: Sequence[Launch], choice: Choice) -> Choice:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            whole = _load(path)
            if whole is None:
                os.replace(path, f"{path}.old")
                whole = {}
            there = whole.setdefault(self._stamp, {})
            if case not in there or there[case].launch not in launches:
                there[case] = choice
                _store(path, whole)
            return there[case]

    def _read(self) -> dict[str, Choice]:
        if self._known is None:
            self._known = {}
            try:
                whole = _load(self._path) if self._path is not None else {}
            except OSError as error:
                warnings.warn(f"{self._path}: launches cannot be read: {error}", stacklevel=2)
                whole = {}
            if whole is None:
                warnings.warn(f"{self._path} is no file of launches; it is ignored", stacklevel=2)
            self._known = (whole or {}).get(self._stamp, {})
        return self._known


def choices_of_process(stamp: str) -> Choices | None:
    """Return the choices that all kernels of this process share; None if `PAGEDLAB_TUNING` says ``off``."""
    named = os.environ.get("PAGEDLAB_TUNING", "")
    if named.lower() == "off":
        return None
    return _shared(Path(named).expanduser() if named else cache_folder() / FILE, stamp)


_shared = functools.cache(Choices)


def _load(path: Path) -> dict[str, dict[str, Choice]] | None:
    """Return the choices by stamp and case, none if there is no file, or None if it is something else."""
    try:
        return {
            str(stamp): {
                str(case): Choice(Launch(**one["launch"]), float(one["gain"])) for case, one in cases.items()
            }
            for stamp, cases in json.loads(path.read_bytes())[TITLE].items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _store(path: Path, whole: dict[str, dict[str, Choice]]) -> None:
    plain = {
        stamp: {
            case: {"launch": one.launch._asdict(), "gain": round(one.gain, 3)} for case, one in cases.items()
        }
        for stamp, cases in whole.items()
    }
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({TITLE: plain}, file, indent=1)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing; the lock goes with the process that holds it."""
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
