"""What a policy may know of the world around it: the time, the queue, and what it costs to compute a block again.

The engine and `replay` each hand in a view of their own before a run; a policy that was handed none sees a world in
which nothing waits and every token costs the same. All of it is read-only, and looking is not using.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from pagedlab.policies.block import Block


class View:
    """The world as far as nobody says otherwise."""

    flops_per_token: float = 1.0
    """Work per token that does not depend on the tokens before it."""
    flops_per_pair: float = 0.0
    """Work per pair of a token and one that it attends to."""
    bytes_per_token: float = 1.0
    """Keys and values of one token."""

    @property
    def now(self) -> int:
        """The engine's time, in picoseconds."""
        return 0

    @property
    def queue_state(self) -> Hashable:
        """Something that changes whenever the waiting queue does."""
        return None

    def coming(self, n: int) -> Iterator[Sequence[int]]:
        """For each of the next ``n`` waiting sequences, front first: the keys of the blocks that it will look for."""
        return iter(())

    def prefill_flops(self, start: int, n: int) -> float:
        """Return the work of computing ``n`` tokens in one go, given the ``start`` tokens before them."""
        return n * (self.flops_per_token + self.flops_per_pair * (start + (n + 1) / 2))

    def recompute_flops(self, block: Block) -> float:
        """Return the work of computing the block's tokens again, given all before them."""
        return self.prefill_flops(block.depth, block.fill)


NOTHING_KNOWN = View()
