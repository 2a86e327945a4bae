"""Policies that are broken on purpose, each in one way that somebody could get wrong, and the law that must say so.

``@breaks("law")`` names the law. ``also`` names others that the same mistake cannot help breaking.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pagedlab.kernels.dense import DenseReference
from pagedlab.kernels.layouts import BlockOf
from pagedlab.policies import (
    Block,
    ChainedHash,
    Eviction,
    IterationLevel,
    Policy,
    Preemption,
    Prefetch,
    RadixTree,
    Reservation,
    Scheduler,
    Swap,
    param,
)
from pagedlab.policies.allocator import FreeList
from pagedlab.policies.kernel import Kernel
from pagedlab.policies.layout import CSR, Padded
from pagedlab.policies.lookup import NO_MATCH, Match, Prefix, Published
from pagedlab.policies.prefetch import Load, QueueLookahead
from pagedlab.policies.scheduler import UNTIL_EVENT


@dataclass(frozen=True)
class Broken:
    """A policy and what it breaks."""

    policy: type[Policy]
    law: str
    also: frozenset[str]


BROKEN: list[Broken] = []


def breaks(law: str, *also: str) -> Callable[[type[Policy]], type[Policy]]:
    def decorate(cls: type[Policy]) -> type[Policy]:
        BROKEN.append(Broken(cls, law, frozenset(also)))
        return cls

    return decorate


# ---- every slot ------------------------------------------------------------------------------------------------------


class Oldest(Eviction):
    """An honest one to begin with: the block released longest ago goes first."""

    def priority(self, block: Block) -> float:
        return 0.0


@breaks("parameters_are_legal")
class DefaultOutOfRange(Oldest):
    share: float = param(1.0, low=0.0, high=1.0, help="of the capacity")

    def __post_init__(self) -> None:
        """Forgets to ask the base class, which checks ranges."""


@breaks("parameters_round_trip")
class TakesAnyParameter(Oldest):
    def get_params(self) -> dict[str, Any]:
        return {}

    size: int = param(3, low=1, help="of something")

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Any:
        return cls()


@breaks("init_does_no_work")
class WorksInInit(Oldest):
    def __post_init__(self) -> None:
        super().__post_init__()
        self._order: list[Block] = []


@breaks("answers_without_error")
class SharedHitsAreTooMuch(Oldest):
    def hit(self, block: Block) -> None:
        del self._released[block]


@breaks("answers_without_error")
class HearsNothingOfReadmissions(Oldest):
    def miss(self, key: Hashable) -> None:  # type: ignore[override]
        pass


@breaks("pickles_when_new", "pickles_in_the_middle")
class CannotBePickled(Oldest):
    def __reduce__(self) -> Any:
        raise TypeError("holds a lock")


@breaks("pickles_in_the_middle")
class HoldsALock(Oldest):
    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._lock = threading.Lock()


@breaks("pickles_in_the_middle")
class PicklesWithoutItsState(Oldest):
    def __getstate__(self) -> Any:
        return {**vars(self), **({"_released": {}, "_heap": []} if hasattr(self, "_heap") else {})}


@breaks("clone_starts_empty")
class CloneCarriesState(Oldest):
    def clone(self, **override: Any) -> Any:
        return copy.copy(self)


@breaks("reset_forgets")
class ResetKeepsItsTable(Oldest):
    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self.__dict__.setdefault("_known", set())

    def release(self, block: Block) -> None:
        super().release(block)
        self._known.add(block.key % 8)

    def priority(self, block: Block) -> float:
        return float(block.key % 8 in self._known)


@breaks("instances_share_nothing")
class SharesATable(Oldest):
    table: ClassVar[dict[Hashable, int]] = {}

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self.table.clear()

    def priority(self, block: Block) -> float:
        key = block.key % 8
        self.table[key] = self.table.get(key, 0) + 1
        return self.table[key]


@breaks("same_input_same_decisions", "instances_share_nothing")
class DrawsFromEverybodysDice(Oldest):
    def priority(self, block: Block) -> float:
        return random.random()


@breaks("same_input_same_decisions")
class DrawsItsOwnNumbersUnseeded(Oldest):
    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._dice = random.Random()

    def priority(self, block: Block) -> float:
        return self._dice.random()


@breaks("same_input_same_decisions")
class ReadsTheClock(Oldest):
    def priority(self, block: Block) -> float:
        return 0.0 if time.time() < 1.5e9 else -self._clock


# ---- eviction --------------------------------------------------------------------------------------------------------


@breaks("victims_are_blocks")
class NamesKeys(Oldest):
    def victims(self, n: int, protected: Collection[Block] = ()) -> Any:
        return [block.key for block in super().victims(n, protected)]

    def evict(self) -> Block | None:
        block = next(iter(Eviction.victims(self, 1)), None)
        if block is not None:
            self.remove(block)
        return block


@breaks("victims_are_resident")
class NamesStrangers(Oldest):
    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        chosen = super().victims(n, protected)
        return [*chosen[:-1], Block(99)] if n > 2 and chosen else chosen


@breaks("victims_are_not_in_use", "victims_are_resident", "removals_by_others_are_heard")
class NamesWhatIsGone(Oldest):
    def remove(self, block: Block) -> None:
        pass


@breaks("victims_are_not_in_use")
class NamesWhatIsInUse(Oldest):
    def hit(self, block: Block) -> None:
        pass


@breaks("victims_are_distinct")
class NamesOneTwice(Oldest):
    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return super().victims(n, protected)[:1] * n


@breaks("victims_are_unprotected")
class IgnoresProtection(Oldest):
    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return super().victims(n)


@breaks("victims_are_all_or_none")
class ReturnsTooFew(Oldest):
    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return super().victims(n, protected)[: max(1, n - 1)]


@breaks("victims_are_found")
class GivesUpEasily(Oldest):
    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        return super().victims(n, protected) if n < 3 else []


@breaks("removals_by_others_are_heard")
class HearsOnlyItsOwnRemovals(Oldest):
    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        self._named = super().victims(n, protected)
        return list(self._named)

    def remove(self, block: Block) -> None:
        if block in getattr(self, "_named", ()) or block.ref_count:
            super().remove(block)


@breaks("removals_by_others_are_heard")
class TripsOverRemovals(Oldest):
    def remove(self, block: Block) -> None:
        del self._released[block]


@breaks("looking_is_not_using")
class LookingIsUsing(Oldest):
    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        chosen = super().victims(n, protected)
        for block in chosen:
            self.hit(block)
            self.release(block)
        return chosen


@breaks("looking_is_not_using")
class LooksAreCounted(Oldest):
    dynamic = True

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._looks: dict[Block, int] = {}

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        chosen = super().victims(n, protected)
        self._looks.update((block, self._looks.get(block, 0) + 1) for block in chosen)
        return chosen

    def insert(self, block: Block) -> None:
        self._looks.pop(block, None)

    def priority(self, block: Block) -> float:
        return self._looks.get(block, 0)


@breaks("short_cuts_are_equal")
class EvictsTheNewest(Oldest):
    def evict(self) -> Block | None:
        block = next(reversed(self._released), None)
        if block is not None:
            self.remove(block)
        return block


@breaks("short_cuts_are_equal")
class ReleasesInReverse(Oldest):
    def release_all(self, blocks: Sequence[Block]) -> None:
        for block in reversed(blocks):
            self.release(block)


@breaks("hits_count")
class NeverCountsHits(Oldest):
    """The mistake of an LFU whose counter is set when a block is stored, and nowhere else."""

    counts_hits = True

    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._count: dict[Block, int] = {}

    def insert(self, block: Block) -> None:
        self._count[block] = 1

    def priority(self, block: Block) -> float:
        return self._count[block]

    def remove(self, block: Block) -> None:
        super().remove(block)
        self._count.pop(block, None)


@breaks("memory_is_bounded")
class RemembersEverything(Oldest):
    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._ghosts: set[Hashable] = set()

    def miss(self, key: Hashable, readmitted: bool = False) -> None:
        self._ghosts.add(key)


@breaks("memory_is_bounded")
class RemembersEverySession(Oldest):
    def reset(self, *, capacity: int) -> None:
        super().reset(capacity=capacity)
        self._sessions: dict[str | None, list[int]] = {}

    def insert(self, block: Block) -> None:
        self._sessions.setdefault(block.session, []).append(block.depth)


@breaks("work_grows_as_declared")
class ScansAllAndSaysConstant(Oldest):
    growth = "constant"

    def victims(self, n: int, protected: Collection[Block] = ()) -> list[Block]:
        order = sorted((b for b in self._released if b not in protected), key=lambda b: self._released[b])
        return order[:n] if len(order) >= n else []


@breaks("work_grows_as_declared")
class CountsEverythingAtEveryRelease(Oldest):
    def release(self, block: Block) -> None:
        super().release(block)
        self._deep = sum(1 for other in self._released if other.depth > block.depth)


# ---- allocator -------------------------------------------------------------------------------------------------------


@breaks("no_block_is_handed_out_twice", "num_free_is_exact")
class HandsOutTwice(FreeList):
    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        taken = super().allocate(n, after)
        if taken and n == 3:
            self._free[-1:] = taken[-1:]
        return taken


@breaks("only_its_own_blocks")
class CountsFromZero(FreeList):
    def reset(self, blocks: Sequence[int]) -> None:
        super().reset(range(len(blocks)))


@breaks("all_or_none")
class HandsOutOneMore(FreeList):
    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        return super().allocate(min(n + 1, self.num_free), after) if n <= self.num_free else None


@breaks("refusal_changes_nothing")
class LeaksWhenItRefuses(FreeList):
    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        taken = [self._free.pop() for _ in range(min(n, len(self._free)))]
        return taken if len(taken) == n else None


@breaks("refusal_changes_nothing")
class ForgetsItsOrderWhenItRefuses(FreeList):
    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        taken = super().allocate(n, after)
        if taken is None:
            self._free.reverse()
        return taken


@breaks("room_is_found", "fits_tells_the_truth")
class KeepsTheLastForItself(FreeList):
    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        return super().allocate(n, after) if n < self.num_free else None

    def fits(self, n: int, also: Collection[int] = ()) -> bool:
        return self.num_free + len(also) > n


@breaks("num_free_is_exact")
class CountsLate(FreeList):
    def free(self, blocks: Sequence[int]) -> None:
        super().free(blocks)
        self._uncounted = len(blocks) > 2

    @property
    def num_free(self) -> int:
        return len(self._free) - vars(self).get("_uncounted", 0)


@breaks("fits_tells_the_truth")
class AlwaysFits(FreeList):
    def fits(self, n: int, also: Collection[int] = ()) -> bool:
        return True


@breaks("fits_changes_nothing")
class FitsTakes(FreeList):
    def fits(self, n: int, also: Collection[int] = ()) -> bool:
        self._free.sort()
        return super().fits(n, also)


@breaks("contiguous_as_promised")
class SaysContiguous(FreeList):
    contiguous = True


# ---- lookup ----------------------------------------------------------------------------------------------------------


@breaks("salts_isolate", "serials_identify_content", "copies_are_found")
class IgnoresTheSalt(RadixTree):
    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        return super().match(Prefix(prefix.tokens, prefix.block_size), max_tokens)

    def publish(self, block: Block) -> Published:
        parent = block.parent
        if isinstance(parent, tuple):
            block.parent = (None,)
        answer = super().publish(block)
        block.parent = parent
        return answer

    def forget(self, block: Block) -> None:
        if isinstance(block.parent, tuple):
            block.parent = (None,)
        super().forget(block)


@breaks("contents_never_mix")
class TrustsTheHash(ChainedHash):
    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        blocks: list[Block] = []
        for key in prefix.keys(max_tokens // self._block_size)[: max_tokens // self._block_size]:
            found = next((index[key] for index in self._index if key in index), None)
            parent = blocks[-1].serial if blocks else (prefix.salt,)
            if found is None or found.parent != parent:
                break
            blocks.append(found)
        return Match(blocks, len(blocks) * self._block_size) if blocks else NO_MATCH


@breaks("forgotten_blocks_are_not_found", "copies_are_found", "serials_identify_content")
class NeverForgets(RadixTree):
    def forget(self, block: Block) -> None:
        pass


@breaks("granularity_is_known")
class FindsWords(RadixTree):
    granularity = "word"  # type: ignore[assignment]

    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        found = super().match(prefix, max_tokens)
        return Match(found.blocks, len(found.blocks) * self._block_size) if found.blocks else NO_MATCH


@breaks("longest_prefix_is_found")
class StopsAfterTwo(ChainedHash):
    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        return super().match(prefix, min(max_tokens, 2 * self._block_size))


@breaks("limit_is_kept")
class OverlooksTheLimit(RadixTree):
    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        return super().match(prefix, len(prefix.tokens))


@breaks("looking_is_not_using")
class TiresOfBeingAsked(ChainedHash):
    def reset(self, *, block_size: int, num_tiers: int) -> None:
        super().reset(block_size=block_size, num_tiers=num_tiers)
        self._asked = 0

    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        found = super().match(prefix, max_tokens)
        self._asked += found.num_tokens > 0
        return NO_MATCH if self._asked % 2 == 0 else found


@breaks("highest_copy_is_given")
class PrefersTheLowest(RadixTree):
    def publish(self, block: Block) -> Published:
        answer = super().publish(block)
        self._children[block.parent][block.content].sort(key=lambda copy: -copy.tier)
        return answer


@breaks("short_cuts_are_equal")
class ForgetsOnlyTheFirst(ChainedHash):
    def forget_all(self, blocks: Sequence[Block]) -> None:
        super().forget_all(blocks[:1])


# ---- layout ----------------------------------------------------------------------------------------------------------


@breaks("appends_are_kept")
class LosesAnAppend(CSR):
    def append(self, row: int, blocks: Sequence[int]) -> None:
        super().append(row, blocks if len(blocks) < 4 else blocks[:-1])


@breaks("replacements_are_kept")
class IgnoresReplacements(Padded):
    def replace(self, row: int, i: int, block: int) -> None:
        self._within(row, i)


@breaks("opened_tables_decode")
class OpensBackwards(Padded):
    def open(self, row: int, blocks: Sequence[int]) -> None:
        super().open(row, blocks[::-1])


@breaks("rows_do_not_mix", "block_of_equals_decode")
class OneRowTooNarrow(Padded):
    def reset(self, *, max_rows: int, max_blocks: int) -> None:
        super().reset(max_rows=max_rows, max_blocks=max_blocks)
        import numpy as np

        self._matrix = np.zeros((max_rows, max_blocks), dtype=np.int32)

    def replace(self, row: int, i: int, block: int) -> None:
        super().replace(row, i, block)
        if row:
            self._matrix[row - 1, 0] = block


@breaks("closed_rows_are_empty")
class KeepsClosedRows(Padded):
    def reset(self, *, max_rows: int, max_blocks: int) -> None:
        super().reset(max_rows=max_rows, max_blocks=max_blocks)
        self._last: dict[int, list[int]] = {}

    def close(self, row: int) -> None:
        self._last[row] = self.decode(row)
        super().close(row)

    def decode(self, row: int) -> list[int]:
        return super().decode(row) or self._last.get(row, [])


@breaks("arrays_are_flat_int32")
class WideArrays(Padded):
    def arrays(self) -> Any:
        entries, index = super().arrays()
        return entries.astype("int64"), index


def _shifted(entries: Any, index: Any, rows: Any, i: Any) -> Any:
    return entries[index[rows].long() + (i + 1) % 24 * 0 + i.flip(0)].long()


shifted = BlockOf(_shifted, _shifted)


@breaks("block_of_equals_decode")
class AnotherDeviceFunction(CSR):
    device_functions = "broken_policies:shifted"


@breaks("bytes_read_are_enough")
class ReadsForFree(CSR):
    def bytes_read(self, num_blocks: int) -> int:
        return num_blocks


# ---- scheduler, preemption, reservation, swap, prefetch --------------------------------------------------------------


@breaks("work_ends")
class StarvesTheLowest(Scheduler):
    def plan(self, step: Any) -> Any:
        for sequence in [*step.running, *step.waiting]:
            if sequence.priority > 0:
                step.grant(sequence, sequence.remaining, whole=True)


@breaks("nobody_is_asked_for_twice")
class AsksAgain(Scheduler):
    def plan(self, step: Any) -> Any:
        for sequence in [*step.running, *step.waiting, *step.running]:
            step.grant(sequence, sequence.remaining, whole=True)


@breaks("decisions_are_known")
class DecidesInItsOwnWords(IterationLevel):
    def plan(self, step: Any) -> Any:
        super().plan(step)
        return "for a while"


@breaks("outputs_are_unchanged")
class ReadsTheLastTokenAgain(IterationLevel):
    """It reaches into what it is only shown."""

    def plan(self, step: Any) -> Any:
        for sequence in step.waiting:
            sequence.tokens[0] = 2
        return super().plan(step)


@breaks("books_balance", "answers_without_error")
class HoldsBlocksItself(IterationLevel):
    def plan(self, step: Any) -> Any:
        decision = super().plan(step)
        for sequence in step.waiting:
            for block in sequence.table.blocks[:1]:
                block.ref_count += 1
        return decision


@breaks("standing_decisions_stand")
class AdmitsEveryOtherTime(Scheduler):
    """It says that its decision stands, and would decide otherwise if it were asked."""

    def reset(self) -> None:
        self._plans = 0

    def plan(self, step: Any) -> Any:
        self._plans += 1
        for sequence in step.running:
            step.grant(sequence, sequence.remaining, whole=True)
        if self._plans % 2 or not step.running:
            for sequence in step.waiting:
                if not step.grant(sequence, sequence.remaining, whole=True):
                    break
        return UNTIL_EVENT


@breaks("chooses_a_candidate")
class ChoosesNobody(Preemption):
    def choose(self, candidates: Any) -> Any:
        return None

    def mode(self, victim: Any) -> Any:
        return "recompute"


@breaks("modes_are_known")
class SwapsToNowhere(Preemption):
    def choose(self, candidates: Any) -> Any:
        return candidates[-1]

    def mode(self, victim: Any) -> Any:
        return "swap"


@breaks("claims_cover_the_step")
class ClaimsThePromptAlone(Reservation):
    def claim(self, sequence: Any, step_end: int, max_model_len: int) -> int:
        return min(sequence.prompt_len, max_model_len)


@breaks("claims_fit_the_model", "what_fits_is_not_refused")
class ClaimsTwiceTheModel(Reservation):
    def claim(self, sequence: Any, step_end: int, max_model_len: int) -> int:
        return 2 * max_model_len


@breaks("claiming_changes_nothing")
class ClaimsLessEveryTime(Reservation):
    def claim(self, sequence: Any, step_end: int, max_model_len: int) -> int:
        self._asked = getattr(self, "_asked", 0) + 1
        return max(step_end, max_model_len - self._asked)


@breaks("claims_are_whole_numbers", "answers_without_error")
class ClaimsAHalf(Reservation):
    def claim(self, sequence: Any, step_end: int, max_model_len: int) -> Any:
        return max(float(step_end), sequence.max_len / 2)


@breaks("what_is_kept_has_a_tier")
class KeepsWithoutATier(Swap):
    def store(self, block: Block, tier: int) -> bool:
        return True


@breaks("tier_evictions_are_known", "answers_without_error")
class OrdersTheHostByNobody(Swap):
    uses_host = True

    def store(self, block: Block, tier: int) -> bool:
        return True

    def tier_eviction(self, tier: int) -> str:
        return "least-loved"


@breaks("answers_are_yes_or_no")
class AnswersWithACount(Swap):
    uses_host = True

    def store(self, block: Block, tier: int) -> Any:
        return block.hits


@breaks("storing_is_only_a_decision")
class SpendsHits(Swap):
    uses_host = True

    def store(self, block: Block, tier: int) -> bool:
        block.hits = max(0, block.hits - 1)
        return block.hits > 0


@breaks("plans_name_what_is_there")
class LoadsWhatIsThere(Prefetch):
    def plan(self, waiting: Any, residency: Any, link_budget: int) -> list[Load]:
        return [Load(block) for sequence in waiting[:1] for block in residency.prefix(sequence)]


@breaks("no_content_is_loaded_twice")
class LoadsTwice(QueueLookahead):
    def plan(self, waiting: Any, residency: Any, link_budget: int) -> list[Load]:
        return super().plan(waiting, residency, link_budget) * 2


@breaks("planning_changes_nothing")
class PlansEverythingOnce(QueueLookahead):
    def reset(self) -> None:
        self._planned: set[int] = set()

    def plan(self, waiting: Any, residency: Any, link_budget: int) -> list[Load]:
        loads = [
            load
            for load in super().plan(waiting, residency, link_budget)
            if load.block.serial not in self._planned
        ]
        self._planned |= {load.block.serial for load in loads}
        return loads


@breaks("fates_are_heard", "answers_without_error")
class HearsOnlySuccess(QueueLookahead):
    def feedback(self, block: Block, fate: Any) -> None:
        if fate == "useless":
            raise ValueError(fate)


# ---- kernel ----------------------------------------------------------------------------------------------------------


class _Unscaled(DenseReference):
    def attend(self, *tensors: Any, scale: float, **options: Any) -> torch.Tensor:
        return super().attend(*tensors, scale=1.0, **options)


class _ReadsWholeBlocks(DenseReference):
    """Adds nothing of the unused slots of the last block to the result, but reads them: 0 times NaN is NaN."""

    def attend(
        self, query: Any, key_cache: Any, value_cache: Any, batch: Any, **options: Any
    ) -> torch.Tensor:
        out = super().attend(query, key_cache, value_cache, batch, **options)
        return out + 0.0 * value_cache.sum()


class _SeesBeyondTheWindow(DenseReference):
    def attend(self, *tensors: Any, sliding_window: int | None = None, **options: Any) -> torch.Tensor:
        longer = None if sliding_window is None else sliding_window + 1
        return super().attend(*tensors, sliding_window=longer, **options)


class _CapsNothing(DenseReference):
    def attend(self, *tensors: Any, soft_cap: float | None = None, **options: Any) -> torch.Tensor:
        return super().attend(*tensors, **options)


class _SlopesUpwards(DenseReference):
    def attend(self, *tensors: Any, alibi_slopes: Any = None, **options: Any) -> torch.Tensor:
        return super().attend(
            *tensors, alibi_slopes=None if alibi_slopes is None else -alibi_slopes, **options
        )


class _OneSinkForAll(DenseReference):
    def attend(self, *tensors: Any, sinks: Any = None, **options: Any) -> torch.Tensor:
        same = None if sinks is None else sinks[:1].expand_as(sinks)
        return super().attend(*tensors, sinks=same, **options)


@breaks("agrees_with_dense")
class ForgetsToScale(Kernel):
    implementation = "broken_policies:_Unscaled"


@breaks("sliding_window_agrees_with_dense")
class SeesBeyondTheWindow(Kernel):
    implementation = "broken_policies:_SeesBeyondTheWindow"


@breaks("soft_cap_agrees_with_dense")
class CapsNothing(Kernel):
    implementation = "broken_policies:_CapsNothing"


@breaks("alibi_slopes_agree_with_dense")
class SlopesUpwards(Kernel):
    implementation = "broken_policies:_SlopesUpwards"


@breaks("sinks_agree_with_dense")
class OneSinkForAll(Kernel):
    implementation = "broken_policies:_OneSinkForAll"


@breaks("unused_slots_cannot_leak")
class ReadsUnusedSlots(Kernel):
    implementation = "broken_policies:_ReadsWholeBlocks"


@breaks("unserved_devices_are_refused")
class ServesEverything(Kernel):
    implementation = "pagedlab.kernels.dense:DenseReference"

    def resolve(self, device: str, dtype: str) -> Any:
        return self
