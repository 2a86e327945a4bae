"""What a law drives a policy with: a stream of small numbers, each of them something that its user could do.

A `Driver` stands in for the cache or the engine around one policy. It knows what is legal, keeps a story of what was
done and answered, and says which law an answer breaks (`Broke`). A number means an operation and its argument, so a
stream of them can be shortened by leaving numbers out, and 0 means nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

TOP = 511
"""Largest number of a stream."""
NO_ERROR = "answers_without_error"
"""The law that a policy breaks by raising an exception."""
SAME = "same_input_same_decisions"
"""The law that a policy breaks by deciding otherwise in the same run."""

T = TypeVar("T")


class Broke(Exception):
    """An answer broke a law; ``story`` tells how it came to that."""

    def __init__(self, law: str, story: str) -> None:
        super().__init__(law, story)
        self.law, self.story = law, story


class Line(NamedTuple):
    """One line of a story. ``proof`` is what must be equal besides the text; an ``aside`` changes nothing."""

    text: str
    proof: Any = None
    aside: bool = False


class Driver:
    """One policy and what is around it. ``size`` is the room that it has, ``codes`` what is going to be done."""

    longest: ClassVar[int] = 40
    """Operations of a stream at most."""
    share: ClassVar[float] = 1.0
    """How many streams are tried, compared with other slots: fewer where each takes long."""
    operations: ClassVar[tuple[str, ...]]
    """Names of methods that take an argument from 0 to ``TOP // len(operations)``; the first is the most ordinary."""

    def __init__(self, policy: Any, size: int, codes: Sequence[int] = (), **options: Any) -> None:
        self.policy = policy
        self.asked = policy
        """The policy that is really asked: where an engine is driven, its clone."""
        self.size = size
        self.lines: list[Line] = []
        self.options = options
        self.error_law = NO_ERROR
        self.over = False
        """Whether a law is broken, so that nothing that follows means anything."""
        self.begin(codes)

    def begin(self, codes: Sequence[int]) -> None:
        """Reset the policy and start empty."""
        raise NotImplementedError

    def step(self, code: int) -> None:
        """Do what a number above 0 stands for; what cannot be done now is left out."""
        argument, which = divmod(code - 1, len(self.operations))
        getattr(self, self.operations[which])(argument)

    def run(self, codes: Iterable[int]) -> Driver:
        """Do all of it, and what belongs to the end."""
        for code in codes:
            self.step(code)
        self.finish()
        return self

    def finish(self) -> None:
        """Look at what is left."""

    # ---- the story -----------------------------------------------------------------------------------------------

    def tell(self, text: str, proof: Any = None, *, aside: bool = False) -> None:
        """Add a line to the story."""
        self.lines.append(Line(text, proof, aside))

    def ask(self, said: str, method: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call a method of the policy. An exception breaks the law against it."""
        try:
            return method(*arguments, **named)
        except Broke:
            raise
        except Exception as error:
            raise self.broke(self.error_law, f"{said} raised {type(error).__name__}: {error}") from error

    def broke(self, law: str, last: str) -> Broke:
        """Return the exception for a law that was broken by ``last``."""
        return Broke(law, tell(self.lines, last))


def tell(lines: Sequence[Line], last: str = "") -> str:
    """Return a story as one sentence, without misses whose content is stored right after."""
    stored = {line.text for line in lines}
    kept = [
        line.text
        for line in lines
        if not (line.text.startswith("miss ") and f"insert {line.text.removeprefix('miss ')}" in stored)
    ]
    return ", ".join([*kept, last] if last else kept)


def unequal(law: str, one: Driver, other: Driver, said: str) -> None:
    """Raise `Broke` if two stories differ in anything but asides; ``said`` introduces what ``one`` had told there."""
    ours = [line for line in one.lines if not line.aside]
    at = 0
    for i, line in enumerate(other.lines):
        if line.aside:
            continue
        if at >= len(ours) or (ours[at].text, ours[at].proof) != (line.text, line.proof):
            before = ours[at].text if at < len(ours) else "nothing"
            shown = line.text
            if before == shown:
                before, shown = f"{before}: {_short(ours[at].proof)}", f"{shown}: {_short(line.proof)}"
            raise Broke(law, tell(other.lines[:i], f"{shown}; {said} {before}"))
        at += 1
    if at < len(ours):
        raise Broke(law, tell(other.lines, f"and that was all; {said} {ours[at].text}"))


def _short(proof: Any) -> str:
    text = repr(proof)
    return text if len(text) <= 200 else f"{text[:200]}…"
