"""Small mistakes to plant in pool, cache, engine and policies, each with the check that must notice it.

A mistake is a piece of a function's source replaced by another one. Planting asserts that the piece is there, so
when the code moves on, the table has to follow.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import test_accounting
import test_allocators
import test_cache_machine
import test_disk_tier
import test_eviction
import test_faults
import test_law5_stub
import test_lookup
import test_ordering
import test_preemption
import test_reservation
import test_scheduler
from strategies import event_rows, says_the_truth, serve

from pagedlab.cache.kv_cache import KVCache
from pagedlab.cache.pool import BlockPool
from pagedlab.engine.engine import Engine
from pagedlab.engine.plan import Plan
from pagedlab.engine.sequence import Sequence
from pagedlab.executors.disk import BlockFile, Spoils
from pagedlab.policies import LFU, LRU, ChainedHash, RadixTree
from pagedlab.policies.allocator import Buddy, FirstFit
from pagedlab.policies.block import Block
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.fair import Fair
from pagedlab.policies.lookup import Prefix
from pagedlab.policies.reservation import Pow2
from pagedlab.policies.swap import DiskTier


def inner(test: Any) -> Callable[..., None]:
    """The function under a Hypothesis test: it is given examples here, the same every time."""
    return test.hypothesis.inner_test  # type: ignore[no-any-return]


# ---- named checks --------------------------------------------------------------------------------------------------


def walks() -> None:
    """Laws 1 to 3 on the cache alone, with a shadow of its content."""
    for seed in range(40):
        test_cache_machine.random_walk(seed, steps=100)


def disk_walks() -> None:
    """The same with small tiers above a disk."""
    for seed in range(40):
        test_cache_machine.random_walk(seed, steps=100, disk=True)


def outputs() -> None:
    """Law 5 and 7 on fixed runs that are full of swapping, sharing, preemption and orphans."""
    fixed = [
        test_law5_stub.conversation("radix"),
        test_law5_stub.conversation("chained-hash"),
        test_law5_stub.orphans(),
        *(test_scheduler.crowded(seed) for seed in range(30)),
    ]
    for scenario in fixed:
        says_the_truth(serve(scenario), scenario)


def standing() -> None:
    """A standing decision equals walking."""
    for seed in range(40):
        scenario = test_scheduler.crowded(seed)
        inner = scenario.config.policy("scheduler").clone()
        walking = scenario.config.replace(scheduler=test_scheduler.Walking(inner=inner))
        one, other = serve(scenario, check=False), serve(scenario, check=False, config=walking)
        assert event_rows(one) == event_rows(other)


def arrivals() -> None:
    """Who arrives while others decode is let in at once if there is room."""
    scenario = test_scheduler.plain(3)
    late = [test_faults.request("late", arrival=9.0)]
    scenario.requests = [*scenario.requests, *late]
    engine = serve(scenario)
    leader = engine.groups["late"].sequences[0]
    assert leader.admitted_at == leader.group.arrival


def disk_file() -> None:
    """What is wrong in the file is noticed."""
    for check in (
        test_disk_tier.test_slots_hold_what_was_stored_last,
        test_disk_tier.test_every_flipped_bit_is_noticed,
        test_disk_tier.test_a_truncated_file_is_noticed,
        test_disk_tier.test_a_slot_in_another_ones_place_is_noticed,
    ):
        with TemporaryDirectory() as folder:
            file = BlockFile(4, 1000, folder)
            check(file)
            file.close()


def tenants() -> None:
    for name in ("chained-hash", "radix"):
        inner(test_lookup.test_tenants_never_share)(name=name, tokens=[0, 1, 2, 3, 0])


def collisions() -> None:
    for seed in range(60):
        pick = Random(seed)
        sequences = [
            ([pick.randrange(3) for _ in range(pick.randint(1, 10))], pick.choice((None, "a")))
            for _ in range(6)
        ]
        for collision in test_lookup.COLLIDING:
            inner(test_lookup.test_never_a_wrong_match)(
                name="chained-hash", collision=collision, sequences=sequences, block_size=2, forget=[1, 5]
            )


def stretches() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_lookup.test_what_follows_in_a_stretch_is_held_against_the_tokens(patch)


def first_fit() -> None:
    for seed in range(60):
        pick = Random(seed)
        operations = [
            (pick.choice(("take", "give", "shuffle")), pick.randint(1, 6), pick.randrange(99))
            for _ in range(40)
        ]
        inner(test_allocators.test_no_block_is_handed_out_twice)(
            name="first-fit", first=seed % 2, size=12, operations=operations
        )


def reservations() -> None:
    for prompt in (1, 5, 9):
        for output in range(1, 20):
            who = test_reservation.Claimant(prompt, prompt, prompt + 20, prompt + output)
            inner(test_reservation.test_builtins_claim_what_their_names_say)(who=who, longer=9)


def failures() -> None:
    for lookup in ("chained-hash", "radix"):
        test_faults.test_bad_logits_end_one_request_alone_and_its_blocks_are_found_by_nobody(
            lookup, "host", 9
        )


def accounting() -> None:
    runs = [test_law5_stub.conversation("radix"), test_reservation.run("max"), test_reservation.run("pow2")]
    for scenario in runs[1:]:
        scenario.requests = [replace(r, arrival=4.0 * i) for i, r in enumerate(scenario.requests)]
    for scenario in runs:
        serve(scenario, check=False, after_step=test_accounting.agrees)


CHECKS: dict[str, Callable[[], Any]] = {
    "walks": walks,
    "disk walks": disk_walks,
    "outputs": outputs,
    "standing": standing,
    "arrivals": arrivals,
    "tenants": tenants,
    "collisions": collisions,
    "stretches": stretches,
    "failures": failures,
    "accounting": accounting,
    "orphan while loading": test_cache_machine.test_an_evicted_orphan_takes_the_place_of_what_is_being_loaded,
    "lfu": test_eviction.test_lfu_keeps_what_is_used_often,
    "hits are counted": test_eviction.test_hits_are_counted_where_policies_read_them,
    "short cuts": partial(test_eviction.test_short_cuts_do_what_they_stand_for, "lru"),
    "lru in use": partial(test_eviction.test_a_block_in_use_is_never_named, "lru"),
    "lfu in use": partial(test_eviction.test_a_block_in_use_is_never_named, "lfu"),
    "disk faults": test_disk_tier.test_the_planted_faults_are_survived,
    "spoiled host block": test_disk_tier.test_who_lies_in_a_spoiled_host_block_starts_over,
    "disk file": disk_file,
    "second use": test_disk_tier.test_on_second_use_takes_what_was_hit_or_comes_again,
    "what remains to be copied": test_disk_tier.test_what_is_written_through_lies_below_as_soon_as_it_is_stored,
    "spoils": test_disk_tier.test_spoils_follow_the_moves,
    "doubt in every tier": test_cache_machine.test_doubt_reaches_every_tier,
    "seats": test_scheduler.test_samples_to_come_take_a_seat,
    "radix": test_lookup.test_radix_goes_into_the_middle_of_a_block_and_takes_the_longest_way,
    "first-fit": first_fit,
    "reservations": reservations,
    "cancelled arrivals": test_faults.test_nobody_waits_for_the_arrival_of_a_cancelled_request,
    "buddies": test_allocators.test_buddies_split_and_merge,
    "weights": test_ordering.test_weights_count,
    "credit": test_ordering.test_being_away_earns_nothing,
    "charges": test_ordering.test_a_preempted_request_is_charged_once,
    "shared": test_preemption.test_what_is_shared_is_counted_in_whole_cached_blocks,
    "longest request": test_faults.test_the_longest_that_fits_is_not_refused,
    "faults": test_faults.test_faults_really_hit_moves_and_batches,
}


# ---- the mistakes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """``old`` → ``new`` in the source of ``owner.attribute``, noticed by the check ``caught_by``."""

    name: str
    owner: Any
    attribute: str
    old: str
    new: str
    caught_by: str

    @contextmanager
    def planted(self) -> Iterator[None]:
        own = inspect.getattr_static(self.owner, self.attribute)
        function = own.fget if isinstance(own, property) else own
        source = textwrap.dedent(inspect.getsource(function))
        assert self.old in source, f"{self.name}: {self.old!r} is not in {function.__qualname__} any more"
        changed = source.replace(self.old, self.new)
        assert changed != source
        names: dict[str, Any] = {}
        code = compile(
            changed, f"<{self.name}>", "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True
        )
        exec(code, function.__globals__, names)
        setattr(self.owner, self.attribute, names[function.__name__])
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, own)


BUGS = [
    Bug(
        "a fork does not count itself",
        KVCache,
        "fork",
        "self.device.share(parent.blocks[:held])",
        "pass",
        "walks",
    ),
    Bug("lru may name a block in use", LRU, "hit", "block.mark = 0", "pass", "lru in use"),
    Bug("lru forgets many hits at once", LRU, "hit_all", "block.mark = 0", "pass", "short cuts"),
    Bug(
        "lru keeps the place of an earlier release",
        LRU,
        "release",
        "mark = self._mark + 1",
        "mark = 1",
        "short cuts",
    ),
    Bug(
        "a simple policy may name a block in use",
        Eviction,
        "hit",
        "self._released.pop(block, None)",
        "pass",
        "lfu in use",
    ),
    Bug(
        "copy-on-write without the copy",
        KVCache,
        "grow",
        "self.moves.append(Move(DEVICE, old.index, DEVICE, new.index))",
        "pass",
        "outputs",
    ),
    Bug(
        "after copy-on-write the old slot is written",
        KVCache,
        "grow",
        "table.replace(at, new)",
        "table.blocks[at] = new",
        "outputs",
    ),
    Bug(
        "a shared block is written in place",
        KVCache,
        "grow",
        "blocks[at].ref_count > 1",
        "blocks[at].ref_count > 99",
        "outputs",
    ),
    Bug(
        "a block is published before it is full",
        KVCache,
        "commit",
        "full = table.num_tokens // self.block_size",
        "full = -(-table.num_tokens // self.block_size)",
        "walks",
    ),
    Bug("tenants share", Prefix, "__init__", "self.salt = salt", "self.salt = None", "tenants"),
    Bug(
        "a match does not verify the parent",
        Block,
        "holds",
        " and self.parent == parent",
        "",
        "collisions",
    ),
    Bug(
        "a match does not verify the tokens",
        Block,
        "holds",
        "self.content == content and ",
        "",
        "collisions",
    ),
    Bug(
        "a stretch is believed to be whole",
        ChainedHash,
        "match",
        "or block.stretch is not stretch",
        "",
        "collisions",
    ),
    Bug(
        "a stretch is believed to be what is asked for",
        ChainedHash,
        "match",
        "or held[at] != content",
        "",
        "stretches",
    ),
    Bug(
        "a block that is given up seems to hold what it held",
        BlockPool,
        "_give_up",
        "block.stretch = NOWHERE",
        "pass",
        "walks",
    ),
    Bug(
        "a release forgets the first block",
        KVCache,
        "release",
        "self.device.drop(table.blocks[::-1]",
        "self.device.drop(table.blocks[:0:-1]",
        "walks",
    ),
    Bug(
        "a release goes head first",
        KVCache,
        "release",
        "self.device.drop(table.blocks[::-1]",
        "self.device.drop(table.blocks",
        "walks",
    ),
    Bug(
        "swapping in mixes up the blocks",
        KVCache,
        "swap_in",
        "zip(table.host_blocks, taken)",
        "zip(table.host_blocks[::-1], taken)",
        "outputs",
    ),
    Bug(
        "saving comes before what was asked for earlier",
        KVCache,
        "swap_out",
        "self.moves.append(",
        "self.moves.appendleft(",
        "walks",
    ),
    Bug(
        "a victim's copy is made after its block is overwritten",
        KVCache,
        "_load",
        "self.moves.append(",
        "self.moves.appendleft(",
        "walks",
    ),
    Bug(
        "a preempted sequence keeps its computed count",
        KVCache,
        "admit",
        "table.num_tokens = match.num_tokens",
        "table.num_tokens = len(table.prefix.tokens) - 1 if readmitted else match.num_tokens",
        "outputs",
    ),
    Bug(
        "what was hit is published again",
        KVCache,
        "admit",
        "table.num_published = num_hits",
        "table.num_published = 0",
        "walks",
    ),
    Bug(
        "a hit may cover the prompt's last token",
        Engine,
        "_prefill",
        "seq.table.prefix, known - 1)",
        "seq.table.prefix, known)",
        "outputs",
    ),
    Bug("lfu does not look at hits", LFU, "priority", "block.hits", "0", "lfu"),
    Bug("hits are never counted", KVCache, "_observe", "block.hits += 1", "pass", "hits are counted"),
    Bug(
        "radix hands out one token too many",
        RadixTree,
        "match",
        "start + best,",
        "start + best + 1,",
        "radix",
    ),
    Bug(
        "what a failed step computed is published",
        Engine,
        "_commit",
        "cache.distrust(seq.table)",
        "cache.commit(seq.table, seq.remaining)",
        "failures",
    ),
    Bug(
        "the host's copy of a doubtful block stays",
        KVCache,
        "distrust",
        "*(self.lookup.copy_in(block, pool.tier) for pool in self.pools[1:])",
        "",
        "doubt in every tier",
    ),
    Bug(
        "a standing decision survives an arrival",
        Engine,
        "_let_in",
        "self._stands = False",
        "pass",
        "arrivals",
    ),
    Bug(
        "a decision stands although not all could run",
        Engine,
        "_plan",
        "decision is not None and everyone and",
        "decision is not None and",
        "standing",
    ),
    Bug(
        "an evicted block can still be found",
        KVCache,
        "_device_evicted",
        "self.lookup.forget_all(blocks)",
        "pass",
        "walks",
    ),
    Bug(
        "what the host gave up can still be found",
        KVCache,
        "_lower_evicted",
        "self.lookup.forget_all(blocks)",
        "pass",
        "disk walks",
    ),
    Bug(
        "what comes up from the disk is taken for the host's",
        KVCache,
        "_load",
        "Move(source.tier, ",
        "Move(1, ",
        "disk walks",
    ),
    Bug(
        "what is being loaded from the disk is not pinned",
        KVCache,
        "admit",
        "pool.share(here)",
        "pool.tier == 2 or pool.share(here)",
        "disk walks",
    ),
    Bug(
        "a copy that failed can still be found",
        Engine,
        "_suffer",
        "self.cache.spoiled(damage.spoiled)",
        "{self.cache.pools[t].blocks[i] for t, i in damage.spoiled}",
        "disk faults",
    ),
    Bug(
        "who was given a spoiled block goes on",
        Engine,
        "_suffer",
        "for seq in reversed(self.running)",
        "for seq in ()",
        "disk faults",
    ),
    Bug(
        "a spoiled block is swapped out as if it were whole",
        Engine,
        "_suffer",
        "self.cache.release(seq.table)",
        "pass",
        "spoiled host block",
    ),
    Bug(
        "what is copied on from a spoiled block is trusted",
        Spoils,
        "passed_on",
        "self._spoiled.add((move.dst_tier, move.dst))",
        "pass",
        "spoils",
    ),
    Bug("a flipped bit is overlooked", BlockFile, "load", 'raise SlotFault("damaged")', "pass", "disk file"),
    Bug(
        "a short read is taken for whole",
        BlockFile,
        "load",
        'raise SlotFault("truncated")',
        "pass",
        "disk file",
    ),
    Bug(
        "keys given up once are remembered for ever",
        DiskTier,
        "store",
        "len(once) > self._capacities[tier]",
        "False",
        "second use",
    ),
    Bug(
        "what the last step stored through is never copied",
        Engine,
        "step",
        "self._finish_moves()",
        "self.cache.moves.clear()",
        "what remains to be copied",
    ),
    Bug(
        "what could not be read is tried again",
        Spoils,
        "failed",
        "self._spoiled.add((move.src_tier, move.src))",
        "pass",
        "disk faults",
    ),
    Bug("sharing is not unsaved", BlockPool, "drop", "self.saved_tokens -= block.fill", "pass", "walks"),
    Bug(
        "a refused admission is observed",
        KVCache,
        "admit",
        "self.scattered = False",
        "self._observe(table, guarded, readmitted)",
        "walks",
    ),
    Bug(
        "an orphan displaces what is being loaded",
        KVCache,
        "_load",
        "if source.key is None:",
        "if False:",
        "orphan while loading",
    ),
    Bug(
        "promises are not taken back",
        KVCache,
        "release",
        "self._promised -= self._within(table)",
        "pass",
        "accounting",
    ),
    Bug(
        "free runs are not merged",
        FirstFit,
        "free",
        "self._lengths[start] += length",
        "self._lengths[start] = length",
        "first-fit",
    ),
    Bug("pow2 forgets the prompt", Pow2, "claim", "sequence.prompt_len + (1", "(1", "reservations"),
    Bug(
        "who is cancelled before arrival is waited for",
        Engine,
        "cancel",
        "self.coming.forget(group)",
        "pass",
        "cancelled arrivals",
    ),
    Bug(
        "a step counts before its result is in",
        Engine,
        "step",
        "result = self.executor.execute(orders)",
        "self.events.step += 1\n        result = self.executor.execute(orders)\n        self.events.step -= 1",
        "faults",
    ),
    Bug(
        "the longest request that fits is refused",
        Engine,
        "_check_fits",
        "needed > available",
        "needed >= available",
        "longest request",
    ),
    Bug("samples to come take no seat", Plan, "seats", " - engine.promised_seats", "", "seats"),
    Bug(
        "who is preempted makes room for newcomers",
        Plan,
        "grant",
        "not self.lost",
        "seq not in self.lost",
        "standing",
    ),
    Bug(
        "buddies merge to the wrong side",
        Buddy,
        "free",
        "start, order = min(start, buddy), order + 1",
        "start, order = max(start, buddy), order + 1",
        "buddies",
    ),
    Bug(
        "a buddy is split and the rest is lost",
        Buddy,
        "allocate",
        "self._put(start + n, end)",
        "pass",
        "buddies",
    ),
    Bug(
        "generated tokens cost a tenant nothing",
        Fair,
        "_count_outputs",
        "served.account.outputs += output - served.counted",
        "pass",
        "weights",
    ),
    Bug("being away earns credit", Fair, "_lift", "account.lift +=", "_ =", "credit"),
    Bug(
        "a preempted request is charged again",
        Fair,
        "_charge",
        "if sequence.request_id not in self._served:",
        "if True:",
        "charges",
    ),
    Bug(
        "what is shared counts as lost",
        Sequence,
        "num_shared",
        "shared += block.fill",
        "shared += 0",
        "shared",
    ),
]
