"""Slot `lookup`: how a prompt finds its cached prefix.

A lookup is an index over the blocks whose content is complete, in every tier. `match` answers for a `Prefix`
and changes nothing; `publish` adds a block once its keys and values are computed; `forget` takes one out.
Identity is a chain: a block is the continuation of one particular content (``block.parent`` is that content's
``serial``, or the salt for a first block), and a hit is verified against parent and tokens, never trusted to
a hash. A block whose parent is gone is an orphan: it is not used any more, and a recomputed copy takes its
place.

``granularity`` says what `match` can return: whole blocks, or also the beginning of one, which the cache then
copies.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, islice
from typing import ClassVar, Literal, NamedTuple

from pagedlab.errors import ConfigError
from pagedlab.policies.base import Policy
from pagedlab.policies.block import DEVICE, NOWHERE, Block, Stretch
from pagedlab.policies.prompt import HashedTokens, private_id
from pagedlab.registry import register


@lru_cache(maxsize=4096)
def salt_key(salt: Hashable) -> int:
    """Return the number that starts a tenant's hash chain: the same in every process, 0 for no salt."""
    if salt is None:
        return 0
    return int.from_bytes(blake2b(repr(salt).encode(), digest_size=8).digest(), "big", signed=True)


class Prefix:
    """The tokens of one sequence as a lookup sees them: cut into blocks, with the chained hashes remembered.

    ``tokens`` may grow at its end; what was asked once is not computed again. ``key(i)`` is the hash of
    ``(key(i - 1), content(i))``, in Python's own hash of integers, which is the same in every process.
    """

    __slots__ = ("_contents", "_keys", "block_size", "found", "salt", "tokens")

    def __init__(self, tokens: list[int], block_size: int, salt: Hashable = None) -> None:
        self.tokens = tokens
        self.block_size = block_size
        self.salt = salt
        self._contents: list[Hashable] = []
        self._keys: list[int] = []
        self.found: tuple[list[Block], list[Stretch]] | None = None
        """For the lookup to note what it found last: blocks, and what they held then."""

    def keys(self, num_blocks: int) -> list[int]:
        """Return chained hashes of at least the first ``num_blocks`` full blocks (a list that belongs to the
        prefix).
        """
        keys = self._keys
        have = len(keys)
        if have < num_blocks:
            size, tokens, contents = self.block_size, self.tokens, self._contents
            key = keys[-1] if keys else salt_key(self.salt)
            for start in range(have * size, num_blocks * size, size):
                content = tuple(tokens[start : start + size])
                key = hash((key, content))
                contents.append(content)
                keys.append(key)
        return keys

    def contents(self, num_blocks: int) -> list[Hashable]:
        """Return the token ids of at least the first ``num_blocks`` full blocks, a tuple each."""
        self.keys(num_blocks)
        return self._contents

    def named(self, first: int, last: int) -> tuple[list[int], list[Hashable]]:
        """Return hashes and token ids of the full blocks ``first`` to ``last`` (exclusive)."""
        keys = self.keys(last)[first:last]
        return keys, keys if self._contents is self._keys else self._contents[first:last]  # type: ignore[return-value]

    def forget(self) -> None:
        """Let go of all that can be computed again: nobody will ask soon."""
        self._keys, self._contents, self.found = [], [], None

    def __len__(self) -> int:
        return len(self.tokens)

    def piece(self, start: int, stop: int) -> Sequence[int]:
        """Return the token ids from ``start`` to ``stop``; nothing where only hashes are known."""
        return self.tokens[start:stop]


