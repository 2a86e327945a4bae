"""Slot `lookup`: never a wrong match (law 3), not even when hashes collide or tenants ask for the same."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scenario, examples, says_the_truth, scenarios, servable, serve
from test_cache_machine import random_walk
from test_law5_stub import orphans

from pagedlab.cache.kv_cache import KVCache
from pagedlab.cache.table import BlockTable
from pagedlab.policies import Block, Lookup
from pagedlab.policies import lookup as lookup_module
from pagedlab.policies.block import Origin, Stretch
from pagedlab.policies.lookup import Prefix, salt_key
from pagedlab.registry import make

SHARING = [n for n in servable("lookup") if make("lookup", n).granularity != "none"]  # type: ignore[attr-defined]
COLLIDING: dict[str, Callable[[Any], int]] = {
    "constant": lambda value: 7,
    "two values": lambda value: builtins.hash(value) % 2,
    "last token": lambda value: (
        value[1][-1] if isinstance(value, tuple) and isinstance(value[1], tuple) else 0
    ),
    "forgets the parent": lambda value: builtins.hash(value[1]),
}


class Published:
    """A lookup fed directly: whole sequences are published block by block."""

    def __init__(self, name: str, block_size: int, num_tiers: int = 1) -> None:
        lookup = make("lookup", name)
        assert isinstance(lookup, Lookup)
        self.lookup = lookup
        self.size = block_size
        self.truth: dict[Block, tuple[Any, tuple[int, ...]]] = {}
        self.count = 0
        self.at_once = False
        lookup.reset(block_size=block_size, num_tiers=num_tiers)

    def publish(self, tokens: list[int], salt: Any = None) -> None:
        """Have the blocks of a prompt published, in turn one by one and all at once."""
        prefix, full = Prefix(list(tokens), self.size, salt), len(tokens) // self.size
        if not full:
            return
        keys, contents = prefix.named(0, full)
        stretch = Stretch(keys, contents, (salt,), None, 0, self.size, Origin(salt=salt))
        blocks = [Block(self.count + i) for i in range(full)]
        for i, block in enumerate(blocks):
            block.key, block.stretch, block.depth = keys[i], stretch, i * self.size
        self.count += full
        self.at_once = not self.at_once
        if self.at_once:
            answers = dict(self.lookup.publish_chain(blocks))
        else:
            answers = dict(Lookup.publish_chain(self.lookup, blocks))
        for i, block in enumerate(blocks):
            self.truth[block] = salt, tuple(tokens[: (i + 1) * self.size])
            answer = answers.get(i)
            if answer is not None and answer.displaced is not None:
                self.lose(answer.displaced)
            if answer is not None and not answer.indexed:
                self.lose(block)

    def lose(self, block: Block) -> None:
        del self.truth[block]
        block.blank()

    def forget(self, choice: int) -> None:
        if self.truth:
            block = list(self.truth)[choice % len(self.truth)]
            self.lookup.forget(block)
            self.lose(block)

    def check(self, tokens: list[int], salt: Any = None) -> int:
        """Ask, and hold every block of the answer against what it really holds."""
        match = self.lookup.match(Prefix(list(tokens), self.size, salt), len(tokens))
        whole = len(match.blocks)
        assert whole * self.size <= match.num_tokens <= len(tokens)
        for i, block in enumerate(match.blocks):
            assert self.truth[block] == (salt, tuple(tokens[: (i + 1) * self.size])), "a wrong match"
        if match.partial is not None:
            its_salt, its_tokens = self.truth[match.partial]
            assert its_salt == salt
            assert its_tokens[: match.num_tokens] == tuple(tokens[: match.num_tokens]), (
                "a wrong partial match"
            )
            assert len(its_tokens) == (whole + 1) * self.size
        else:
            assert match.num_tokens == whole * self.size
        return match.num_tokens


SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=10), st.sampled_from((None, "a", "b"))),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("collision", [None, *COLLIDING])
@pytest.mark.parametrize("name", SHARING)
@settings(max_examples=examples(0.5))
@given(sequences=SEQUENCES, block_size=st.integers(1, 3), forget=st.lists(st.integers(0, 99), max_size=4))
def test_never_a_wrong_match(
    name: str,
    collision: str | None,
    sequences: list[tuple[list[int], Any]],
    block_size: int,
    forget: list[int],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if collision is not None:
            patch.setattr(lookup_module, "hash", COLLIDING[collision], raising=False)
            patch.setattr(lookup_module, "salt_key", lambda salt: 0)
        index = Published(name, block_size)
        for tokens, salt in sequences:
            index.publish(tokens, salt)
            if collision is None:
                found = index.check(tokens, salt)
                assert found >= len(tokens) // block_size * block_size, "what was just published is found"
        for choice in forget:
            index.forget(choice)
        for tokens, salt in sequences:
            for other in (None, "a", "b"):
                index.check(tokens, other)
            index.check([*tokens, 0, 1, 2], salt)


def test_what_follows_in_a_stretch_is_held_against_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal keys in the right place of a stretch, and other tokens."""
    monkeypatch.setattr(lookup_module, "hash", COLLIDING["last token"], raising=False)
    index = Published("chained-hash", 2)
    index.publish([0, 1, 1, 2, 2, 3])
    assert index.check([0, 1, 1, 2, 2, 3]) == 6
    assert index.check([0, 1, 0, 2, 2, 3]) == 2
    assert index.check([0, 1, 1, 2, 1, 3]) == 4


