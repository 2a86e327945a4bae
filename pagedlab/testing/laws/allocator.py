"""The laws of slot `allocator`: every block is handed out once at a time, and a refusal changes nothing."""

from __future__ import annotations

from pagedlab.testing.drivers.allocator import Pool
from pagedlab.testing.law import Skipped, law
from pagedlab.testing.subject import Subject


@law("allocator")
def check_allocator_no_block_is_handed_out_twice(subject: Subject) -> None:
    """A block that was handed out is not handed out again before it is freed."""
    subject.hold("no_block_is_handed_out_twice")


@law("allocator")
def check_allocator_only_its_own_blocks(subject: Subject) -> None:
    """Only blocks are handed out that `reset` named."""
    subject.hold("only_its_own_blocks")


@law("allocator")
def check_allocator_all_or_none(subject: Subject) -> None:
    """`allocate` returns a list of exactly n blocks, or None."""
    subject.hold("all_or_none")


@law("allocator")
def check_allocator_refusal_changes_nothing(subject: Subject) -> None:
    """After `allocate` returned None, everything goes on as if nobody had asked."""
    subject.hold("refusal_changes_nothing")

    subject.same("refusal_changes_nothing", "without the refusals:", one={"refuse": False})


@law("allocator")
def check_allocator_room_is_found(subject: Subject) -> None:
    """Free blocks are found: any number of them, by an allocator of contiguous runs at least one."""
    subject.hold("room_is_found")


@law("allocator")
def check_allocator_num_free_is_exact(subject: Subject) -> None:
    """``num_free`` counts what can be handed out, after every call."""
    subject.hold("num_free_is_exact")


@law("allocator")
def check_allocator_fits_tells_the_truth(subject: Subject) -> None:
    """`fits` says whether `allocate` would succeed, also if some more blocks were freed first."""
    subject.hold("fits_tells_the_truth")

    def attempt(size: int, codes: list[int]) -> None:
        pool = subject.driver(size, codes)
        assert isinstance(pool, Pool)
        for code in codes:
            pool.step(code)
        if not pool.used:
            return
        also, n = set(pool.used[-1]), 1 + sum(codes) % len(pool.blocks)
        told = f"fits({n}, also={sorted(also)})"
        said = pool.ask(told, pool.policy.fits, n, also)
        pool.release(pool.used.pop())
        taken = pool.ask(f"allocate({n})", pool.policy.allocate, n, None)
        if bool(said) != (taken is not None):
            raise pool.broke(
                "fits_tells_the_truth", f"before that {told} returned {said}, now allocate({n}) {taken}"
            )

    subject.search("fits_tells_the_truth", attempt)


@law("allocator")
def check_allocator_fits_changes_nothing(subject: Subject) -> None:
    """Asking `fits` is no allocation: all later answers are the same."""
    subject.hold("fits_changes_nothing")

    subject.same("fits_changes_nothing", "without asking fits:", one={"query": False})


@law("allocator")
def check_allocator_contiguous_as_promised(subject: Subject) -> None:
    """An allocator that says ``contiguous`` hands out adjacent blocks, in order."""
    if not subject.policy.contiguous:  # type: ignore[attr-defined]
        raise Skipped("it does not say contiguous = True")
    subject.hold("contiguous_as_promised")
