"""The laws of slot `preemption`: one of those offered is chosen, and there is a way back."""

from __future__ import annotations

from dataclasses import dataclass

from pagedlab.testing.driver import Broke
from pagedlab.testing.law import law
from pagedlab.testing.laws.serving import serving_laws
from pagedlab.testing.subject import Subject

serving_laws("preemption")


@dataclass(eq=False)
class _Candidate:
    """A running sequence as far as a preemption policy can see it."""

    request_id: str
    priority: int
    num_computed: int
    num_shared: int

    def __repr__(self) -> str:
        return f"{self.request_id} (priority {self.priority}, {self.num_computed} tokens)"


def _candidates(codes: list[int]) -> list[_Candidate]:
    return [
        _Candidate(str(i), code % 3, 1 + code // 3, (1 + code // 3) * (code % 2) // 2)
        for i, code in enumerate(codes[:8])
    ]


@law("preemption")
def check_preemption_chooses_a_candidate(subject: Subject) -> None:
    """`choose` returns one of the candidates, and leaves their list as it is."""

    def attempt(size: int, codes: list[int]) -> None:
        offered = _candidates(codes)
        if not offered:
            return
        given = list(offered)
        said = subject.fresh().choose(given)
        if given != offered:
            raise Broke("chooses_a_candidate", f"offered {offered}, the policy changed the list to {given}")
        if said not in offered:
            raise Broke("chooses_a_candidate", f"offered {offered}, it chose {said!r}")

    subject.search("chooses_a_candidate", attempt)
    subject.hold("chooses_a_candidate")


@law("preemption")
def check_preemption_modes_are_known(subject: Subject) -> None:
    """`mode` returns "recompute" or "swap"; "swap" only from a class that says ``wants_host``."""

    def attempt(size: int, codes: list[int]) -> None:
        for victim in _candidates(codes):
            said = subject.fresh().mode(victim)
            if said not in ("recompute", "swap"):
                raise Broke("modes_are_known", f"for {victim} the mode is {said!r}")
            if said == "swap" and not subject.policy.wants_host:  # type: ignore[attr-defined]
                raise Broke(
                    "modes_are_known",
                    f"for {victim} the mode is 'swap', and the class says wants_host = False",
                )

    subject.search("modes_are_known", attempt)
