"""Published traces on this machine: where they lie, and fetching them from their authors' repositories.

Nothing is fetched unless a person asks for it. A file is looked for in the folder that the environment variable
PAGEDLAB_DATA names, then in the download cache (PAGEDLAB_CACHE, or the system's folder for caches).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pagedlab.errors import WorkloadError, nearest
from pagedlab.folders import cache_folder
from pagedlab.workloads.catalogue import DATASETS, Dataset

_TIMEOUT = 30
"""Seconds without a byte before a download is given up."""
_VLLM = "vllm:"


@dataclass(frozen=True)
class Catalogue:
    """What can be fetched, and from where: an address is ``base``/repository/commit/path."""

    datasets: tuple[Dataset, ...]
    base: str = "https://raw.githubusercontent.com"

    def __getitem__(self, name: str) -> Dataset:
        for dataset in self.datasets:
            if dataset.name == name:
                return dataset
        known = [d.name for d in self.datasets]
        raise WorkloadError(f"no data set {name!r}; known: {', '.join(known)}{nearest(name, known)}")

    def url(self, dataset: Dataset, path: str) -> str:
        """Return the address of one of its files."""
        return f"{self.base}/{dataset.repository}/{dataset.commit}/{path}"


CATALOGUE = Catalogue(DATASETS)


class Found(NamedTuple):
    """A trace on this machine."""

    path: Path
    format: str


def data_folder() -> Path | None:
    """Return the folder that PAGEDLAB_DATA names, else ``../shared/data``, if it is there."""
    given = Path(os.environ.get("PAGEDLAB_DATA") or Path("..", "shared", "data"))
    return given if given.is_dir() else None


def find(name: str) -> Found | None:
    """Return where the trace of that name lies; None if it is not the name of one.

    Raises `WorkloadError` for a trace that is known and not here; the message says how to fetch it.
    """
    if name.startswith(_VLLM):
        runs = _vllm_runs()
        if name in runs:
            return Found(runs[name], "vllm")
        known = ", ".join(runs) or "none; PAGEDLAB_DATA must name a folder with vllm_runs in it"
        raise WorkloadError(f"no measurement {name!r}; known: {known}{nearest(name, runs)}")
    dataset = next((d for d in CATALOGUE.datasets if d.name == name), None)
    if dataset is None:
        return None
    if (path := _where(dataset)) is not None:
        return Found(path, dataset.format)
    if dataset.commit is None:
        raise WorkloadError(
            f"the trace {name!r} is not here and cannot be fetched; put {dataset.local} from {dataset.source} into "
            "the folder that PAGEDLAB_DATA names"
        )
    raise WorkloadError(f"the trace {name!r} is not here; fetch it with: pagedlab data fetch {name}")


def names() -> list[str]:
    """Return the names of all traces that are known, here or not."""
    return [d.name for d in CATALOGUE.datasets] + list(_vllm_runs())


def list_data() -> list[dict[str, Any]]:
    """One row per trace: ``name``, ``here``, ``where``, ``size`` (bytes), ``licence``, ``source``, ``summary``.

    ``where`` and ``size`` are None for what is not on this machine; ``fetch`` says whether it could be fetched, and
    ``format`` which reader reads it.
    """
    rows = []
    for d in CATALOGUE.datasets:
        path = _where(d)
        rows.append(_row(d.name, path, d.format, d.licence, d.source, d.summary, d.commit is not None))
    for name, path in _vllm_runs().items():
        source = "https://github.com/casys-kaist/LLMServingSim"
        rows.append(_row(name, path, "vllm", "MIT", source, "A measured run of vLLM.", False))
    return rows


def _row(
    name: str, path: Path | None, format: str, licence: str, source: str, summary: str, fetch: bool
) -> dict[str, Any]:
    return {
        "name": name,
        "here": path is not None,
        "size": None if path is None else _size(path),
        "where": None if path is None else str(path),
        "format": format,
        "licence": licence,
        "source": source,
        "summary": summary,
        "fetch": fetch,
    }


def _size(path: Path) -> int:
    files = [f for f in path.iterdir() if f.is_file()] if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files)


def _where(dataset: Dataset) -> Path | None:
    folder = data_folder()
    places = [] if folder is None else [folder / dataset.local]
    if dataset.commit is not None:
        places.append(_target(dataset, cache_folder() / dataset.name))
    return next((p for p in places if p.exists()), None)


def _target(dataset: Dataset, folder: Path) -> Path:
    """Return where the dataset lies below ``folder``: a file, or a folder of its name if it has several."""
    if len(dataset.files) == 1:
        return folder / dataset.files[0][0].rpartition("/")[2]
    return folder / dataset.name


def _vllm_runs() -> dict[str, Path]:
    folder = data_folder()
    runs = [] if folder is None else sorted(folder.glob("vllm_runs/*/requests.jsonl"))
    return {_VLLM + run.parent.name: run.parent for run in runs}


# ---- fetching ------------------------------------------------------------------------------------------------------


def fetch(
    name: str, to: str | Path | None = None, *, catalogue: Catalogue | None = None, progress: bool = False
) -> tuple[Path, bool]:
    """Fetch a trace from its authors' repository, unless it is there; return where it lies and whether it was fetched.

    ``to`` is a folder (created if need be); without it the cache. Every file is checked against its SHA-256, and what
    is there appears at once and whole: an interrupted or wrong download leaves nothing. What is in the cache and is not
    what was published is replaced; in a folder of yours it is left alone and refused. Raises `WorkloadError`.
    """
    listed = CATALOGUE if catalogue is None else catalogue
    dataset = listed[name]
    if dataset.commit is None:
        raise WorkloadError(f"{name!r} cannot be fetched; it comes from {dataset.source}")
    folder = cache_folder() / name if to is None else Path(to)
    target = _target(dataset, folder)
    if _is_published(dataset, target):
        return target, False
    if to is not None and target.exists():
        raise WorkloadError(f"{target} is there and is not what was published; move it away first")
    made = _make(folder)
    # Beside the target, so that moving it there is one step on one disk.
    try:
        work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder))
    except OSError as error:
        raise WorkloadError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        _download(listed, dataset, work, progress)
        whole = work if len(dataset.files) > 1 else work / target.name
        work.chmod(0o755)
        if target.is_dir():
            shutil.rmtree(target)
        whole.replace(target)
    except OSError as error:
        raise WorkloadError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for empty in made:
            with suppress(OSError):
                empty.rmdir()  # only what this call made and did not fill
    return target, True


def _make(folder: Path) -> list[Path]:
    """Create the folder and return those that were not there, innermost first."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkloadError(f"cannot make the folder {folder}: {error.strerror}") from None
    return made


def _download(catalogue: Catalogue, dataset: Dataset, folder: Path, progress: bool) -> None:
    import pooch

    for path, sha256 in dataset.files:
        url = catalogue.url(dataset, path)
        try:
            with _quiet(pooch.get_logger()):
                pooch.retrieve(
                    url,
                    known_hash=f"sha256:{sha256}",
                    fname=path.rpartition("/")[2],
                    path=folder,
                    downloader=pooch.HTTPDownloader(progressbar=progress, timeout=_TIMEOUT),
                )
        except ValueError:
            raise WorkloadError(
                f"{url} is not what was published (its SHA-256 is another one); nothing was kept"
            ) from None
        except OSError as error:  # also what `requests` raises
            raise WorkloadError(f"cannot fetch {url}: {_short(error)}; nothing was kept") from None


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _is_published(dataset: Dataset, target: Path) -> bool:
    """Return whether all its files are there with the right contents."""
    folder = target if len(dataset.files) > 1 else target.parent
    for path, sha256 in dataset.files:
        try:
            with (folder / path.rpartition("/")[2]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return False
        except OSError:
            return False
    return True
