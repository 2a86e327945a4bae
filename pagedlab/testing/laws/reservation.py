"""The laws of slot `reservation`: a claim covers the step at hand and no more than a sequence can become."""

from __future__ import annotations

from dataclasses import dataclass

from pagedlab.testing.driver import Broke
from pagedlab.testing.law import law
from pagedlab.testing.laws.serving import serving_laws
from pagedlab.testing.subject import Subject

serving_laws("reservation")


@dataclass(frozen=True)
class _Claimant:
    """A sequence that asks for room, in tokens."""

    prompt_len: int
    num_tokens: int
    max_len: int
    expected_len: int


def _hold(subject: Subject, name: str) -> None:
    def attempt(size: int, codes: list[int]) -> None:
        policy = subject.fresh()
        for code in codes:
            prompt, output = 1 + code % 9, 1 + code // 9 % 9
            longest = prompt + output
            known = prompt + code // 5 % output
            asking = _Claimant(prompt, known, longest, min(longest, prompt + 1 + code // 7 % output))
            step_end, model = 1 + code // 3 % known, longest + size - 1
            said = policy.claim(asking, step_end, model)
            told = (
                f"a step up to token {step_end} of a prompt of {prompt} with {known - prompt} generated, at most "
                f"{longest} (model: {model}): claim returned {said!r}"
            )
            if isinstance(said, bool) or not isinstance(said, int):
                raise Broke("claims_are_whole_numbers", told)
            if said < step_end:
                raise Broke("claims_cover_the_step", told)
            if said > model:
                raise Broke("claims_fit_the_model", told)
            if policy.claim(asking, step_end, model) != said:
                raise Broke("claiming_changes_nothing", f"{told}, and then something else")

    subject.search(name, attempt)


@law("reservation")
def check_reservation_claims_are_whole_numbers(subject: Subject) -> None:
    """`claim` returns a number of tokens, an int."""
    _hold(subject, "claims_are_whole_numbers")


@law("reservation")
def check_reservation_claims_cover_the_step(subject: Subject) -> None:
    """A claim is never less than what the next step writes."""
    _hold(subject, "claims_cover_the_step")


@law("reservation")
def check_reservation_claims_fit_the_model(subject: Subject) -> None:
    """A claim is never more than the longest sequence that the model allows."""
    _hold(subject, "claims_fit_the_model")


@law("reservation")
def check_reservation_claiming_changes_nothing(subject: Subject) -> None:
    """Asked twice for the same sequence, it claims the same: an admission may fail and be tried again."""
    _hold(subject, "claiming_changes_nothing")
