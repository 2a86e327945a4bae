"""What a sequence will say, where that is known beforehand: a simulation takes it from a trace or from a run's log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pagedlab.policies.prompt import private_id


@dataclass(slots=True)
class Script:
    """The output of one sequence: its ``length`` in tokens (at least 1), and the tokens if they are known.

    ``reason`` is why it ended after ``length`` tokens; a limit that comes earlier ends it with ``"length"``.
    """

    length: int
    tokens: Sequence[int] | None = None
    reason: Literal["stop", "length"] = "length"
    unique: int = 0
    """Tokens that are not known get ids of this sequence's own."""

    def token(self, i: int) -> int:
        """Return the i-th output token, counted from 0."""
        return private_id(self.unique, i) if self.tokens is None else self.tokens[i]

    def piece(self, start: int, stop: int) -> Sequence[int]:
        """Return output tokens ``start`` to ``stop``."""
        if self.tokens is None:
            return [private_id(self.unique, i) for i in range(start, stop)]
        return self.tokens[start:stop]
