"""The books on prefetched blocks: whose place they took, and how each load ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pagedlab.policies.block import Block
from pagedlab.policies.prefetch import Fate


class Prefetched:
    """Device blocks that were brought up and not yet used. Each leaves with exactly one `end`."""

    def __init__(self, tell: Callable[[Block, Fate], None] | None) -> None:
        self._tell = tell or (lambda block, fate: None)
        self._open: dict[Block, int | None] = {}
        """With the key of what each displaced."""
        self._displaced: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def unused(self) -> dict[Block, None]:
        """Those blocks."""
        return dict.fromkeys(self._open)

    def begin(self, block: Block, displaced: int | None) -> None:
        """``block`` was brought up, to where content ``displaced`` had been (None: the block was free)."""
        self._open[block] = displaced
        if displaced is not None:
            self._displaced[displaced] = block
        self._tell(block, "done")

    def end(self, blocks: Iterable[Block], fate: Fate) -> None:
        """Those of ``blocks`` that were brought up and not used yet end so."""
        for block in blocks:
            if block in self._open:
                key = self._open.pop(block)
                if key is not None and self._displaced.get(key) is block:
                    del self._displaced[key]
                self._tell(block, fate)

    def missed(self, keys: Sequence[int]) -> None:
        """An admission looked on the device for ``keys`` in vain: what displaced them did harm."""
        if self._displaced:
            self.end([self._displaced[key] for key in keys if key in self._displaced], "harmful")

    def end_all(self, fate: Fate) -> None:
        """All that are left end so."""
        self.end(list(self._open), fate)


class Children:
    """Which blocks of lower tiers continue a content: entries are checked when they are read, and swept now and then.

    O(1) to add, amortised; a sweep looks at every such block.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._of: dict[object, list[Block]] = {}
        self._entries = 0

    def add(self, block: Block) -> None:
        """``block`` can be found in its tier from now on."""
        self._of.setdefault(block.parent, []).append(block)
        self._entries += 1
        if self._entries > 2 * len(self._blocks) + 64:
            stored = sorted((b for b in self._blocks if b.key is not None), key=lambda b: b.born)
            self._of, self._entries = {}, 0
            for each in stored:
                self._of.setdefault(each.parent, []).append(each)
                self._entries += 1

    def of(self, serial: int) -> list[Block]:
        """Return the blocks that continue content ``serial``, latest first: copies in two tiers both."""
        found = self._of.get(serial, ())
        return list(dict.fromkeys(b for b in reversed(found) if b.key is not None and b.parent == serial))