class HashedPrefix(Prefix):
    """A prefix of which only the prompt's hashes are known; what is generated gets keys of its own and is never hit.

    A block of the cache may be a hashed block, several of them, or an even part of one (the i-th part of hash h is
    ``h * parts + i``). A chained hash stands for all before it, so it is the key as it is. A partial last hash, and
    what follows in its block, is private.
    """

    __slots__ = ()

    tokens: HashedTokens  # type: ignore[assignment]

    def __init__(self, tokens: HashedTokens, block_size: int, salt: Hashable = None) -> None:
        super().__init__(tokens, block_size, salt)  # type: ignore[arg-type]
        size = tokens.prompt.hash_block
        if size % block_size and block_size % size:
            raise ConfigError(
                f"block_size {block_size} does not fit hashes of {size} tokens: one must be a multiple of the other"
            )

    def keys(self, num_blocks: int) -> list[int]:
        """Return keys of at least the first ``num_blocks`` blocks."""
        keys = self._keys
        if len(keys) < num_blocks:
            if not keys:
                # One list is enough: what identifies a hashed block is its key.
                self._keys = self._contents = keys = self._prompt_keys()  # type: ignore[assignment]
            unique = self.tokens.unique
            while len(keys) < num_blocks:
                keys.append(private_id(unique, len(keys)))
        return keys

    def _prompt_keys(self) -> list[int]:
        prompt, block_size = self.tokens.prompt, self.block_size
        size, ids = prompt.hash_block, prompt.hash_ids[: prompt.num_full]
        if size == block_size:
            known = list(ids)
        elif size > block_size:
            parts = size // block_size
            known = list(chain.from_iterable([range(h * parts, h * parts + parts) for h in ids]))
        else:
            parts = block_size // size
            known = list(ids[parts - 1 :: parts])
        if self.salt is not None:
            start = salt_key(self.salt)
            known = [hash((start, k)) for k in known]
        return known

    def piece(self, start: int, stop: int) -> Sequence[int]:
        """Return nothing: no part of a block can be compared."""
        return ()


def make_prefix(tokens: list[int] | HashedTokens, block_size: int, salt: Hashable = None) -> Prefix:
    """Return the prefix of a sequence, whose tokens are known or only hashed."""
    if isinstance(tokens, HashedTokens):
        return HashedPrefix(tokens, block_size, salt)
    return Prefix(tokens, block_size, salt)


class Match(NamedTuple):
    """What a lookup found: whole blocks in order, and perhaps the first tokens of one more.

    ``num_tokens`` counts all of them; ``partial`` is the block whose first ``num_tokens % block_size`` tokens
    fit.
    """

    blocks: list[Block]
    num_tokens: int
    partial: Block | None = None


NO_MATCH = Match([], 0)


class Published(NamedTuple):
    """What became of a published block.

    ``serial`` is the identity of its content. ``indexed`` is False when an equal block of this tier already
    stands for it. ``displaced`` is an orphan that had to make way.
    """

    serial: int
    indexed: bool
    displaced: Block | None = None


class Lookup(Policy):
    """Contract of a prefix index."""

    slot: ClassVar[str] = "lookup"
    granularity: ClassVar[Literal["none", "block", "token"]] = "block"

    @abstractmethod
    def reset(self, *, block_size: int, num_tiers: int) -> None:
        """Start empty."""

    @abstractmethod
    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        """Return the longest cached prefix of at most ``max_tokens`` tokens, each block in its highest
        tier.
        """

    @abstractmethod
    def publish(self, block: Block) -> Published:
        """Make ``block`` (key, parent, content set) findable; gives a new serial unless the content is
        known.
        """

    def publish_chain(self, blocks: Sequence[Block]) -> Sequence[tuple[int, Published]]:
        """Make ``blocks`` findable, the last of one stretch, in order.

        Adds their serials to the stretch. Returns position and answer of those that were not simply indexed.
        """
        special = []
        stretch = blocks[0].stretch
        together = len(stretch.keys) >= len(blocks)
        for i, block in enumerate(blocks):
            if i and not together:  # a recording's blocks: each has a stretch of its own
                block.parent = blocks[i - 1].serial
            answer = self.publish(block)
            if together:
                stretch.name((answer.serial,))
            if block.stretch is not stretch or not together:
                block.serial = answer.serial
            if not answer.indexed or answer.displaced is not None:
                special.append((i, answer))
        return special

    def expect(self, prefix: Prefix, blocks: list[Block]) -> None:
        """A hint: the sequence of ``prefix`` gives up ``blocks``, the beginning of its chain, and will ask for them.

        What is not findable (key None) is among them, if another block stood for the same content already.
        """

    @abstractmethod
    def forget(self, block: Block) -> None:
        """Take an indexed block out."""

    def forget_all(self, blocks: Sequence[Block]) -> None:
        """`forget` each of ``blocks``, which lie in one tier."""
        for block in blocks:
            self.forget(block)

    @abstractmethod
    def copy_in(self, block: Block, tier: int) -> Block | None:
        """Return the copy of ``block``'s content in ``tier``, if there is one."""


