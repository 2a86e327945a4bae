"""The laws of slot `prefetch`: only what lies in a lower tier is brought up, and its fate is heard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagedlab.policies.block import DEVICE
from pagedlab.policies.prefetch import FATES, Load
from pagedlab.testing.drivers.engine import Serving
from pagedlab.testing.law import Skipped, law
from pagedlab.testing.laws.serving import serving_laws
from pagedlab.testing.subject import Subject

serving_laws("prefetch")
_THERE = "plans_name_what_is_there"
_ONCE = "no_content_is_loaded_twice"
_HEARD = "fates_are_heard"


def _enabled(subject: Subject) -> None:
    if not subject.policy.enabled:  # type: ignore[attr-defined]
        raise Skipped("it says enabled = False, and is never asked")


@law("prefetch")
def check_prefetch_plans_name_what_is_there(subject: Subject) -> None:
    """Every `Load` is of a block that is cached in a lower tier at that moment."""
    _enabled(subject)
    subject.hold(_THERE, watch=_watch)


@law("prefetch")
def check_prefetch_no_content_is_loaded_twice(subject: Subject) -> None:
    """One plan names no block twice."""
    _enabled(subject)
    subject.hold(_ONCE, watch=_watch)


@law("prefetch")
def check_prefetch_planning_changes_nothing(subject: Subject) -> None:
    """Asked twice without news of any load, it plans the same: the engine may ask at every step."""
    _enabled(subject)
    subject.hold("planning_changes_nothing", watch=_watch)


@law("prefetch")
def check_prefetch_fates_are_heard(subject: Subject) -> None:
    """Whatever becomes of a load (`pagedlab.policies.prefetch.FATES`), `feedback` takes it."""
    _enabled(subject)
    subject.hold(_HEARD, watch=_watch)


def _watch(driver: Serving) -> None:
    """Hold every plan of the engine's prefetcher to the contract."""
    policy, engine = driver.asked, driver.engine
    plan = policy.plan

    def watched(waiting: Sequence[Any], residency: Any, link_budget: int) -> list[Load]:
        said = driver.ask("plan", plan, waiting, residency, link_budget)
        if not isinstance(said, list) or not all(isinstance(load, Load) for load in said):
            raise driver.broke(_THERE, f"plan returned {said!r}, which is no list of Loads")
        for block, to_tier, _ in said:
            tiers = {pool.tier: pool.blocks for pool in engine.cache.pools}
            if block.key is None or block not in tiers.get(block.tier, ()):
                raise driver.broke(_THERE, f"plan named {block!r}, which holds nothing that can be found")
            if block.tier <= to_tier or to_tier != DEVICE:
                raise driver.broke(_THERE, f"plan named {block!r} for tier {to_tier}, which is not above it")
        if len({id(load.block) for load in said}) != len(said):
            raise driver.broke(_ONCE, f"plan returned {said}")
        if driver.ask("plan", plan, waiting, residency, link_budget) != said:
            raise driver.broke("planning_changes_nothing", f"plan returned {said}, and then something else")
        for load in said:
            for fate in FATES:
                try:
                    policy.feedback(load.block, fate)
                except Exception as error:
                    told = f"feedback({load.block!r}, {fate!r}) raised {type(error).__name__}: {error}"
                    raise driver.broke(_HEARD, told) from error
        return said

    policy.plan = watched
