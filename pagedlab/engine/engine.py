"""The step loop.

    requests ──▶ step():  1. arrivals   whose time has come join the queue
                          2. scheduler  asks; the engine grants: prefix, room, preemption, budget     ─▶ StepOrders
                          3. prefetch   brings up what will be wanted
                          4. executor   carries out the moves, runs the batch, samples                ─▶ StepResult
                          5. commit     appends tokens, publishes full blocks, forks, finishes

Nothing of a step counts before its result is in: if the executor raises, the same work is ordered again by the next
call. Requests that can never run are refused by name when they are added, and the others go on.

Sequences that merely decode are held together (`pagedlab.engine.decoders`), so a step costs what changes in it. Where
outputs are known beforehand and time is virtual, `step` may take many steps at once: up to the next arrival, the next
finish, or the next block that somebody begins. What it leaves behind, event log and records, is what single
steps would have left.
"""

from __future__ import annotations

from math import isqrt

from pagedlab.cache.accounting import Memory
from pagedlab.config import Config
from pagedlab.costs.base import StepWork
from pagedlab.engine.arrivals import Arrivals
from pagedlab.engine.clock import Clock
from pagedlab.engine.coming import NEVER
from pagedlab.engine.link import Link
from pagedlab.engine.orders import Executor, Fallible, SequenceStep, StepOrders, StepResult
from pagedlab.engine.plan import Plan
from pagedlab.engine.prefetching import KnownFuture
from pagedlab.engine.sequence import Sequence, Status
from pagedlab.errors import PolicyError
from pagedlab.events import EventLog

_IDLE_ASKS = 1000
"""A prefetcher is asked so often at most while the engine waits for one arrival, so that finite work ends."""


_NO_FAILURES = StepResult([])
"""What comes of steps that no executor runs."""


