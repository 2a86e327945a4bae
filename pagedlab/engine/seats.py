"""Who has a seat and blocks, who gets in, and who has to leave.

The engine's half that deals in room; the other half (`pagedlab.engine.engine`) deals in steps. A sequence is waiting,
running, or, with asynchronous scheduling, leaving; a running one decodes with the others (`Decoders`) or is undecided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from operator import attrgetter

from pagedlab import events as ev
from pagedlab.cache.accounting import Memory
from pagedlab.cache.kv_cache import KVCache
from pagedlab.cache.table import BlockTable
from pagedlab.config import Config
from pagedlab.costs.shape import ModelShape
from pagedlab.engine.decoders import Decoders
from pagedlab.engine.orders import Damage
from pagedlab.engine.plan import Plan
from pagedlab.engine.prefetching import Prefetching
from pagedlab.engine.records import Totals
from pagedlab.engine.sequence import Sequence, Status
from pagedlab.engine.view import EngineView
from pagedlab.errors import ConfigError, PolicyError, RequestTooLarge
from pagedlab.events import EventLog
from pagedlab.policies.block import TIER_NAMES, Block
from pagedlab.policies.bounds import refuse_future
from pagedlab.policies.lookup import NO_MATCH, Match
from pagedlab.policies.prefetch import Fate
from pagedlab.policies.prompt import HashedTokens

_AGE = attrgetter("age")


class Seats:
    """The cache, and the sequences that have or want a part of it."""

    def __init__(
        self,
        config: Config,
        max_model_len: int,
        events: EventLog,
        shape: ModelShape | None,
        knows_future: bool,
    ) -> None:
        self.config = config
        self.events = events
        self.max_model_len = min(config.max_model_len or max_model_len, max_model_len)
        self.policies = policies = config.policies()
        """The clones that this run works on."""
        refuse_future(policies, knows_arrivals=knows_future)
        self.totals = Totals()
        self.waiting: deque[Sequence] = deque()
        """The queue, front first."""
        view = EngineView(events, self.waiting, shape, config.block_size)
        policies.preemption.attach(view)
        self.cache = KVCache(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            allocator=policies.allocator,
            lookup=policies.lookup,
            eviction=policies.eviction,
            swap=policies.swap,
            host_blocks=config.num_host_blocks,
            disk_blocks=config.num_disk_blocks,
            null_block=config.null_block,
            events=events,
            on_prefetch_fate=self._prefetch_fate,
            view=view,
            knows_children=policies.prefetch.enabled,
        )
        self.prefetching: Prefetching | None = None
        if policies.prefetch.enabled:
            policies.prefetch.attach(view)
            self.prefetching = Prefetching(policies.prefetch, self.cache, config.prefetch_budget, self.totals)
        policies.scheduler.reset()
        self.running: list[Sequence] = []
        """Sequences that hold device blocks, oldest admission first."""
        self.decoders = Decoders(config.block_size)
        """Of these, the ones that get a token every step without being asked for."""
        self.undecided: dict[Sequence, None] = {}
        """Of these, the others."""
        self.leaving: list[Sequence] = []
        """Ended while the next step was already planned: their seats and blocks come free after it."""
        self.promised_seats = 0
        """Seats kept for parallel samples that have not parted yet."""
        self.steady = policies.scheduler.steady_decode and (
            config.max_num_batched_tokens >= config.max_num_seqs
        )
        """Whether sequences that decode are held together."""
        self._stands = False
        """Whether the scheduler's last decision still holds."""
        self._ended: list[int] = []
        """Sequences that have given up their blocks since the last step."""

    def _prefetch_fate(self, block: Block, fate: Fate) -> None:
        if self.prefetching is not None:
            self.prefetching.hear(block, fate)

    def _check_fits(self, seq: Sequence) -> None:
        """Raise if the sequence could not even run alone."""
        name, sampling = f"request {seq.request_id!r}", seq.group.request.sampling
        if not seq.tokens:
            raise ConfigError(f"{name} has an empty prompt; at least 1 token is needed")
        if seq.prompt_len >= self.max_model_len:
            raise RequestTooLarge(
                f"{name}: prompt of {seq.prompt_len} tokens and 1 of output",
                seq.prompt_len + 1,
                self.max_model_len,
                "tokens",
                "the longest that this model and max_model_len allow",
            )
        if sampling.n > self.config.max_num_seqs:
            raise RequestTooLarge(
                f"{name}: n={sampling.n}", sampling.n, self.config.max_num_seqs, "sequences"
            )
        claim = max(
            self.policies.reservation.claim(seq, seq.prompt_len, self.max_model_len), seq.table.final_len
        )
        needed = -(-claim // self.config.block_size)
        available = self.cache.device.limit(seq.table.origin)
        if needed > available:
            whose = "" if available == self.cache.device.capacity else ", or raise its tenant's share"
            raise RequestTooLarge(
                f"{name}: {claim} tokens in blocks of {self.config.block_size}",
                needed,
                available,
                "blocks",
                f"raise num_blocks, or lower max_tokens or the reservation{whose}",
            )

    def admit(self, seq: Sequence, tokens: int, whole: bool, plan: Plan) -> int:
        """Give a waiting sequence its prefix and room, and make it run; return the tokens granted, 0 for no room."""
        spare = self.config.watermark_blocks if self.running else 0
        resume = self._swap_in if seq.table.swapped else self._prefill
        granted = resume(seq, tokens, whole, spare, plan)
        if granted:
            self.waiting.remove(seq)
            self.running.append(seq)
            self.undecided[seq] = None
            self.promised_seats += seq.to_fork
            seq.status = Status.RUNNING
        return granted

    def _swap_in(self, seq: Sequence, tokens: int, whole: bool, spare: int, plan: Plan) -> int:
        n = plan.cut(seq.remaining, tokens, whole)
        if not n or not self.cache.swap_in(seq.table, self._claim(seq, seq.num_computed + n), spare=spare):
            return 0
        self.events.record(ev.REQUEST_RESUMED, seq.seq_id, detail="swap")
        return n

    def _prefill(self, seq: Sequence, tokens: int, whole: bool, spare: int, plan: Plan) -> int:
        known, readmitted = seq.num_tokens, seq.admitted_at is not None
        # The last token is computed in any case: its output is wanted.
        match = self.cache.match(seq.table.prefix, known - 1)
        if self.config.wait_for_prefix and plan.computes_next(seq, match):
            return self._refuse_for_now(seq, match, known)
        while True:
            n = plan.cut(known - match.num_tokens, tokens, whole)
            if not n:
                return self._refuse_for_now(seq, match, known)
            claim = self._claim(seq, match.num_tokens + n)
            if self.cache.admit(seq.table, match, claim, spare=spare, readmitted=readmitted):
                break
            if self.running or not match.num_tokens:
                return self._refuse_for_now(seq, match, known)
            # Alone, and the prefix itself is in the way (pinned, or splitting the only run): start from nothing.
            match = NO_MATCH
        if self.prefetching is not None:
            self.prefetching.used(seq, len(match.blocks))
        if readmitted:
            again = max(0, known - 1 - match.num_tokens)
            seq.recomputed_tokens += again
            self.totals.recomputed_tokens += again
            self.events.record(ev.REQUEST_RESUMED, seq.seq_id, detail="recompute")
        else:
            seq.admitted_at = self.events.time
            seq.hit_tokens = match.num_tokens
            self.totals.hit_tokens += match.num_tokens
            self.totals.prompt_tokens += seq.prompt_len
            if self.events.enabled:
                self.events.record(ev.REQUEST_ADMITTED, seq.seq_id, detail=seq.request_id)
        return n

    def _refuse_for_now(self, seq: Sequence, match: Match, known: int) -> int:
        """Grant nothing; what would make the match longer is worth asking the scheduler again."""
        self.cache.await_better(seq.table.prefix, match, known - 1)
        return 0

    def _claim(self, seq: Sequence, step_end: int) -> int:
        """Tokens to have room for at admission: the reservation's word, within what one sequence can ever get."""
        claim = self.policies.reservation.claim(seq, step_end, self.max_model_len)
        if claim <= step_end:
            return step_end
        return max(step_end, min(claim, self.cache.device.limit(seq.table.origin) * self.config.block_size))

    def make_room(self, seq: Sequence, num_tokens: int, plan: Plan) -> bool:
        """Grow a running sequence, at others' cost if need be; False if it was preempted itself."""
        while not self.cache.grow(seq.table, num_tokens):
            self._stands = False
            running = self.running
            oldest = running.index(min(running, key=_AGE))
            candidates = running[:oldest] + running[oldest + 1 :]
            if not candidates:
                if self.leaving:
                    self._let_go()
                    plan.gave_up = True
                    continue
                raise PolicyError(
                    f"sequence {seq.seq_id} is alone and has no room for {num_tokens} tokens: "
                    f"allocator {type(self.cache.device.allocator).__name__} refuses blocks that are free"
                )
            victim = self.policies.preemption.choose(candidates)
            if victim not in candidates:
                raise PolicyError(
                    f"preemption {type(self.policies.preemption).__name__} chose {victim!r}, which was not offered"
                )
            self._preempt(victim)
            plan.entries.pop(victim, None)
            plan.lost.add(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence, *, spoiled: bool = False) -> None:
        """Put a running sequence back to the front of the queue; ``spoiled`` blocks are not worth swapping out."""
        self._stop(seq)
        swap = not spoiled and self.policies.preemption.mode(seq) == "swap"
        swapped = swap and self.cache.swap_out(seq.table)
        if not swapped:
            self.cache.release(seq.table, returns=True)
        seq.num_preemptions += 1
        self.totals.preemptions += 1
        self.totals.swapped_out += swapped
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)
        self._ended.append(seq.seq_id)
        how = "swap" if swapped else "fault" if spoiled else "recompute"
        self.events.record(ev.REQUEST_PREEMPTED, seq.seq_id, detail=how)

    def _suffer(self, damage: Damage) -> list[Sequence]:
        """Count faults, forget what was spoiled, and have those who were given some of it start over; return who had
        been running.
        """
        self.totals.tier_faults += len(damage.faults)
        for tier, block, reason in damage.faults:
            self.events.record(ev.TIER_FAULT, blocks=(block,), medium=TIER_NAMES[tier], detail=reason)
        spoiled = self.cache.spoiled(damage.spoiled)
        self._stands = False
        size = self.config.block_size
        hit = [
            seq
            for seq in reversed(self.running)
            # What lies beyond is not written yet.
            if not spoiled.isdisjoint(seq.table.blocks[: -(-seq.num_computed // size)])
        ]
        for seq in hit:
            self._preempt(seq, spoiled=True)
        for seq in self.waiting:
            if not spoiled.isdisjoint(seq.table.host_blocks):
                self.cache.release(seq.table)
        return hit

    def _stop(self, seq: Sequence) -> None:
        """Take a running sequence out of the running; its blocks stay as they are."""
        if seq.decoders is not None:
            self._sync(seq)
            self.decoders.leave(seq)
        self.running.remove(seq)
        self.undecided.pop(seq, None)
        self.promised_seats -= seq.to_fork

    def _let_go(self) -> None:
        """Give up the blocks of those that had ended when this step was already planned."""
        for seq in self.leaving:
            self.cache.release(seq.table)
        self.leaving = []
        self._stands = False

    def _sync(self, seq: Sequence) -> None:
        """Bring a decoding sequence's table up to date, and its tokens if they are known beforehand."""
        first = seq.since
        n = self.decoders.lag(seq)
        if not n:
            return
        if seq.script is not None:
            tokens = seq.tokens
            if isinstance(tokens, HashedTokens):
                tokens.generated += n
            else:
                out = len(tokens) - seq.prompt_len
                tokens += seq.script.piece(out, out + n)
            seq.took(first, n)
        self.cache.commit(seq.table, n)

    # ---- looking in --------------------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """Return where the device tier's token slots are now."""
        return self.cache.memory(self.decoders.behind)

    def tables(self) -> Iterable[BlockTable]:
        """Return the block tables of every sequence that holds blocks in any tier."""
        for seq in self.decoders.members:
            self._sync(seq)
        return [s.table for s in (*self.running, *self.waiting, *self.leaving)]
