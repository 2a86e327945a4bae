"""The laws of slot `swap`: a yes or a no for each victim, and a tier where one is needed."""

from __future__ import annotations

from pagedlab.errors import ConfigError, LawBroken
from pagedlab.policies.block import DISK, FIELDS, HOST, TIER_NAMES, Block
from pagedlab.registry import lookup_class
from pagedlab.testing.driver import Broke
from pagedlab.testing.law import law
from pagedlab.testing.laws.serving import serving_laws
from pagedlab.testing.subject import Subject

serving_laws("swap")


def _hold(subject: Subject, name: str) -> None:
    def attempt(size: int, codes: list[int]) -> None:
        policy = subject.fresh()
        policy.reset(capacities=[size, size, size])
        for code in codes:
            tier = DISK if policy.uses_disk and code % 3 == 0 else HOST
            block = Block(code % 7, tier - 1, size=size)
            block.key = block.serial = code
            block.hits, block.depth, block.born = code % 5, code // 5 % 4 * size, 1
            before = _attributes(block)
            said = policy.store(block, tier)
            told = (
                f"store of a block with {block.hits} hits at depth {block.depth} in the {TIER_NAMES[tier]} tier "
                f"returned {said!r}"
            )
            if not isinstance(said, bool):
                raise Broke("answers_are_yes_or_no", told)
            if said and not policy.uses_host:
                raise Broke("what_is_kept_has_a_tier", f"{told}, and the class says uses_host = False")
            if _attributes(block) != before:
                raise Broke("storing_is_only_a_decision", f"{told} and changed the block")

    subject.search(name, attempt)


def _attributes(block: Block) -> list[object]:
    return [getattr(block, name) for name in FIELDS]


@law("swap")
def check_swap_answers_are_yes_or_no(subject: Subject) -> None:
    """`store` returns True or False."""
    _hold(subject, "answers_are_yes_or_no")


@law("swap")
def check_swap_what_is_kept_has_a_tier(subject: Subject) -> None:
    """A class that keeps anything says ``uses_host = True``, or there is no host tier to keep it in."""
    _hold(subject, "what_is_kept_has_a_tier")
    cls = type(subject.fresh())
    if cls.uses_disk and not cls.uses_host:
        raise LawBroken(
            "the class says uses_disk = True and uses_host = False: blocks go down one tier at a time"
        )


@law("swap")
def check_swap_storing_is_only_a_decision(subject: Subject) -> None:
    """`store` changes nothing of the block."""
    _hold(subject, "storing_is_only_a_decision")


@law("swap")
def check_swap_tier_evictions_are_known(subject: Subject) -> None:
    """`tier_eviction` names an eviction policy that can serve, for each tier."""
    policy = subject.fresh()
    for tier in (HOST, DISK):
        name = policy.tier_eviction(tier)
        said = f"tier_eviction({TIER_NAMES[tier].upper()}) returned {name!r}"
        try:
            cls = lookup_class("eviction", name)
        except ConfigError as error:
            raise LawBroken(f"{said}: {error}") from None
        if getattr(cls, "needs_future", False):
            raise LawBroken(f"{said}, which needs the future")
