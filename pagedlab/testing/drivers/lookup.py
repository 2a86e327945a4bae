"""Blocks of two tiers around a prefix index, and the naive search that it must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pagedlab.policies.block import DEVICE, GONE, HOST, Block, Stretch
from pagedlab.policies.lookup import Prefix
from pagedlab.testing.driver import Driver

SALTS = (None, "a", "b")
_FEW = 3
"""Different hashes where they are to collide."""


class Colliding(Prefix):
    """A prefix whose hashes are so short that different blocks meet."""

    def keys(self, num_blocks: int) -> list[int]:
        """Return hashes of at least the first blocks, each one of few."""
        have = len(self._keys)
        super().keys(num_blocks)
        self._keys[have:] = [key % _FEW for key in self._keys[have:]]
        return self._keys


class Index(Driver):
    """Published blocks, each with the content that it stands for.

    Options: ``collide`` shortens the hashes, ``quick`` uses the short cuts, ``look`` False leaves out `match`, and True
    tells of each.
    """

    operations: ClassVar[tuple[str, ...]] = (
        "publish",
        "match",
        "forget",
        "copy",
        "forget_run",
        "match_longer",
    )

    def begin(self, codes: Sequence[int]) -> None:
        """Reset to an empty index."""
        self.collides = self.options.get("collide", False)
        self.quick = self.options.get("quick", False)
        self.looks = self.options.get("look", True)
        self.shares = self.policy.granularity != "none"
        self.block_size = 1 + self.size % 3
        self.blocks: list[Block] = []
        """Findable blocks, as far as the index has said so."""
        self.stands_for: dict[Block, tuple[Any, tuple[int, ...]]] = {}
        """Salt and all tokens up to the end of each block that was ever published."""
        self.serials: dict[int, tuple[Any, tuple[int, ...]]] = {}
        self.ask("reset", self.policy.reset, block_size=self.block_size, num_tiers=2)

    def prompt(self, argument: int) -> tuple[Any, list[int]]:
        """Return salt and tokens: paths of a small tree, up to four blocks long."""
        salt = SALTS[(argument // 8) % 3]
        first, rest = argument % 2, argument // 2 % 4
        tokens = [first] + [(argument >> i) % 2 for i in range(4)] * 3
        return salt, tokens[: self.block_size * (1 + rest)]

    def prefix(self, salt: Any, tokens: list[int]) -> Prefix:
        """Return a prefix of the kind that this run uses."""
        kind = Colliding if self.collides else Prefix
        return kind(tokens, self.block_size, salt)

    # ---- operations ----------------------------------------------------------------------------------------------

    def publish(self, argument: int) -> None:
        """A sequence has computed its blocks: those that are not there yet are published."""
        salt, tokens = self.prompt(argument)
        prefix, size = self.prefix(salt, tokens), self.block_size
        full = len(tokens) // size
        found = self.naive(salt, tokens)[0]
        if not self.shares or len(found) >= full:
            return
        first = len(found)
        keys, contents = prefix.named(first, full)
        stretch = Stretch(keys, contents, (salt,), None, first * size, size)
        if found:
            stretch.parent, stretch.parent_key = found[-1].serial, found[-1].key
        fresh: list[Block] = []
        for i, key in enumerate(keys, first):
            block = Block(len(self.stands_for) + len(fresh), DEVICE, size)
            block.key, block.stretch, block.depth = key, stretch, i * size
            fresh.append(block)
        for i, block in enumerate(fresh, first):
            self.stands_for[block] = salt, tuple(tokens[: (i + 1) * size])
        said = f"publish {self.show(salt, tokens)}"
        if self.quick:
            special = dict(self.ask(said, self.policy.publish_chain, fresh))
            for i, block in enumerate(fresh):
                answer = special.get(i)
                self.take(block, answer is None or answer.indexed, answer and answer.displaced)
        else:
            for block in fresh:
                answer = self.ask(said, self.policy.publish, block)
                stretch.name((answer.serial,))
                if block.stretch is not stretch:  # the policy has changed something about the block
                    block.serial = answer.serial
                self.take(block, answer.indexed, answer.displaced)
        self.tell(said, [(b.index, b.serial, b.key) for b in fresh])
        for block in fresh:
            self.identified(block)

    def take(self, block: Block, indexed: bool, displaced: Block | None) -> None:
        """Note what the index made of a published block."""
        if displaced is not None and displaced in self.blocks:
            self.blocks.remove(displaced)
            displaced.blank()
        if indexed:
            self.blocks.append(block)
        else:
            block.key = None

    def identified(self, block: Block) -> None:
        """One serial, one content."""
        if block.serial == GONE:  # it made way for a later block of the same prompt
            return
        content = self.stands_for[block]
        if self.serials.setdefault(block.serial, content) != content:
            raise self.broke(
                "serials_identify_content",
                f"serial {block.serial} stands for {self.show(*self.serials[block.serial])} and {self.show(*content)}",
            )

    def copy(self, argument: int) -> None:
        """A copy of a block's content appears in the host tier."""
        here = [b for b in self.blocks if b.tier == DEVICE]
        if not here:
            return
        block = here[argument % len(here)]
        shown = self.show(*self.stands_for[block])
        known = self.ask("copy_in", self.policy.copy_in, block, HOST)
        ours = next((b for b in self.blocks if b.tier == HOST and b.serial == block.serial), None)
        if known is not ours:
            raise self.broke("copies_are_found", f"copy_in({shown}, host) returned {known!r}, not {ours!r}")
        if ours is not None:
            return
        copy = Block(len(self.stands_for), HOST, self.block_size)
        copy.stand_for(block, 1, 0)
        self.stands_for[copy] = self.stands_for[block]
        answer = self.ask(f"publish {shown} on the host", self.policy.publish, copy)
        self.take(copy, answer.indexed, answer.displaced)
        self.tell(f"copy {shown} to the host", (copy.index, answer.serial, copy.key))

    def forget(self, argument: int) -> None:
        """One block is given up."""
        if self.blocks:
            self.lose([self.blocks[argument % len(self.blocks)]])

    def forget_run(self, argument: int) -> None:
        """Several blocks of one tier are given up."""
        tier = argument % 2
        self.lose([b for b in self.blocks if b.tier == tier][argument // 2 % 5 :][:3])

    def lose(self, blocks: list[Block]) -> None:
        """Give up blocks."""
        if not blocks:
            return
        said = "forget " + " and ".join(self.show(*self.stands_for[b]) for b in blocks)
        if self.quick:
            self.ask(said, self.policy.forget_all, blocks)
        else:
            for block in blocks:
                self.ask(said, self.policy.forget, block)
        for block in blocks:
            self.blocks.remove(block)
            block.blank()
        self.tell(said)

    def match(self, argument: int) -> None:
        """Somebody looks for a prompt."""
        salt, tokens = self.prompt(argument)
        self.look(salt, tokens, len(tokens) - argument % 2)

    def match_longer(self, argument: int) -> None:
        """Somebody looks for a prompt that goes on after what may be cached."""
        salt, tokens = self.prompt(argument)
        self.look(salt, [*tokens, 0, 1, 1], len(tokens) + argument % 4)

    def finish(self) -> None:
        """Look for several prompts."""
        for argument in range(0, 48, 9):
            self.match_longer(argument)

    # ---- what must hold ------------------------------------------------------------------------------------------

    def look(self, salt: Any, tokens: list[int], limit: int) -> None:
        """Ask `match`, three times over."""
        if not self.looks:
            return
        prefix = self.prefix(salt, tokens)
        said = f"match {self.show(salt, tokens)}" + (f" up to {limit}" if limit < len(tokens) else "")
        found = self.ask(said, self.policy.match, prefix, limit)
        told = f"{said} found {found.num_tokens} token{'s' * (found.num_tokens != 1)}"
        self.legal(told, salt, tokens, limit, found)
        again = self.ask(said, self.policy.match, self.prefix(salt, tokens), limit)
        if again != found:
            raise self.broke("looking_is_not_using", f"{told}, and then {again.num_tokens}")
        kept = self.ask(said, self.policy.match, prefix, limit)
        if kept != found:
            raise self.broke(
                "looking_is_not_using", f"{told}, and {kept.num_tokens} when the same prefix was asked again"
            )
        if self.options.get("look"):
            self.tell(told, aside=True)

    def legal(self, told: str, salt: Any, tokens: list[int], limit: int, found: Any) -> None:
        """Say which law an answer breaks."""
        size = self.block_size
        given = [*found.blocks, *([found.partial] if found.partial is not None else [])]
        for i, block in enumerate(given):
            if block not in self.blocks:
                raise self.broke(
                    "forgotten_blocks_are_not_found",
                    f"{told}, in a block of {self.show(*self.stands_for.get(block, (None, ())))} that is gone",
                )
            whose, content = self.stands_for[block]
            known = f"{told}, in a block of {self.show(whose, content)}"
            if whose != salt:
                raise self.broke("salts_isolate", known)
            fits = size if i < len(found.blocks) else found.num_tokens % size
            if content[: i * size + fits] != tuple(tokens[: i * size + fits]):
                raise self.broke("contents_never_mix", known)
        if found.num_tokens > limit:
            raise self.broke("limit_is_kept", told)
        path, num_tokens = self.naive(salt, tokens, limit)
        if found.num_tokens != num_tokens or len(found.blocks) != len(path):
            raise self.broke("longest_prefix_is_found", f"{told}, and {num_tokens} are cached")
        if [b.tier for b in found.blocks] != [b.tier for b in path]:
            raise self.broke("highest_copy_is_given", f"{told}, in a lower tier than need be")

    def naive(self, salt: Any, tokens: list[int], limit: int | None = None) -> tuple[list[Block], int]:
        """Return the longest cached prefix by looking at every findable block."""
        size, limit = self.block_size, len(tokens) if limit is None else limit
        parent: Any = (salt,)
        path: list[Block] = []
        if not self.shares:
            return path, 0
        for i in range(limit // size):
            want = tuple(tokens[i * size : (i + 1) * size])
            copies = [b for b in self.blocks if b.parent == parent and b.content == want]
            if not copies:
                break
            path.append(min(copies, key=lambda b: b.tier))
            parent = path[-1].serial
        start = len(path) * size
        if self.policy.granularity != "token":
            return path, start
        rest = tokens[start : min(start + size, limit)]
        tails = [0]
        for block in self.blocks:
            if block.parent == parent:
                equal = [a == b for a, b in zip(block.content, rest)]  # type: ignore[call-overload]
                tails.append(equal.index(False) if False in equal else len(equal))
        return path, start + max(tails)

    def show(self, salt: Any, tokens: Sequence[int]) -> str:
        """Return tokens as a word, blocks apart."""
        size = self.block_size
        words = ["".join(map(str, tokens[i : i + size])) for i in range(0, len(tokens), size)]
        return f"[{' '.join(words)}]" + (f" of tenant {salt}" if salt is not None else "")
