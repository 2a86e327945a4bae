"""Prompts of which only hashes are known, as public traces have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload


class HashedPrompt(Sequence[int]):
    """A prompt of ``num_tokens`` tokens, known by one id for every ``hash_block`` of them.

    Equal ids mean equal tokens *and* an equal prefix before them (chained), so a block is found by its id alone. The
    last id may stand for a partial block; such a block is never found by anyone, and its id is kept only so that
    streams of accesses can be counted as they were published. As a sequence, the prompt shows content ids: numbers
    that are equal where tokens are equal.

    >>> prompt = HashedPrompt([7, 9], 600, 512)
    >>> len(prompt), prompt[511], prompt[512]
    (600, 4095, 4608)
    """

    __slots__ = ("hash_block", "hash_ids", "num_tokens")

    def __init__(self, hash_ids: Sequence[int], num_tokens: int, hash_block: int) -> None:
        if hash_block < 1:
            raise ValueError(f"hash_block must be 1 or more, not {hash_block}")
        if len(hash_ids) != -(-num_tokens // hash_block):
            raise ValueError(
                f"{num_tokens} tokens in blocks of {hash_block} need {-(-num_tokens // hash_block)} ids, "
                f"not {len(hash_ids)}"
            )
        self.hash_ids = tuple(hash_ids)
        self.num_tokens = num_tokens
        self.hash_block = hash_block

    @property
    def num_full(self) -> int:
        """Ids that stand for a whole block."""
        return self.num_tokens // self.hash_block

    def __len__(self) -> int:
        return self.num_tokens

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        if isinstance(at, slice):
            return [self._token(i) for i in range(*at.indices(self.num_tokens))]
        if not -self.num_tokens <= at < self.num_tokens:
            raise IndexError(at)
        return self._token(at % self.num_tokens)

    def _token(self, i: int) -> int:
        return self.hash_ids[i // self.hash_block] * self.hash_block + i % self.hash_block

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashedPrompt) and (self.hash_ids, self.num_tokens, self.hash_block) == (
            other.hash_ids,
            other.num_tokens,
            other.hash_block,
        )

    def __hash__(self) -> int:
        return hash((self.hash_ids, self.num_tokens, self.hash_block))

    def __repr__(self) -> str:
        return f"<{self.num_tokens} tokens as {len(self.hash_ids)} hashes of {self.hash_block}>"


class HashedTokens:
    """The tokens of a sequence whose prompt is hashed: it knows how many there are, and takes more.

    Sliced, it shows content ids; what was generated has ids below zero, which no prompt shares.
    """

    __slots__ = ("generated", "prompt", "unique")

    def __init__(self, prompt: HashedPrompt, unique: int, generated: int = 0) -> None:
        self.prompt = prompt
        self.unique = unique
        """A number that no other sequence of the run has."""
        self.generated = generated

    def __len__(self) -> int:
        return self.prompt.num_tokens + self.generated

    def append(self, token: int) -> None:
        """One more generated token, whatever it is."""
        self.generated += 1

    def __getitem__(self, at: slice) -> list[int]:
        known = self.prompt.num_tokens
        start, stop, _ = at.indices(len(self))
        made = [private_id(self.unique, i - known) for i in range(max(start, known), stop)]
        return self.prompt[start : min(stop, known)] + made


def private_id(unique: int, i: int) -> int:
    """Return a content id for the i-th thing that sequence ``unique`` generated: below zero, and nobody else's."""
    return -2 - (unique << 32 | i)