@register("lookup", "none")
class NoLookup(Lookup):
    """Share nothing: every prompt is computed from its first token."""

    granularity: ClassVar[Literal["none", "block", "token"]] = "none"

    def reset(self, *, block_size: int, num_tiers: int) -> None:
        pass

    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        return NO_MATCH

    def publish(self, block: Block) -> Published:
        raise NotImplementedError("lookup 'none' publishes nothing")

    def forget(self, block: Block) -> None:
        pass

    def copy_in(self, block: Block, tier: int) -> Block | None:
        return None


@register("lookup", "chained-hash")
class ChainedHash(Lookup):
    """Find whole blocks by a hash of all tokens up to their end (vLLM). O(1) a block.

    One dictionary a tier, from chained hash to block. An equal hash of other tokens finds the place taken and
    is simply not indexed.
    """

    def reset(self, *, block_size: int, num_tiers: int) -> None:
        self._block_size = block_size
        self._index: list[dict[int, Block]] = [{} for _ in range(num_tiers)]
        self._next_serial = 0

    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        size = self._block_size
        limit = max_tokens // size
        keys = prefix.keys(limit)
        contents = prefix.contents(limit)
        found = self._still_there(prefix, limit)
        start = len(found)
        get, alone = self._index[DEVICE].get, len(self._index) == 1
        # What comes next in the stretch of the block before needs no other proof that it continues that block.
        stretch: Stretch | None = None
        held: Sequence[Hashable] = ()
        at = depth = 0
        for key, content in zip(islice(keys, start, limit), islice(contents, start, None)):
            block = get(key)
            if block is None or block.stretch is not stretch or block.depth != depth or held[at] != content:
                parent = found[-1].serial if found else (prefix.salt,)
                if block is None or not block.holds(content, parent):
                    block = None if alone else self._find(key, content, parent)
                    if block is None:
                        break
                stretch, at, depth = block.stretch, block.at, block.depth
                held = stretch.contents or ()
            found.append(block)
            at += 1
            depth += size
        if not found:
            return NO_MATCH
        if alone and (len(found) > start or prefix.found is None or len(prefix.found[0]) != start):
            prefix.found = found, [b.stretch for b in found]
        return Match(found, len(found) * size)

    def _find(self, key: int, content: Hashable, parent: Hashable) -> Block | None:
        """Return the block that holds ``content`` after ``parent``, in its highest tier."""
        for index in self._index:
            block = index.get(key)
            if block is not None and block.holds(content, parent):
                return block
        return None

    def _still_there(self, prefix: Prefix, limit: int) -> list[Block]:
        """Return the first blocks of the last match that still hold what they held: their stretch says so.

        Who is refused is asked for again, step after step, and most of what was found is found again.
        """
        if prefix.found is None or len(self._index) > 1:
            return []
        blocks, stretches = prefix.found
        now = [b.stretch for b in blocks]
        if now != stretches:
            return blocks[: next(i for i, (a, b) in enumerate(zip(now, stretches)) if a is not b)][:limit]
        return blocks[:limit]

    def expect(self, prefix: Prefix, blocks: list[Block]) -> None:
        if len(self._index) == 1:
            stretches = [b.stretch for b in blocks]
            n = stretches.index(NOWHERE) if NOWHERE in stretches else len(blocks)
            prefix.found = blocks[:n], stretches[:n]

    def publish(self, block: Block) -> Published:
        assert block.key is not None
        displaced = None
        here = self._index[block.tier]
        resident = here.get(block.key)
        if resident is not None:
            if resident.content == block.content:
                if resident.parent == block.parent:
                    return Published(resident.serial, False)
                displaced = resident
            else:
                self._next_serial += 1
                return Published(self._next_serial, False)
        serial = -1
        for index in self._index:
            other = index.get(block.key)
            if other is not None and other.parent == block.parent and other.content == block.content:
                serial = other.serial
        if serial < 0:
            self._next_serial = serial = self._next_serial + 1
        here[block.key] = block
        return Published(serial, True, displaced)

    def publish_chain(self, blocks: Sequence[Block]) -> Sequence[tuple[int, Published]]:
        here, n, stretch = self._index[DEVICE], len(blocks), blocks[0].stretch
        if n == 1 and len(self._index) == 1 and (key := blocks[0].key) not in here:
            here[key] = blocks[0]  # type: ignore[index]
            self._next_serial += 1
            stretch.name([self._next_serial])
            return ()
        keys = stretch.keys[-n:]
        if len(self._index) > 1 or len(keys) != n or not here.keys().isdisjoint(keys):
            return super().publish_chain(blocks)
        before = len(here)
        for key, block in zip(keys, blocks):
            here[key] = block  # type: ignore[index]
        if len(here) != before + n:  # a key that comes twice
            for key in set(keys):
                del here[key]  # type: ignore[arg-type]
            return super().publish_chain(blocks)
        first = self._next_serial + 1
        self._next_serial += n
        stretch.name(range(first, first + n))
        return ()

    def forget(self, block: Block) -> None:
        assert block.key is not None
        if self._index[block.tier].get(block.key) is block:
            del self._index[block.tier][block.key]

    def forget_all(self, blocks: Sequence[Block]) -> None:
        if not blocks:
            return
        here = self._index[blocks[0].tier]
        take = here.pop
        for block in blocks:
            found = take(block.key, None)  # type: ignore[arg-type]
            if found is not block and found is not None:
                here[block.key] = found  # type: ignore[index]

    def copy_in(self, block: Block, tier: int) -> Block | None:
        assert block.key is not None
        copy = self._index[tier].get(block.key)
        return copy if copy is not None and copy.serial == block.serial else None


