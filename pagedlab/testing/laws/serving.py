"""What holds for every policy that an engine asks while it serves: laws of five slots."""

from __future__ import annotations

from pagedlab.testing.law import law
from pagedlab.testing.subject import Subject

_LAWS = {
    "work_ends": "Finite work ends: no request waits for ever.",
    "outputs_are_unchanged": "Every request says what it would say alone, with all the memory it wants.",
    "books_balance": "Free, used and cached blocks make up the pool after every step; at the end none is in use.",
    "what_fits_is_not_refused": "A request that the pool has room for is not refused.",
}


def serving_laws(slot: str) -> None:
    """Register ``check_<slot>_work_ends`` and the others for a slot."""
    for name, summary in _LAWS.items():

        def check(subject: Subject, name: str = name) -> None:
            subject.hold(name)

        check.__name__, check.__doc__ = f"check_{slot}_{name}", summary
        law(slot)(check)
