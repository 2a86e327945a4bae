"""A sequence's block table."""

from __future__ import annotations

from collections.abc import Hashable

from pagedlab.policies.block import Block, Origin, Stretch
from pagedlab.policies.lookup import Prefix


class BlockTable:
    """Logical block i of a sequence lies in ``blocks[i]``::

        tokens   |<------- num_tokens ------->|<- reserved ->|
        blocks   |   b0   |   b1   |   b2   |   b3   |   b4   |
                 |<- num_published ->|

    Owned by the cache, which alone changes it. ``version`` changes whenever the table did other than grow at its end.
    """

    __slots__ = (
        "_indices",
        "blocks",
        "final_len",
        "host_blocks",
        "num_published",
        "num_tokens",
        "origin",
        "parent",
        "parent_key",
        "prefix",
        "seq_id",
        "stretch",
        "version",
    )

    def __init__(self, seq_id: int, prefix: Prefix, final_len: int, *, origin: Origin | None = None) -> None:
        self.seq_id = seq_id
        self.prefix = prefix
        self.final_len = final_len
        """Tokens that the sequence may come to store at most: what lies beyond in its blocks is never used."""
        self.origin = Origin(salt=prefix.salt) if origin is None else origin
        self.blocks: list[Block] = []
        self._indices: list[int] = []
        """Of as many ``blocks`` as somebody has asked for."""
        self.num_tokens = 0
        """Tokens whose keys and values are computed."""
        self.num_published = 0
        """Leading blocks whose content has been offered to the lookup."""
        self.parent: Hashable = (prefix.salt,)
        """Serial of the last published content, or the salt before the first."""
        self.parent_key: int | None = None
        self.stretch: Stretch | None = None
        """Where the last block that was published belongs."""
        self.version = 0
        self.host_blocks: list[Block] = []
        """Where the sequence lies while it is swapped out."""

    @property
    def indices(self) -> list[int]:
        """Physical numbers of ``blocks``, in a list that grows with them."""
        known = self._indices
        if len(known) < len(self.blocks):
            known += [b.index for b in self.blocks[len(known) :]]
        return known

    def hold(self, blocks: list[Block]) -> None:
        """Have other blocks from now on."""
        self.blocks = blocks
        self._indices = []
        self.version += 1

    def replace(self, at: int, block: Block) -> None:
        """Have ``block`` in place of ``blocks[at]``."""
        self.blocks[at] = block
        del self._indices[at:]
        self.version += 1

    @property
    def swapped(self) -> bool:
        """True while the sequence's keys and values are in the host tier."""
        return bool(self.host_blocks)

    def blank(self) -> None:
        """Forget everything but the tokens: the sequence starts over."""
        self.hold([])
        self.num_tokens = 0
        self.num_published = 0
        self.parent = (self.prefix.salt,)
        self.parent_key = None
        self.stretch = None