class Engine(Arrivals):
    """Requests in, tokens and events out; policies decide, one executor does the work."""

    def __init__(
        self,
        config: Config,
        executor: Executor,
        *,
        clock: Clock | None = None,
        events: EventLog | None = None,
        skip_ahead: bool = True,
        knows_future: bool = False,
    ) -> None:
        super().__init__(config, executor, clock, events, knows_future)
        self._fallible = executor if self.cache.disk is not None and isinstance(executor, Fallible) else None
        self._skips = skip_ahead
        self._standing: list[Sequence] = []
        """Then, unless decoding is steady: who gets one token a step, in order."""
        self._sampling: list[Sequence] = []
        """Who reaches the last token known in this step, of those who were asked for."""
        self._last_start = -1
        self._reset_prefetch()
        executor.prepare(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            host_blocks=config.num_host_blocks,
            max_num_seqs=config.max_num_seqs,
            disk_blocks=config.num_disk_blocks,
            disk_path=config.disk_path,
        )
        self.clock.start()

    def _reset_prefetch(self) -> None:
        policy = self.policies.prefetch
        if policy.needs_future:
            policy.reset(future=KnownFuture(self.coming))  # type: ignore[call-arg]
        else:
            policy.reset()
        # A clock that takes an executor at its word counts the time of transfers too.
        if self.prefetching is not None and self._scripts is not None and self.clock.pace(1, 0) == (1, 0):
            self.prefetching.link = Link(self._scripts.load_ps)

    # ---- what there is to do -----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True while a request is running, waiting or yet to arrive, or something is left to copy."""
        return bool(self.running or self.waiting or self.coming or self.cache.moves)

    @property
    def idle_until(self) -> int | None:
        """Time of the next arrival in picoseconds if there is nothing to run before it, else None."""
        return self.coming.next if self.coming and not self.running and not self.waiting else None

    def rest(self) -> int | None:
        """With nothing to run now, let the prefetcher act if its time has come.

        Return when there is something to do next, in picoseconds; None if there is now, or never will be.
        """
        arrival = self.idle_until
        if arrival is None or self.prefetching is None or self.clock.now() >= arrival:
            return arrival
        self._prefetch_idle(self.clock.now())
        at = self.prefetching.next_ask()
        return arrival if at is None else min(arrival, at)

    def _prefetch_idle(self, until: int) -> None:
        """Ask the prefetcher whenever it wants to be asked up to ``until``, with nothing to run meanwhile."""
        prefetching = self.prefetching
        assert prefetching is not None
        for _ in range(_IDLE_ASKS):
            at = prefetching.next_ask()
            if at is None or at > until:
                break
            if at > self.clock.now():
                self.clock.wait_until(at)
            self.events.time = now = max(self.clock.now(), at)
            prefetching.ask((), now)
            if self.cache.moves:
                self._carry_out_moves()
                if self._fallible is not None:
                    self._lost_to_faults({})

    @property
    def prefetched(self) -> dict[str, int]:
        """Prefetched blocks by what became of them; once all work is done, what nobody has used was useless."""
        counts = dict(self.totals.prefetch)
        if not self.has_work:
            counts["useless"] += len(self.cache.prefetched)
        return counts

    def clear_cache(self) -> None:
        """Forget every cached prefix."""
        self.cache.clear()

    # ---- one step ----------------------------------------------------------------------------------------------

    def step(self, max_steps: int | None = None) -> int:
        """Run one step and return 1, or 0 if there was nothing left to do.

        Where time is virtual and outputs are known, it may be many steps that differ in nothing but length (at most
        ``max_steps``); their number is returned. Whatever the executor raises comes through, and the engine can be
        stepped again: the step has not happened.
        """
        if not self._await_work():
            if self.cache.moves:
                self._finish_moves()
            return 0
        start = self.events.time
        entries = self._plan()
        orders = self._orders(entries)
        num_moves = len(self.cache.moves)
        count, duration, growth = self._reach(orders, num_moves, max_steps)
        if num_moves:
            self._carry_out_moves()
        if self._fallible is not None and self._lost_to_faults(entries):
            orders = self._orders(entries)
        if self.prefetching is not None:
            orders.wait_ps = self.prefetching.wait_ps(start)
        if count > 1:
            total = count * duration + growth * (count * (count - 1) // 2)
            result = _NO_FAILURES
            self.clock.leap(total)
            self._last_start = start + total - duration - growth * (count - 1)
        else:
            result = self.executor.execute(orders)
            self.clock.step_done(result.duration_ps)
            self._last_start = start
        self._ended = []
        self.events.time = self.clock.now()
        self.events.step += count - 1
        self._commit(entries, orders.work, result, start, count, growth)
        self.events.step += 1
        self._settle()
        return count

    def run(self, max_steps: int | None = None) -> None:
        """Step until nothing is left to do, or ``max_steps`` have run."""
        if max_steps is None:
            while self.step():
                pass
        else:
            while max_steps > 0 and (taken := self.step(max_steps)):
                max_steps -= taken

    def _await_work(self) -> bool:
        """Let arrivals in; with nothing else to do, wait for the next one. False if there is none."""
        self.events.time = now = self.clock.now()
        # With asynchronous scheduling this step was planned when the last one began.
        planned = self._last_start if self.config.async_scheduling and self.running else now
        self._let_in(planned)
        if not self.running and not self.waiting:
            self._let_in(now)
        while not self.running and not self.waiting and self.coming:
            if self.prefetching is not None:
                # Who arrives at the same time is let in first; the prefetcher is asked in that step.
                self._prefetch_idle(self.coming.next - 1)
            self.clock.wait_until(self.coming.next)
            self.events.time = max(self.clock.now(), self.coming.next)
            self._let_in(self.events.time)
        return bool(self.running or self.waiting)

    def _plan(self) -> dict[Sequence, int]:
        """Decide who computes how many tokens; those who decode steadily are not listed."""
        plan = Plan(self)
        if self.decoders.members:
            self._grow_decoders(plan)
        if not self._stands or self.cache.better_match or (self.waiting and self.prefetching):
            self.cache.scattered = False
            self.cache.await_nothing()
            decision = self.policies.scheduler.plan(plan)
            # A decision that let somebody in or cost somebody their blocks was made for another set of sequences, and
            # one in whose midst blocks came free for less room; one that leaves a running sequence out can change
            # with memory, for it hands that one what another gives up.
            everyone = not self.undecided if self.steady else len(plan.entries) == len(self.running)
            self._stands = (
                decision is not None and everyone and not (plan.lost or plan.admitted or plan.gave_up)
            )
            self._standing = [] if self.steady else list(plan.entries)
        else:
            for seq in tuple(self._standing):
                plan.grant(seq, 1)
        if not plan.entries and not self.decoders.members:
            self._stands = False
            if self.leaving:
                self._let_go()
                return self._plan()
            raise PolicyError(
                f"scheduler {type(self.policies.scheduler).__name__} granted nothing, with {len(self.running)} "
                f"sequences running and {len(self.waiting)} waiting: it would stall for ever"
            )
        if self.leaving:
            self._let_go()
        prefetching = self.prefetching
        if prefetching is not None and (self.waiting or prefetching.is_due(self.events.time)):
            prefetching.ask(tuple(self.waiting), self.events.time)
        return plan.entries

    def _grow_decoders(self, plan: Plan) -> None:
        """Make room for one more token of everyone who decodes, in order; only some can need it."""
        decoders = self.decoders
        growing, fresh = decoders.at_boundary(), decoders.fresh
        if fresh:
            growing = [s for s in growing if s not in fresh]
        if len(growing) > 1:
            self.cache.prepare_growth([s.table for s in growing])
        for seq in (*growing, *fresh) if fresh else growing:
            if seq.decoders is not None:  # not preempted for one before it
                self.make_room(seq, seq.table.num_tokens + 1, plan)
        plan.budget -= len(decoders.members)

    def _orders(self, entries: dict[Sequence, int]) -> StepOrders:
        work = self._work(entries)
        if self._scripts is not None:
            return StepOrders(self.events.step, self.cache.moves, [], self._ended, work)
        batch = [self._entry(seq, 1) for seq in self.decoders.members]
        batch += [self._entry(seq, n) for seq, n in entries.items()]
        return StepOrders(self.events.step, self.cache.moves, batch, self._ended, work)

    def _entry(self, seq: Sequence, n: int) -> SequenceStep:
        start = seq.num_computed
        end = start + n
        return SequenceStep(
            seq_id=seq.seq_id,
            tokens=seq.tokens[start:end],
            start=start,
            table=seq.table.indices,
            table_version=seq.table.version,
            num_samples=0 if end < len(seq.tokens) else 1 + seq.to_fork,
            sample_index=seq.sample_index,
            sampling=seq.group.request.sampling,
            history=seq.tokens,  # type: ignore[arg-type]
        )

    def _work(self, entries: dict[Sequence, int]) -> StepWork:
        """Return what the step has to do, in sums, and note who samples."""
        decodes = len(self.decoders.members)
        context = self.decoders.context + decodes
        tokens = pairs = chunks = 0
        self._sampling = sampling = []
        for seq, n in entries.items():
            start = seq.table.num_tokens
            last = start + n == len(seq.tokens)
            if last:
                sampling.append(seq)
            if n == 1 and last:
                decodes += 1
                context += start + 1
            else:
                chunks += 1
                tokens += n
                pairs += n * start + n * (n + 1) // 2
        return StepWork(tokens, pairs, chunks, decodes, context, len(self.decoders.members) + len(sampling))

    def _reach(self, orders: StepOrders, num_moves: int, max_steps: int | None) -> tuple[int, int, int]:
        """Return how many steps can be taken at once, how long the first takes, and how much longer each next one."""
        alone = 1, 0, 0
        if not self._skips or self._scripts is None or not self._stands or not self.steady or num_moves:
            return alone
        if self.undecided or (self.waiting and self.prefetching):
            return alone
        decoders, work = self.decoders, orders.work
        count = min(decoders.steps_to_boundary(), decoders.steps_to_end())
        if max_steps is not None:
            count = min(count, max_steps)
        if count == 1:
            return alone
        linear = self._scripts.linear(work)
        pace = None if linear is None else self.clock.pace(*linear)
        if pace is None:
            return alone
        fixed, slope = pace
        first, growth = fixed + slope * work.context_tokens, slope * work.decode_seqs
        if self.coming.next < NEVER:
            gap = self.coming.next - self.events.time
            # With asynchronous scheduling the step that sees an arrival was planned a step before.
            late = self.config.async_scheduling and gap > 0
            count = min(count, _steps_until(gap, first, growth) + late)
        if self.prefetching is not None and (at := self.prefetching.next_ask()) is not None:
            count = min(count, _steps_until(at - self.events.time, first, growth))
        if count == 1:
            return alone
        return count, first, growth

    def _carry_out_moves(self) -> None:
        """Have the moves carried out, and count those that are, also if a fault leaves the others to the next step."""
        own = [] if self.prefetching is None else self.prefetching.take_own()
        self.totals.moved = self.totals.moved.and_also(own)
        ordered = tuple(self.cache.moves)
        try:
            self.executor.move(self.cache.moves)
        finally:
            done = ordered[: len(ordered) - len(self.cache.moves)]
            self.totals.moved = self.totals.moved.and_also(done)

    def _lost_to_faults(self, entries: dict[Sequence, int]) -> bool:
        """Whether a tier that failed has cost somebody a place in this step: who is left is in ``entries``."""
        assert self._fallible is not None
        damage = self._fallible.take_damage()
        if damage is None:
            return False
        lost = self._suffer(damage)
        for seq in lost:
            entries.pop(seq, None)
        return bool(lost)

    def _finish_moves(self) -> None:
        """Copy what the last step has stored through to lower tiers; it counts as that step's."""
        self._carry_out_moves()
        if self._fallible is not None:
            self._lost_to_faults({})
        if self.steps:
            self.steps.amend_last(moved=self.totals.moved)

    # ---- after the executor ------------------------------------------------------------------------------------

    def _commit(
        self,
        entries: dict[Sequence, int],
        work: StepWork,
        result: StepResult,
        start: int,
        count: int,
        growth: int,
    ) -> None:
        decoders, cache = self.decoders, self.cache
        batch = [] if self._scripts is not None else [*decoders.members, *entries]
        for i, reason in result.failures.items():
            seq = batch[i]
            seq.error = reason
            entries.pop(seq, None)
            if seq.decoders is not None:
                self._sync(seq)
            cache.distrust(seq.table)
            self._finish(seq, "error")
        first = cache.memory(decoders.behind + len(decoders.members)) if count > 1 else None
        decoders.advance(count)
        for seq in decoders.at_boundary():
            self._sync(seq)
        for seq, n in entries.items():
            cache.commit(seq.table, n)
        # What the pool holds is read when the step's tokens are in and nobody has left yet.
        self._record(work, start, count, growth, first)
        if self._scripts is not None:
            self.totals.output_tokens += count * len(decoders.members)
            for seq in decoders.pop_ended():
                self._finish(seq, self._script_reason(seq))
            for seq in self._sampling:
                self._take(seq, [])
        else:
            for seq, samples in zip(batch, result.samples):
                if samples and seq.status is Status.RUNNING:
                    self._take(seq, samples)

    def _record(self, work: StepWork, start: int, count: int, growth: int, first: Memory | None) -> None:
        total = self.events.time - start
        last = self.memory()
        self.steps.note(
            self.events.step - count + 1,
            start,
            (total - growth * (count * (count - 1) // 2)) // count,
            count,
            growth,
            len(self.running),
            len(self.waiting),
            work,
            self.totals,
            last if first is None else first,
        )
        if first is not None and (first.cached, first.saved) != (last.cached, last.saved):
            # What was published at the end found its place taken by a block that nobody can use any more.
            self.steps.amend_last(memory=last)

    def _take(self, seq: Sequence, samples: list[int]) -> None:
        """Append the sampled tokens (or the scripted ones): one to the sequence, the others to forks of it."""
        children = []
        for j in range(1, 1 + seq.to_fork):
            child = self._new_sequence(seq.group, j, seq.fork_tokens(self._num_sequences))
            child.admitted_at, child.hit_tokens = seq.admitted_at, seq.hit_tokens
            seq.group.sequences.append(child)
            self.cache.fork(seq.table, child.table)
            child.status = Status.RUNNING
            children.append(child)
        if children:
            at = self.running.index(seq) + 1
            self.running[at:at] = children
            self.undecided.update(dict.fromkeys(children))
            self.promised_seats -= seq.to_fork
            seq.to_fork = 0
            self._stands = False
        for i, member in enumerate((seq, *children)):
            script = member.script
            self._append(member, samples[i] if script is None else script.token(member.num_output))
            if self.steady and member.status is Status.RUNNING and member.decoders is None:
                del self.undecided[member]
                left = None if script is None else self._limit(member) - len(member.tokens)
                self.decoders.join(member, left)

    def _limit(self, seq: Sequence) -> int:
        """Tokens at which a scripted sequence ends."""
        assert seq.script is not None
        return min(seq.max_len, seq.prompt_len + seq.script.length)

    def _script_reason(self, seq: Sequence) -> str:
        assert seq.script is not None
        return seq.script.reason if seq.prompt_len + seq.script.length <= seq.max_len else "length"

    def _append(self, seq: Sequence, token: int) -> None:
        seq.tokens.append(token)
        if seq.first_token_at is None:
            seq.first_token_at = self.events.time
        seq.took(self.events.step)
        self.totals.output_tokens += 1
        if seq.script is not None:
            if len(seq.tokens) >= self._limit(seq):
                self._finish(seq, self._script_reason(seq))
            return
        sampling = seq.group.request.sampling
        if (
            token in sampling.stop_token_ids
            or (not sampling.ignore_eos and token in self.executor.eos_token_ids)
            or (sampling.stop and self._hit_stop_string(seq))
        ):
            self._finish(seq, "stop")
        elif len(seq.tokens) >= seq.max_len:
            self._finish(seq, "length")

    def _hit_stop_string(self, seq: Sequence) -> bool:
        text = self.executor.detokenize(seq.output) or ""
        ends = [at for s in seq.group.request.sampling.stop if (at := text.find(s)) >= 0]
        if ends:
            seq.text = text[: min(ends)]
        return bool(ends)

    # ---- looking in --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `InvariantBroken` unless law 1 holds now."""
        self.cache.check(self.tables())


def _steps_until(gap: int, first: int, growth: int) -> int:
    """Return the least n >= 1 with ``n * first + growth * n * (n - 1) / 2 >= gap``."""
    if gap <= first:
        return 1
    if growth == 0:
        return -(-gap // first)
    b = 2 * first - growth
    n = max(1, (isqrt(b * b + 8 * growth * gap) - b) // (2 * growth))
    while n * first + growth * (n * (n - 1) // 2) < gap:
        n += 1
    return n
