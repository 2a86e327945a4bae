"""Synthetic text in two forms: token by token, or one id for every block of it.

A generator composes its prompts of pieces (a system prompt, a document, a question) and need not know which form they
take. Given the same seed both forms have the same lengths and share the same whole blocks.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Hashable
from typing import Protocol

from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt


class Text(Protocol):
    """A text that grows at its end."""

    def fork(self) -> Text:
        """Return an independent copy."""

    def add(self, n: int) -> list[int] | None:
        """Append ``n`` tokens that occur nowhere else; return them, or None where only hashes are known."""

    def add_shared(self, key: Hashable, n: int) -> None:
        """Append the piece called ``key``, ``n`` tokens long, which is the same wherever it is appended."""

    def prompt(self) -> list[int] | HashedPrompt:
        """Return the text so far as a prompt."""


def empty_text(rng: random.Random, hash_block: int | None) -> Text:
    """Return an empty text of content ids, or of hashes of ``hash_block`` tokens each.

    Forks of one text draw from one supply: what `add` appends to any of them occurs in no other.
    """
    if hash_block is None:
        return TokenText(_Tokens(random.Random(rng.getrandbits(64))))
    if isinstance(hash_block, bool) or not isinstance(hash_block, int) or hash_block < 1:
        raise WorkloadError(f"hash_block must be None or a whole number of at least 1, not {hash_block!r}")
    # The token form takes a seed here; so does this one, and what is drawn after it is the same.
    rng.getrandbits(64)
    return HashedText(_Ids(), hash_block)


class _Tokens:
    """Random content ids of 30 bits, and the shared pieces made so far."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seed = rng.getrandbits(64)
        self._pieces: dict[Hashable, list[int]] = {}

    def take(self, n: int) -> list[int]:
        return _draw_ids(self._rng, n)

    def piece(self, key: Hashable, n: int) -> list[int]:
        if key not in self._pieces:
            # Seeded by its name and not by when it is first needed, so a piece is the same in any order of use.
            self._pieces[key] = _draw_ids(random.Random(f"{self._seed}/{key!r}"), n)
        return self._pieces[key]


def _draw_ids(rng: random.Random, n: int) -> list[int]:
    return [word >> 2 for word in struct.unpack(f"<{n}I", rng.randbytes(4 * n))]


class TokenText:
    """Text token by token."""

    def __init__(self, supply: _Tokens, tokens: list[int] | None = None) -> None:
        self._supply = supply
        self._tokens = [] if tokens is None else tokens

    def fork(self) -> TokenText:
        """Return an independent copy."""
        return TokenText(self._supply, self._tokens.copy())

    def add(self, n: int) -> list[int]:
        """Append ``n`` fresh tokens and return them."""
        tokens = self._supply.take(n)
        self._tokens += tokens
        return tokens

    def add_shared(self, key: Hashable, n: int) -> None:
        """Append the piece called ``key``."""
        self._tokens += self._supply.piece(key, n)

    def prompt(self) -> list[int]:
        """Return a copy of the tokens."""
        return self._tokens.copy()


class _Ids:
    """Numbers for blocks, and what is known of shared beginnings: (beginning, piece) to (its ids, length, name)."""

    def __init__(self) -> None:
        self._next = 0
        self.beginnings: dict[tuple[int, Hashable], tuple[tuple[int, ...], int, int]] = {}

    def take(self, n: int) -> range:
        self._next += n
        return range(self._next - n, self._next)


class HashedText:
    """Text block by block: whole blocks have ids, and what follows the last of them is only counted."""

    def __init__(
        self,
        supply: _Ids,
        block: int,
        ids: list[int] | None = None,
        length: int = 0,
        beginning: int | None = 0,
    ) -> None:
        self._supply, self._block = supply, block
        self._ids = [] if ids is None else ids
        self._length = length
        self._beginning = beginning
        """Number of the shared beginning that the text is so far; None once it is a text of its own."""

    def fork(self) -> HashedText:
        """Return an independent copy."""
        return HashedText(self._supply, self._block, self._ids.copy(), self._length, self._beginning)

    def add(self, n: int) -> None:
        """Append ``n`` tokens that occur nowhere else."""
        self._beginning = None
        self._grow(n)

    def add_shared(self, key: Hashable, n: int) -> None:
        """Append the piece called ``key``: the same ids if all before it is shared too, fresh ones if not."""
        if self._beginning is None:
            return self._grow(n)
        known = self._supply.beginnings
        at = (self._beginning, key)
        if at in known:
            ids, self._length, self._beginning = known[at]
            self._ids = list(ids)
        else:
            self._grow(n)
            self._beginning = len(known) + 1
            # A tuple of numbers, since the garbage collector does not look into it again and again.
            known[at] = (tuple(self._ids), self._length, self._beginning)

    def _grow(self, n: int) -> None:
        self._length += n
        self._ids.extend(self._supply.take(self._length // self._block - len(self._ids)))

    def prompt(self) -> HashedPrompt:
        """Return the hashes; a partial last block gets an id of its own each time."""
        partial = self._supply.take(1) if self._length % self._block else ()
        return HashedPrompt((*self._ids, *partial), self._length, self._block)