@register("lookup", "radix")
class RadixTree(Lookup):
    """Walk a tree of blocks, and into the middle of the next one: shares up to the last equal token (SGLang).

    A node is one content; its children hang under its serial and are found by their tokens. The tail of the
    match is the child that agrees with the most further tokens: O(children · block_size) once a match.
    """

    granularity: ClassVar[Literal["none", "block", "token"]] = "token"

    def reset(self, *, block_size: int, num_tiers: int) -> None:
        self._block_size = block_size
        self._children: dict[Hashable, dict[Hashable, list[Block]]] = {}
        self._next_serial = 0

    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        size = self._block_size
        limit = max_tokens // size
        contents = prefix.contents(limit)
        found: list[Block] = []
        parent: Hashable = (prefix.salt,)
        for i in range(limit):
            copies = self._children.get(parent, {}).get(contents[i])
            if not copies:
                break
            found.append(copies[0])
            parent = copies[0].serial
        start = len(found) * size
        rest = prefix.piece(start, min(start + size, max_tokens))
        best, partial = 0, None
        for content, copies in self._children.get(parent, {}).items() if rest else ():
            common = _common(content, rest)  # type: ignore[arg-type]
            if common > best:
                best, partial = common, copies[0]
        return Match(found, start + best, partial) if found or partial else NO_MATCH

    def publish(self, block: Block) -> Published:
        copies = self._children.setdefault(block.parent, {}).setdefault(block.content, [])
        if copies and any(c.tier == block.tier for c in copies):
            return Published(copies[0].serial, False)
        if copies:
            serial = copies[0].serial
        else:
            self._next_serial = serial = self._next_serial + 1
        copies.append(block)
        copies.sort(key=lambda c: c.tier)
        return Published(serial, True)

    def forget(self, block: Block) -> None:
        siblings = self._children.get(block.parent, {})
        copies = siblings.get(block.content, [])
        if block in copies:
            copies.remove(block)
            if not copies:
                del siblings[block.content]
            if not siblings:
                del self._children[block.parent]

    def copy_in(self, block: Block, tier: int) -> Block | None:
        copies = self._children.get(block.parent, {}).get(block.content, [])
        return next((c for c in copies if c.tier == tier), None)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    if not isinstance(a, tuple):  # a hash
        return 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n
