"""The laws of slot `scheduler`: everybody gets a turn, nobody two in one step, and a decision that stands stands."""

from __future__ import annotations

from pagedlab.testing.driver import Driver
from pagedlab.testing.drivers.engine import Serving
from pagedlab.testing.law import law
from pagedlab.testing.laws.serving import serving_laws
from pagedlab.testing.subject import Subject

serving_laws("scheduler")


@law("scheduler")
def check_scheduler_nobody_is_asked_for_twice(subject: Subject) -> None:
    """A sequence is asked for once a step."""
    subject.hold("nobody_is_asked_for_twice")


@law("scheduler")
def check_scheduler_decisions_are_known(subject: Subject) -> None:
    """`plan` returns None, or "until-event"."""
    subject.hold("decisions_are_known", watch=_decisions)


def _decisions(driver: Serving) -> None:
    plan = driver.asked.plan

    def watched(step: object) -> object:
        said = plan(step)
        if said not in (None, "until-event"):
            raise driver.broke("decisions_are_known", f"plan returned {said!r}")
        return said

    driver.asked.plan = watched


@law("scheduler")
def check_scheduler_standing_decisions_stand(subject: Subject) -> None:
    """Where it says that a decision stands until something happens, asking it at every step would change nothing."""
    subject.same("standing_decisions_stand", "asked at every step:", one={"watch": _ask_always}, share=1.5)


def _ask_always(driver: Driver) -> None:
    plan = driver.asked.plan

    def once(step: object) -> None:
        plan(step)

    driver.asked.plan = once
