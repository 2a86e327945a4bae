"""The step loop.

    requests ──▶ step():  1. arrivals   whose time has come join the queue
                          2. scheduler  asks; the engine grants: prefix, room, preemption, budget     ─▶ StepOrders
                          3. prefetch   fills what is free
                          4. executor   carries out the moves, runs the batch, samples                ─▶ StepResult
                          5. commit     appends tokens, publishes full blocks, forks, finishes

Nothing of a step counts before its result is in: if the executor raises, the same work is ordered again by the next
call. Requests that can never run are refused by name when they are added, and the others go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from heapq import heapify, heappop, heappush

from pagedlab import events as ev
from pagedlab.cache.kv_cache import KVCache
from pagedlab.cache.table import BlockTable
from pagedlab.config import Config
from pagedlab.engine.clock import Clock, WallClock, to_ps
from pagedlab.engine.orders import Executor, SequenceStep, StepOrders, StepResult
from pagedlab.engine.plan import CacheResidency, Plan
from pagedlab.engine.records import StepRecord, Totals
from pagedlab.engine.request import Request
from pagedlab.engine.sequence import Group, Sequence, Status
from pagedlab.errors import ConfigError, PagedLabError, PolicyError, RequestTooLarge
from pagedlab.events import EventLog
from pagedlab.policies.block import Block
from pagedlab.policies.lookup import NO_MATCH


class Engine:
    """Requests in, tokens and events out; policies decide, one executor does the work."""

    def __init__(
        self,
        config: Config,
        executor: Executor,
        *,
        clock: Clock | None = None,
        events: EventLog | None = None,
    ) -> None:
        self.config = config
        self.executor = executor
        self.clock = clock or WallClock()
        self.events = EventLog() if events is None else events
        self.max_model_len = min(config.max_model_len or executor.max_model_len, executor.max_model_len)
        self.policies = policies = config.policies()
        """The clones that this run works on."""
        host_blocks = config.num_host_blocks
        self.cache = KVCache(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            allocator=policies.allocator,
            lookup=policies.lookup,
            eviction=policies.eviction,
            swap=policies.swap,
            host_blocks=host_blocks,
            null_block=config.null_block,
            events=self.events,
            on_prefetch_fate=self._prefetch_fate,
        )
        policies.scheduler.reset()
        policies.prefetch.reset()
        self.waiting: deque[Sequence] = deque()
        """The queue, front first."""
        self.running: list[Sequence] = []
        """Sequences that hold device blocks, oldest admission first."""
        self.finished: list[Sequence] = []
        self.groups: dict[str, Group] = {}
        self.steps: list[StepRecord] = []
        self.totals = Totals()
        self._future: list[tuple[int, int, Group]] = []
        self._ended: list[int] = []
        self._num_groups = 0
        self._num_sequences = 0
        self._standing: list[Sequence] = []
        """While the last decision stands: who decodes one token a step, in order, without asking the scheduler."""
        executor.prepare(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            host_blocks=host_blocks,
            max_num_seqs=config.max_num_seqs,
        )
        self.clock.start()

    # ---- requests ----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> Group:
        """Take a request in; it joins the queue at its arrival time (or now, if that has passed).

        One that can never run is refused at once: its sequences are finished with reason ``"refused"`` and the
        error. A second request of the same id raises `ConfigError`.
        """
        if request.request_id in self.groups:
            raise ConfigError(f"request id {request.request_id!r} is used twice; ids must be unique")
        if request.sampling.seed is None:
            # Different for every request, the same in every run.
            seed = hash((self.config.seed, self._num_groups)) & (2**63 - 1)
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        arrival = max(to_ps(request.arrival), 0)
        group = Group(request, arrival, self._num_groups)
        self._num_groups += 1
        self.groups[request.request_id] = group
        leader = self._new_sequence(group, 0, list(request.prompt))
        leader.to_fork = request.sampling.n - 1
        group.sequences.append(leader)
        try:
            self._check_fits(leader)
        except PagedLabError as error:
            self._refuse(leader, error)
            return group
        heappush(self._future, (arrival, group.order, group))
        return group

    def _new_sequence(self, group: Group, sample_index: int, tokens: list[int]) -> Sequence:
        prompt_len = len(group.request.prompt)
        max_len = min(prompt_len + group.request.sampling.max_tokens, self.max_model_len)
        seq = Sequence(self._num_sequences, group, sample_index, tokens, max_len, self.config.block_size)
        self._num_sequences += 1
        return seq

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
        if sampling.stop and self.executor.detokenize([]) is None:
            raise ConfigError(f"{name} has stop strings, but the model has no tokenizer; use stop_token_ids")
        claim = max(
            self.policies.reservation.claim(seq, seq.prompt_len, self.max_model_len), seq.table.final_len
        )
        needed = -(-claim // self.config.block_size)
        if needed > self.cache.device.capacity:
            raise RequestTooLarge(
                f"{name}: {claim} tokens in blocks of {self.config.block_size}",
                needed,
                self.cache.device.capacity,
                "blocks",
                "raise num_blocks, or lower max_tokens or the reservation",
            )

    def _refuse(self, seq: Sequence, error: PagedLabError) -> None:
        seq.error = str(error)
        self.events.record(ev.REQUEST_REFUSED, seq.seq_id, detail=seq.error)
        self._retire(seq, "refused")

    def cancel(self, request_id: str) -> bool:
        """End every sequence of a request, wherever it stands; False if it is unknown or has ended."""
        group = self.groups.get(request_id)
        alive = [s for s in group.sequences if s.status is not Status.FINISHED] if group else []
        for seq in alive:
            self._finish(seq, "cancelled")
        if any(entry[2] is group for entry in self._future):
            # Nobody waits for the arrival of what nobody wants.
            self._future = [entry for entry in self._future if entry[2] is not group]
            heapify(self._future)
        return bool(alive)

    @property
    def has_work(self) -> bool:
        """True while a request is running, waiting or yet to arrive."""
        return bool(self.running or self.waiting or self._future)

    @property
    def idle_until(self) -> int | None:
        """Time of the next arrival in picoseconds if there is nothing to do before it, else None."""
        return self._future[0][0] if self._future and not self.running and not self.waiting else None

    def clear_cache(self) -> None:
        """Forget every cached prefix."""
        self.cache.clear()

    # ---- one step ----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one step; False if there was nothing left to do.

        Whatever the executor raises comes through, and the engine can be stepped again: the step has not happened.
        """
        if not self._await_work():
            return False
        start = self.events.time
        orders = self._plan()
        num_moves = len(self.cache.moves)
        if self.cache.moves:
            self.executor.move(self.cache.moves)
        result = self.executor.execute(orders)
        self._ended = []
        self.clock.step_done(result.duration_ps)
        self.events.time = self.clock.now()
        self._commit(orders, result, start, num_moves)
        self.events.step += 1
        return True

    def run(self, max_steps: int | None = None) -> None:
        """Step until nothing is left to do, or ``max_steps`` have run."""
        while (max_steps is None or max_steps > 0) and self.step():
            if max_steps is not None:
                max_steps -= 1

    def _await_work(self) -> bool:
        """Let arrivals in; with nothing else to do, wait for the next one. False if there is none."""
        self.events.time = self.clock.now()
        self._let_in()
        while not self.running and not self.waiting and self._future:
            self.clock.wait_until(self._future[0][0])
            self.events.time = max(self.clock.now(), self._future[0][0])
            self._let_in()
        return bool(self.running or self.waiting)

    def _let_in(self) -> None:
        while self._future and self._future[0][0] <= self.events.time:
            _, _, group = heappop(self._future)
            for seq in group.sequences:
                if seq.status is Status.WAITING:
                    self.waiting.append(seq)
                    self._standing = []
                    self.events.record(ev.REQUEST_ARRIVED, seq.seq_id, detail=seq.request_id)

    def _plan(self) -> StepOrders:
        plan = Plan(self)
        self.cache.scattered = False
        if self._standing:
            for seq in tuple(self._standing):
                plan.grant(seq, 1)
        else:
            decision = self.policies.scheduler.plan(plan)
            # A decision that cost somebody their blocks was made for another set of sequences; and one that leaves a
            # running sequence out can change with memory, for it hands that one what another gives up.
            stands = decision is not None and not plan.lost and len(plan.entries) == len(self.running)
            self._standing = list(plan.entries) if stands else []
        if not plan.entries:
            self._standing = []
            raise PolicyError(
                f"scheduler {type(self.policies.scheduler).__name__} granted nothing, with {len(self.running)} "
                f"sequences running and {len(self.waiting)} waiting: it would stall for ever"
            )
        if self.policies.prefetch.enabled and self.waiting:
            self._run_prefetch()
        batch = [self._entry(seq, n) for seq, n in plan.entries.items()]
        return StepOrders(self.events.step, self.cache.moves, batch, self._ended)

    def _entry(self, seq: Sequence, n: int) -> SequenceStep:
        start = seq.table.num_tokens
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
            history=seq.tokens,
        )

    def _run_prefetch(self) -> None:
        loads = self.policies.prefetch.plan(
            tuple(self.waiting), CacheResidency(self.cache), self.config.prefetch_budget
        )
        for load in loads[: self.config.prefetch_budget]:
            self._prefetch_fate(load.block, "done" if self.cache.prefetch(load.block) else "refused")

    def _prefetch_fate(self, block: Block, fate: str) -> None:
        self.totals.prefetch[fate] += 1
        self.policies.prefetch.feedback(block, fate)  # type: ignore[arg-type]

    # ---- room --------------------------------------------------------------------------------------------------

    def admit(self, seq: Sequence, tokens: int, whole: bool, plan: Plan) -> int:
        """Give a waiting sequence its prefix and room, and make it run; return the tokens granted, 0 for no room."""
        spare = self.config.watermark_blocks if self.running else 0
        resume = self._swap_in if seq.table.swapped else self._prefill
        granted = resume(seq, tokens, whole, spare, plan)
        if granted:
            self.waiting.remove(seq)
            self.running.append(seq)
            seq.status = Status.RUNNING
        return granted

    def _swap_in(self, seq: Sequence, tokens: int, whole: bool, spare: int, plan: Plan) -> int:
        n = plan.cut(seq.remaining, tokens, whole)
        if not n or not self.cache.swap_in(seq.table, self._claim(seq, seq.num_computed + n), spare=spare):
            return 0
        self.events.record(ev.REQUEST_RESUMED, seq.seq_id, detail="swap")
        return n

    def _prefill(self, seq: Sequence, tokens: int, whole: bool, spare: int, plan: Plan) -> int:
        readmitted = seq.admitted_at is not None
        match = self.cache.match(seq.table.prefix, seq.num_tokens - 1)
        while True:
            n = plan.cut(seq.num_tokens - match.num_tokens, tokens, whole)
            if not n:
                return 0
            claim = self._claim(seq, match.num_tokens + n)
            if self.cache.admit(seq.table, match, claim, spare=spare, readmitted=readmitted):
                break
            if self.running or not match.num_tokens:
                return 0
            # Alone, and the prefix itself is in the way (pinned, or splitting the only run): start from nothing.
            match = NO_MATCH
        if readmitted:
            again = max(0, seq.num_tokens - 1 - match.num_tokens)
            seq.recomputed_tokens += again
            self.totals.recomputed_tokens += again
            self.events.record(ev.REQUEST_RESUMED, seq.seq_id, detail="recompute")
        else:
            seq.admitted_at = self.events.time
            seq.hit_tokens = match.num_tokens
            self.totals.hit_tokens += match.num_tokens
            self.totals.prompt_tokens += seq.prompt_len
            self.events.record(ev.REQUEST_ADMITTED, seq.seq_id, detail=seq.request_id)
        return n

    def _claim(self, seq: Sequence, step_end: int) -> int:
        """Tokens to have room for at admission: the reservation's word, within what one sequence can ever get."""
        claim = self.policies.reservation.claim(seq, step_end, self.max_model_len)
        return max(step_end, min(claim, self.cache.device.capacity * self.config.block_size))

    def make_room(self, seq: Sequence, num_tokens: int, plan: Plan) -> bool:
        """Grow a running sequence, at others' cost if need be; False if it was preempted itself."""
        while not self.cache.grow(seq.table, num_tokens):
            self._standing = []
            oldest = min(self.running, key=lambda s: (s.group.order, s.sample_index))
            candidates = [s for s in self.running if s is not oldest]
            if not candidates:
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

    def _preempt(self, seq: Sequence) -> None:
        swapped = self.policies.preemption.mode(seq) == "swap" and self.cache.swap_out(seq.table)
        if not swapped:
            self.cache.release(seq.table)
        seq.num_preemptions += 1
        self.totals.preemptions += 1
        self.totals.swapped_out += swapped
        self.running.remove(seq)
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)
        self._ended.append(seq.seq_id)
        self.events.record(ev.REQUEST_PREEMPTED, seq.seq_id, detail="swap" if swapped else "recompute")

    # ---- after the executor ------------------------------------------------------------------------------------

    def _commit(self, orders: StepOrders, result: StepResult, start: int, num_moves: int) -> None:
        by_id = {seq.seq_id: seq for seq in self.running}
        done: list[tuple[Sequence, list[int]]] = []
        for i, entry in enumerate(orders.batch):
            seq = by_id[entry.seq_id]
            if i in result.failures:
                seq.error = result.failures[i]
                self.cache.distrust(seq.table)
                self._finish(seq, "error")
            else:
                self.cache.commit(seq.table, len(entry.tokens))
                done.append((seq, result.samples[i]))
        # What the pool holds is read when the step's tokens are in and nobody has left yet.
        self.steps.append(self._record(orders, start, num_moves))
        for seq, samples in done:
            if samples:
                self._take(seq, samples)

    def _record(self, orders: StepOrders, start: int, num_moves: int) -> StepRecord:
        decoding = sum(1 for e in orders.batch if len(e.tokens) == 1 and e.num_samples)
        return StepRecord(
            step=self.events.step,
            start=start,
            duration=self.events.time - start,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            prefill_tokens=sum(len(e.tokens) for e in orders.batch) - decoding,
            decode_tokens=decoding,
            moves=num_moves,
            preemptions=self.totals.preemptions,
            memory=self.cache.memory(),
        )

    def _take(self, seq: Sequence, samples: list[int]) -> None:
        """Append the sampled tokens: one to the sequence, the others to forks of it."""
        children = []
        for j in range(1, len(samples)):
            child = self._new_sequence(seq.group, j, list(seq.tokens))
            child.admitted_at, child.hit_tokens = seq.admitted_at, seq.hit_tokens
            seq.group.sequences.append(child)
            self.cache.fork(seq.table, child.table)
            child.status = Status.RUNNING
            children.append(child)
        if children:
            at = self.running.index(seq) + 1
            self.running[at:at] = children
            seq.to_fork = 0
            self._standing = []
        for member, token in zip([seq, *children], samples):
            self._append(member, token)

    def _append(self, seq: Sequence, token: int) -> None:
        seq.tokens.append(token)
        now = self.events.time
        if seq.first_token_at is None:
            seq.first_token_at = now
        seq.token_times.append(now)
        self.totals.output_tokens += 1
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

    def _finish(self, seq: Sequence, reason: str) -> None:
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self._standing = []
        self.cache.release(seq.table)
        self._ended.append(seq.seq_id)
        self.events.record(ev.REQUEST_FINISHED, seq.seq_id, detail=reason)
        self._retire(seq, reason)

    def _retire(self, seq: Sequence, reason: str) -> None:
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        seq.finished_at = self.events.time
        self.finished.append(seq)

    # ---- looking in --------------------------------------------------------------------------------------------

    def tables(self) -> Iterable[BlockTable]:
        """Return the block tables of every sequence that holds blocks in any tier."""
        return [s.table for s in (*self.running, *self.waiting)]

    def check(self) -> None:
        """Raise `InvariantBroken` unless law 1 holds now."""
        self.cache.check(self.tables())
