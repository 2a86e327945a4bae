"""A pool of numbered blocks around an allocator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pagedlab.testing.driver import Driver


class Pool(Driver):
    """Who has which blocks. Option ``query`` asks `fits`, and asks in vain, where the stream says so."""

    operations: ClassVar[tuple[str, ...]] = ("take", "give_back", "give_some", "fits", "take_too_many")

    def begin(self, codes: Sequence[int]) -> None:
        """Reset, with all blocks free."""
        self.queries = self.options.get("query", True)
        self.refuses = self.options.get("refuse", True)
        first = self.size % 3
        self.blocks = range(first, first + 2 * self.size)
        self.free = set(self.blocks)
        self.used: list[list[int]] = []
        self.ask("reset", self.policy.reset, self.blocks)
        self.count("reset", "num_free_is_exact")

    # ---- operations ----------------------------------------------------------------------------------------------

    def take(self, argument: int) -> None:
        """Take some blocks, perhaps with a wish where."""
        n, wish = 1 + argument % 6, argument // 6
        after = self.used[wish % len(self.used)][-1] if wish % 3 and self.used else None
        if n > len(self.free):
            n = max(1, len(self.free))
        if n <= len(self.free):
            self.allocate(n, after)

    def take_too_many(self, argument: int) -> None:
        """Ask for more than is there."""
        if self.refuses:
            self.allocate(len(self.free) + 1 + argument % 3, None, aside=True)

    def give_back(self, argument: int) -> None:
        """Free all of what one call handed out, in order or in reverse."""
        if self.used:
            blocks = self.used.pop(argument // 2 % len(self.used))
            self.release(blocks[::-1] if argument % 2 else blocks)

    def give_some(self, argument: int) -> None:
        """Free every other block of what one call handed out."""
        if self.used:
            at = argument % len(self.used)
            self.release(self.used[at][::2])
            self.used[at] = self.used[at][1::2]
            if not self.used[at]:
                del self.used[at]

    def fits(self, argument: int) -> None:
        """Ask what would fit, if more were free; then see whether it was the truth."""
        if not self.queries:
            return
        n = 1 + argument % (len(self.blocks) + 1)
        also = set(self.used[argument // 4 % len(self.used)]) if self.used and argument % 4 else set()
        told = f"fits({n}{f', also={sorted(also)}' if also else ''})"
        said = self.ask(told, self.policy.fits, n, also)
        self.tell(f"{told} returned {said}", aside=True)
        self.count(told, "fits_changes_nothing")
        if not also and not self.policy.contiguous and bool(said) != (n <= len(self.free)):
            raise self.broke("fits_tells_the_truth", f"with {len(self.free)} blocks free")

    def finish(self) -> None:
        """Give everything back."""
        while self.used:
            self.release(self.used.pop())
        self.foresee()

    def foresee(self) -> None:
        """At the end everything is free, so `fits` and `allocate` can be compared without consequences."""
        n = max(1, len(self.blocks) - self.size % 2)
        said = self.ask(f"fits({n})", self.policy.fits, n) if self.queries else None
        taken = self.ask(f"allocate({n})", self.policy.allocate, n, None)
        if said is not None and bool(said) != (taken is not None):
            raise self.broke(
                "fits_tells_the_truth", f"fits({n}) returned {said}, allocate({n}) returned {taken}"
            )
        self.tell(f"allocate({n}) returned {taken}")

    # ---- what the operations are made of --------------------------------------------------------------------------

    def allocate(self, n: int, after: int | None, *, aside: bool = False) -> None:
        """Ask for blocks, and hold the answer to the laws."""
        said = f"allocate({n}{'' if after is None else f', after={after}'})"
        foretold = self.ask(f"fits({n})", self.policy.fits, n) if self.queries else None
        taken = self.ask(said, self.policy.allocate, n, after)
        told = f"{said} returned {taken}"
        self.legal(told, n, taken)
        if foretold is not None and bool(foretold) != (taken is not None):
            raise self.broke("fits_tells_the_truth", f"fits({n}) returned {foretold}, {told}")
        if taken is not None:
            self.free -= set(taken)
            self.used.append(list(taken))
        self.tell(told, aside=aside)
        self.count(told, "refusal_changes_nothing" if taken is None else "num_free_is_exact")

    def legal(self, told: str, n: int, taken: Any) -> None:
        """Say which law an answer breaks."""
        if taken is None:
            if n <= len(self.free) and (n == 1 or not self.policy.contiguous):
                raise self.broke("room_is_found", f"{told}, with {len(self.free)} blocks free")
            return
        if not isinstance(taken, list) or len(taken) != n:
            raise self.broke("all_or_none", f"{told}, which is neither {n} blocks nor None")
        if len(set(taken)) != n:
            raise self.broke("no_block_is_handed_out_twice", f"{told}, one of them twice")
        for block in taken:
            if block not in self.blocks:
                raise self.broke("only_its_own_blocks", f"{told}; {block} is not one of {self.blocks}")
            if block not in self.free:
                raise self.broke("no_block_is_handed_out_twice", f"{told}; {block} is in use")
        if self.policy.contiguous and taken != list(range(taken[0], taken[0] + n)):
            raise self.broke("contiguous_as_promised", f"{told}, which is not one run in order")

    def release(self, blocks: list[int]) -> None:
        """Free blocks."""
        self.ask(f"free({blocks})", self.policy.free, list(blocks))
        self.free |= set(blocks)
        self.tell(f"free({blocks})")
        self.count(f"free({blocks})", "num_free_is_exact")

    def count(self, said: str, law: str) -> None:
        """Compare the policy's count of free blocks with what was handed out."""
        counted = self.ask("num_free", lambda: self.policy.num_free)
        if counted != len(self.free):
            last = f"num_free is {counted}, and {len(self.free)} blocks are free"
            if not self.lines or not self.lines[-1].text.startswith(said):
                last = f"{said}, {last}"
            raise self.broke(law, last)
