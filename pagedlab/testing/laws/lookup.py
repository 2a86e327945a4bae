"""The laws of slot `lookup`: the longest cached prefix, the tenant's own, and looking changes nothing."""

from __future__ import annotations

from pagedlab.errors import LawBroken
from pagedlab.testing.driver import Broke
from pagedlab.testing.law import Skipped, law
from pagedlab.testing.subject import Subject


def _shares(subject: Subject) -> None:
    if subject.policy.granularity == "none":  # type: ignore[attr-defined]
        raise Skipped("granularity 'none' shares nothing")


@law("lookup")
def check_lookup_granularity_is_known(subject: Subject) -> None:
    """``granularity`` is "none", "block" or "token"."""
    said = subject.policy.granularity  # type: ignore[attr-defined]
    if said not in ("none", "block", "token"):
        raise LawBroken(f"granularity is {said!r}; it must be none, block or token")


@law("lookup")
def check_lookup_longest_prefix_is_found(subject: Subject) -> None:
    """`match` finds what a look at every published block finds: whole blocks, or tokens, as ``granularity`` says."""
    subject.hold("longest_prefix_is_found")


@law("lookup")
def check_lookup_limit_is_kept(subject: Subject) -> None:
    """`match` returns no more than ``max_tokens`` tokens."""
    subject.hold("limit_is_kept")


@law("lookup")
def check_lookup_salts_isolate(subject: Subject) -> None:
    """A block that one tenant published is never found by another."""
    _shares(subject)
    subject.hold("salts_isolate")


@law("lookup")
def check_lookup_contents_never_mix(subject: Subject) -> None:
    """What is found holds the tokens that were asked for, also where hashes collide."""
    _shares(subject)

    def attempt(size: int, codes: list[int]) -> None:
        subject.driver(size, codes).run(codes)  # what is wrong without collisions, too, is another law's
        try:
            subject.driver(size, codes, collide=True).run(codes)
        except Broke as broke:
            raise Broke("contents_never_mix", broke.story) from None

    subject.search("contents_never_mix", attempt)


@law("lookup")
def check_lookup_forgotten_blocks_are_not_found(subject: Subject) -> None:
    """After `forget` a block is not found again."""
    _shares(subject)
    subject.hold("forgotten_blocks_are_not_found")


@law("lookup")
def check_lookup_highest_copy_is_given(subject: Subject) -> None:
    """Of copies in several tiers, `match` returns the one in the highest."""
    _shares(subject)
    subject.hold("highest_copy_is_given")


@law("lookup")
def check_lookup_copies_are_found(subject: Subject) -> None:
    """`copy_in` returns the block of that tier with the same content, or None."""
    _shares(subject)
    subject.hold("copies_are_found")


@law("lookup")
def check_lookup_serials_identify_content(subject: Subject) -> None:
    """One serial stands for one content: salt, and all tokens up to the end of the block."""
    _shares(subject)
    subject.hold("serials_identify_content")


@law("lookup")
def check_lookup_looking_is_not_using(subject: Subject) -> None:
    """`match` changes nothing: asked again it says the same, and what is published later is told the same."""
    subject.hold("looking_is_not_using", look=True)

    subject.same("looking_is_not_using", "without having looked:", one={"look": False}, other={"look": True})


@law("lookup")
def check_lookup_short_cuts_are_equal(subject: Subject) -> None:
    """`publish_chain` and `forget_all` do what `publish` and `forget` do block by block."""
    _shares(subject)

    subject.same("short_cuts_are_equal", "block by block:", other={"quick": True}, breaches=True)