@pytest.mark.parametrize("collision", list(COLLIDING))
def test_collisions_never_change_what_is_said(collision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same law through cache and engine: displaced, refused and doubly published blocks included."""
    monkeypatch.setattr(lookup_module, "hash", COLLIDING[collision], raising=False)
    monkeypatch.setattr(lookup_module, "salt_key", lambda salt: 0)

    @settings(max_examples=examples(0.7))
    @given(scenarios(choose={"lookup": ("chained-hash",), "swap": ("host", "drop")}))
    def run(scenario: Scenario) -> None:
        says_the_truth(serve(scenario), scenario)

    run()
    scenario = orphans()
    says_the_truth(serve(scenario), scenario)


@pytest.mark.parametrize("collision", list(COLLIDING))
def test_collisions_leave_the_cache_whole(collision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_module, "hash", COLLIDING[collision], raising=False)
    monkeypatch.setattr(lookup_module, "salt_key", lambda salt: 0)
    for seed in range(examples(0.3)):
        random_walk(seed, steps=60)


@pytest.mark.parametrize("name", servable("lookup"))
@given(tokens=st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_tenants_never_share(name: str, tokens: list[int]) -> None:
    cache = KVCache(
        num_blocks=32,
        block_size=2,
        allocator=make("allocator", "free-list"),  # type: ignore[arg-type]
        lookup=make("lookup", name),  # type: ignore[arg-type]
        eviction=make("eviction", "lru"),  # type: ignore[arg-type]
        swap=make("swap", "drop"),  # type: ignore[arg-type]
    )
    salts = (None, "", "a", "b", 0, ("a",), ("a", "b"))
    for i, salt in enumerate(salts):
        table = BlockTable(i, Prefix(list(tokens), 2, salt), len(tokens) + 1)
        found = cache.match(table.prefix, len(tokens))
        assert found.num_tokens == 0, f"{salt!r} was given what another tenant computed"
        assert cache.admit(table, found, len(tokens))
        cache.commit(table, len(tokens))
        cache.release(table)
        again = cache.match(table.prefix, len(tokens)).num_tokens
        whole = len(tokens) // 2 * 2
        assert again == (0 if cache.lookup.granularity == "none" else whole)


@pytest.mark.parametrize("name", SHARING)
def test_an_orphan_is_not_used_and_its_copy_takes_its_place(name: str) -> None:
    index = Published(name, 2)
    index.publish([1, 2, 3, 4, 5, 6])
    first = next(iter(index.truth))
    index.lookup.forget(first)
    del index.truth[first]
    assert index.check([1, 2, 3, 4, 5, 6]) == 0
    index.publish([1, 2])
    assert index.check([1, 2, 3, 4, 5, 6]) == 2, "the orphans were computed after another content"
    index.publish([1, 2, 3, 4, 5, 6])
    assert index.check([1, 2, 3, 4, 5, 6]) == 6


def test_radix_goes_into_the_middle_of_a_block_and_takes_the_longest_way() -> None:
    index = Published("radix", 4)
    index.publish([1, 2, 3, 4, 5, 6, 7, 8])
    index.publish([1, 2, 3, 4, 5, 6, 0, 0])
    index.publish([1, 9, 9, 9])
    assert index.check([1, 2, 3, 4, 5, 6, 7, 1]) == 7
    assert index.check([1, 2, 3, 4, 5, 6, 0, 1]) == 7
    assert index.check([1, 2, 3]) == 3
    assert index.check([1, 9, 0]) == 2
    assert index.check([0]) == 0


def test_chained_hash_matches_whole_blocks_only() -> None:
    index = Published("chained-hash", 4)
    index.publish([1, 2, 3, 4, 5, 6, 7, 8])
    assert index.check([1, 2, 3, 4, 5, 6, 7]) == 4
    assert index.check([1, 2, 3]) == 0


@pytest.mark.parametrize("name", SHARING)
def test_the_highest_tier_answers_and_copies_are_one_content(name: str) -> None:
    index = Published(name, 2, num_tiers=2)
    index.publish([1, 2])
    (device,) = index.truth
    copy = Block(0, tier=1)
    copy.stand_for(device, 1, 0)
    published = index.lookup.publish(copy)
    copy.serial = published.serial
    assert published.indexed
    assert published.serial == device.serial
    assert index.lookup.copy_in(device, 1) is copy
    assert index.lookup.copy_in(copy, 0) is device
    assert index.lookup.match(Prefix([1, 2], 2), 2).blocks == [device]
    index.lookup.forget(device)
    assert index.lookup.copy_in(copy, 0) is None
    assert index.lookup.match(Prefix([1, 2], 2), 2).blocks == [copy]
    index.lookup.forget(copy)
    assert index.lookup.match(Prefix([1, 2], 2), 2).num_tokens == 0


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("collision", [None, *COLLIDING])
@settings(max_examples=examples(0.4))
@given(
    tokens=st.lists(st.integers(0, 1), max_size=12),
    turns=st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 1), max_size=12), st.integers(0, 30)), max_size=12
    ),
    size=st.integers(1, 3),
)
def test_asking_again_is_asking_afresh(
    name: str,
    collision: str | None,
    tokens: list[int],
    turns: list[tuple[bool, list[int], int]],
    size: int,
) -> None:
    """A waiting sequence is looked up again and again with one prefix object, while the index changes under it."""
    with pytest.MonkeyPatch.context() as patch:
        if collision is not None:
            patch.setattr(lookup_module, "hash", COLLIDING[collision], raising=False)
        index = Published(name, size)
        waiting = Prefix(list(tokens), size)
        for grows, other, choice in turns:
            if grows:
                index.publish(other)
            else:
                index.forget(choice)
            at_most = choice % (len(tokens) + 1)
            for limit in (len(tokens), at_most):
                again = index.lookup.match(waiting, limit)
                assert again == index.lookup.match(Prefix(list(tokens), size), limit)


@settings(max_examples=examples(1.0))
@given(
    tokens=st.lists(st.integers(0, 5), max_size=20), cuts=st.lists(st.integers(0, 20)), size=st.integers(1, 4)
)
def test_keys_do_not_depend_on_when_they_are_asked_for(tokens: list[int], cuts: list[int], size: int) -> None:
    grown: list[int] = []
    prefix = Prefix(grown, size, "t")
    for cut in sorted(cuts):
        grown += tokens[len(grown) : cut]
        prefix.keys(len(grown) // size)
    grown += tokens[len(grown) :]
    full = len(tokens) // size
    assert prefix.keys(full)[:full] == Prefix(list(tokens), size, "t").keys(full)
    assert [t for content in prefix.contents(full)[:full] for t in content] == tokens[: full * size]  # type: ignore[attr-defined]


def test_keys_are_the_same_in_every_process() -> None:
    """A trace names blocks by them; Python's own hash of a text would differ from one process to the next."""
    code = (
        "from pagedlab.policies.lookup import Prefix; "
        "print([Prefix([1, 2, 3, 4], 2, s).keys(2) for s in (None, 'a', ('a', 1))])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{[Prefix([1, 2, 3, 4], 2, s).keys(2) for s in (None, 'a', ('a', 1))]}\n"}
    assert salt_key(None) == 0
