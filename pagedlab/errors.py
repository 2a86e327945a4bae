"""Every error that a user can cause has a name here, and one line that says what, where and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PagedLabError(Exception):
    """Base of all errors raised on purpose by pagedlab."""


class ConfigError(PagedLabError, ValueError):
    """A configuration value is unknown, out of range, or contradicts another one."""


class PolicyError(PagedLabError, RuntimeError):
    """A policy broke its contract (named a victim that is in use, returned too few blocks, ...)."""


class ModelNotServed(PagedLabError, ValueError):
    """The model cannot be served through the paged cache; the message names the reason."""


class InvariantBroken(PagedLabError, AssertionError):
    """The cache's own bookkeeping contradicts itself: a bug in pagedlab, never a user's fault."""


class LawBroken(PagedLabError, AssertionError):
    """A policy broke one of the laws of its slot; the message is the shortest story that shows it."""


class ResultsError(PagedLabError, ValueError):
    """A saved run cannot be read: the message names the file and what is wrong with it."""


class WorkloadError(PagedLabError, ValueError):
    """A workload is unknown, or cannot be made from what was given."""


class RequestTooLarge(PagedLabError, ValueError):
    """A request that could never finish, refused at once.

    ``needed`` and ``available`` are both in ``unit`` (blocks or tokens).
    """

    def __init__(self, what: str, needed: int, available: int, unit: str, hint: str = "") -> None:
        self.needed, self.available, self.unit = needed, available, unit
        super().__init__(
            f"{what} needs {needed} {unit} and at most {available} are available"
            + (f"; {hint}" if hint else "")
        )


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the known names closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
