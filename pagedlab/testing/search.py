"""The search for the shortest stream of operations that breaks a law, by Hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from itertools import combinations, product
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, Verbosity, configuration, given, settings
from hypothesis import errors as hypothesis_errors
from hypothesis import strategies as st

from pagedlab.errors import LawBroken
from pagedlab.testing.driver import TOP, Broke
from pagedlab.testing.law import Skipped

SIZES = st.integers(1, 8)
_CODES = st.integers(0, TOP)


@st.composite
def streams(draw: st.DrawFn, longest: int) -> list[int]:
    """Numbers above 0 for a `Driver`: mostly ``longest`` of them, and as few as will do once something is found."""
    codes: list[int] = []
    while len(codes) < longest and (code := draw(_CODES)):
        codes.append(code)
    return codes


def budget() -> int:
    """Streams that are tried for one law: half as many as Hypothesis' profile has examples, at least 20."""
    return max(20, settings.default.max_examples // 2)  # type: ignore[union-attr]


@cache
def drawn(longest: int, count: int) -> list[tuple[int, list[int]]]:
    """Return sizes and streams as Hypothesis draws them, the same for every law and policy."""
    found: list[tuple[int, list[int]]] = []
    _draw(lambda size, codes: found.append((size, codes)), longest, count)
    return found


@cache
def _scratch() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="pagedlab-")


@contextmanager
def _leaving_nothing_behind() -> Iterator[None]:
    """Keep Hypothesis from making its folder in the current directory, unless it is there already."""
    home = configuration.storage_directory(intent_to_write=False).home_directory
    if not home.exists():
        configuration.set_hypothesis_home_dir(_scratch().name)
    try:
        yield
    finally:
        configuration.set_hypothesis_home_dir(home)


@contextmanager
def _whatever_is_loaded() -> Iterator[None]:
    """Keep Hypothesis from mixing in the numbers that stand in the source of loaded modules, so that the same streams
    are drawn in every process. It has no setting for that; where it keeps them otherwise, they are mixed in.
    """
    try:
        providers: Any = import_module("hypothesis.internal.conjecture.providers")
        kept, nothing = providers._get_local_constants, providers.Constants()
        permitted = providers.CONSTANTS_CACHE.cache
    except (ImportError, AttributeError):
        yield
        return
    permitted.clear()
    providers._get_local_constants = lambda: nothing
    try:
        yield
    finally:
        providers._get_local_constants = kept
        permitted.clear()


Attempt = Callable[[int, list[int]], object]
"""Drives a policy with a stream, given the size of what is around it; raises `Broke` if a law is broken."""


def _draw(attempt: Attempt, longest: int, examples: int) -> None:
    """Let Hypothesis call ``attempt`` with many streams, and look for shorter ones if it raises anything."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(SIZES, streams(longest))
    def run(size: int, codes: list[int]) -> None:
        attempt(size, codes)

    with _leaving_nothing_behind(), _whatever_is_loaded():
        run()


def survey(attempt: Attempt, *, longest: int, share: float = 1.0) -> dict[str, str]:
    """Return the laws that any stream breaks, each with the shortest story of it.

    The law "" stands for the streams that got to their end: it is there if any did.
    """
    found: dict[str, str] = {}
    for size, codes in drawn(longest, round(share * budget())):
        try:
            attempt(size, codes)
        except Broke as broke:
            found[broke.law] = min(found.get(broke.law, broke.story), broke.story, key=len)
        else:
            if codes:
                found[""] = ""
    return found


class Case(NamedTuple):
    """A stream that breaks a law, and its story."""

    size: int
    codes: list[int]
    story: str

    def weight(self) -> tuple[int, int, int, int]:
        """How much there is to read, and then how large the numbers are."""
        return self.story.count(", "), len(self.story), sum(self.codes), self.size


def search(law: str, attempt: Attempt, *, longest: int, operations: int, share: float = 1.0) -> None:
    """Raise `LawBroken` with the shortest story that was found of a stream that breaks ``law``, if one does.

    A stream that breaks another law proves nothing here and is over; if all of them do, raises `Skipped`.
    ``operations`` is how many the driver knows.
    """
    cases: list[Case] = []
    others: list[Broke] = []
    whole = 0

    def hold(size: int, codes: list[int]) -> None:
        nonlocal whole
        try:
            attempt(size, codes)
        except Broke as broke:
            if broke.law == law:
                cases.append(Case(size, codes, broke.story))
                raise LawBroken(broke.story) from None
            others.append(broke)
        else:
            whole += bool(codes)

    count = round(share * budget())
    try:
        for size, codes in drawn(longest, count):
            hold(size, codes)
    except LawBroken:
        try:
            _draw(hold, longest, count)
        except (LawBroken, hypothesis_errors.Flaky):
            pass  # what breaks only now and then cannot be found again; then the shortest that was seen has to do
        case = _polished(law, attempt, min(cases, key=Case.weight), operations, longest)
        raise LawBroken(case.story) from None
    if not whole and others:
        raise Skipped(f"no stream got to its end: see {others[-1].law}")


_PATIENCE = 40
"""Streams that are tried to make a short story shorter, for each operation that a stream may have."""
_SIMPLE = 3
"""Arguments that are simple: 0, 1 and 2."""


def _polished(law: str, attempt: Attempt, case: Case, operations: int, longest: int) -> Case:
    """Return a case that no change of one or two operations makes shorter.

    Hypothesis changes one number at a time; here the argument of one operation often depends on another one.
    """
    left = _PATIENCE * longest
    better: Case | None = case
    while better is not None:
        case, better = better, None
        for size, codes in _simpler(case, operations):
            left -= 1
            if left < 0:
                return case
            try:
                attempt(size, codes)
            except Broke as broke:
                shorter = Case(size, codes, broke.story)
                if broke.law == law and shorter.weight() < case.weight():
                    better = shorter
                    break
    return case


def _simpler(case: Case, operations: int) -> Iterator[tuple[int, list[int]]]:
    """Yield streams with an operation less, simpler or in another's place, or less around; then with two changed."""
    size, codes = case.size, case.codes
    changes: list[list[int | None]] = []
    for code in codes:
        plain = 1 + (code - 1) % operations
        smaller = (1, *(plain + argument * operations for argument in range(_SIMPLE)))
        changes.append([None, *sorted({number for number in smaller if number < code})])
    for i, options in enumerate(changes):
        for change in options:
            yield size, _with(codes, {i: change})
    for length in range(3, len(codes)):
        for start in range(len(codes) - length + 1):
            yield size, codes[:start] + codes[start + length :]
    for at, code in enumerate(codes):
        for instead in range(1, 1 + 2 * operations):
            if instead != code:
                yield size, _with(codes, {at: instead})
    for less in range(1, size):
        yield less, codes
        for i, options in enumerate(changes):
            for change in options:
                yield less, _with(codes, {i: change})
    for (i, one), (j, other) in combinations(enumerate(changes), 2):
        for a, b in product(one, other):
            yield size, _with(codes, {i: a, j: b})


def _with(codes: list[int], changes: dict[int, int | None]) -> list[int]:
    changed = [changes.get(i, code) for i, code in enumerate(codes)]
    return [code for code in changed if code is not None]
