"""The search for the shortest stream of operations that breaks a law, by Hypothesis."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import errors as hypothesis_errors
from hypothesis import strategies as st

from pagedlab.errors import LawBroken
from pagedlab.testing.driver import TOP, Broke
from pagedlab.testing.law import Skipped

LONGEST = 40
"""Operations of a stream."""
SIZES = st.integers(1, 8)
_CODES = st.integers(0, TOP)


@st.composite
def streams(draw: st.DrawFn, longest: int = LONGEST) -> list[int]:
    """Numbers above 0 for a `Driver`: mostly ``longest`` of them, and as few as will do once something is found."""
    codes: list[int] = []
    while len(codes) < longest and (code := draw(_CODES)):
        codes.append(code)
    return codes


def budget() -> int:
    """Streams that are tried for one law: a quarter of the examples of Hypothesis' profile, at least 10."""
    return max(10, settings.default.max_examples // 4)  # type: ignore[union-attr]


def search(
    law: str, attempt: Callable[[int, list[int]], object], *, longest: int = LONGEST, share: float = 1.0
) -> None:
    """Try ``attempt(size, codes)`` on many streams, the same ones every time.

    Raises `LawBroken` with the story of the shortest stream found for which it raised `Broke` of this ``law``. A stream
    that breaks another law proves nothing here and is over; if all of them do, raises `Skipped`.
    """
    stories: list[str] = []
    others: list[Broke] = []
    whole = 0

    @settings(
        max_examples=max(5, round(share * budget())),
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
        nonlocal whole
        try:
            attempt(size, codes)
        except Broke as broke:
            if broke.law == law:
                stories.append(broke.story)
                raise LawBroken(broke.story) from None
            others.append(broke)
        else:
            whole += bool(codes)

    try:
        run()
    except LawBroken as broken:
        raise LawBroken(str(broken)) from None
    except hypothesis_errors.Flaky:
        # What breaks only now and then cannot be found again; the shortest that was seen has to do.
        raise LawBroken(min(stories, key=len)) from None
    if not whole and others:
        raise Skipped(f"no stream got to its end: see {others[-1].law}")
