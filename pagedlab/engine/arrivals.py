"""Requests on their way in and out.

What the engine takes care of before a sequence asks for room and after it has given its blocks up: who can never run,
who comes when, who follows whom, and what an end leaves behind.
"""

from __future__ import annotations

from dataclasses import replace

from pagedlab import events as ev
from pagedlab.config import Config
from pagedlab.engine.clock import Clock, WallClock, to_ps
from pagedlab.engine.coming import Coming
from pagedlab.engine.orders import Executor, Scripted
from pagedlab.engine.records import StepLog
from pagedlab.engine.request import Request
from pagedlab.engine.seats import Seats
from pagedlab.engine.sequence import Group, Sequence, Status
from pagedlab.errors import ConfigError, PagedLabError
from pagedlab.events import EventLog
from pagedlab.policies.prompt import HashedPrompt, HashedTokens


class Arrivals(Seats):
    """Who is known: the requests, those yet to come, and those that have ended."""

    def __init__(
        self,
        config: Config,
        executor: Executor,
        clock: Clock | None,
        events: EventLog | None,
        knows_future: bool,
    ) -> None:
        super().__init__(
            config,
            executor.max_model_len,
            EventLog() if events is None else events,
            getattr(executor, "shape", None),
            knows_future,
        )
        self.executor = executor
        self.clock = clock or WallClock()
        self._scripts = executor if isinstance(executor, Scripted) else None
        self.groups: dict[str, Group] = {}
        self.finished: list[Sequence] = []
        self.steps = StepLog()
        self.coming = Coming()
        self._followers: dict[str, list[Group]] = {}
        self._num_groups = 0
        self._num_sequences = 0

    # ---- in ----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> Group:
        """Take a request in; it joins the queue at its arrival time (or now, if that has passed).

        One that can never run is refused at once: its sequences are finished with reason ``"refused"`` and the
        error. A second request of the same id raises `ConfigError`.
        """
        if request.request_id in self.groups:
            raise ConfigError(f"request id {request.request_id!r} is used twice; ids must be unique")
        if request.sampling.seed is None and self._scripts is None:
            # Different for every request, the same in every run.
            seed = hash((self.config.seed, self._num_groups)) & (2**63 - 1)
            request = replace(request, sampling=replace(request.sampling, seed=seed))
        if request.follows is not None and request.follows not in self.groups:
            raise ConfigError(
                f"request {request.request_id!r} follows {request.follows!r}, which was not added before it"
            )
        arrival = max(to_ps(request.arrival), 0)
        group = Group(request, arrival, self._num_groups, self.steps, unfinished=request.sampling.n)
        self._num_groups += 1
        self.groups[request.request_id] = group
        prompt = request.prompt
        tokens = (
            HashedTokens(prompt, self._num_sequences) if isinstance(prompt, HashedPrompt) else list(prompt)
        )
        leader = self._new_sequence(group, 0, tokens)
        leader.to_fork = request.sampling.n - 1
        group.sequences.append(leader)
        try:
            self._check_fits(leader)
            self._check_stop(leader)
        except PagedLabError as error:
            self._refuse(leader, error)
            return group
        if request.follows is None:
            self.coming.add(group)
        elif self.groups[request.follows].unfinished:
            self._followers.setdefault(request.follows, []).append(group)
        else:
            self._send(group)
        return group

    def _send(self, group: Group) -> None:
        """What the group follows has ended: it comes after its think time."""
        group.arrival = self.events.time + max(to_ps(group.request.think_time), 0)
        self.coming.add(group)

    def _new_sequence(self, group: Group, sample_index: int, tokens: list[int] | HashedTokens) -> Sequence:
        prompt_len = len(group.request.prompt)
        max_len = min(prompt_len + group.request.sampling.max_tokens, self.max_model_len)
        script = None
        if self._scripts is not None:
            script = self._scripts.script(group.request, sample_index, self._num_sequences)
        seq = Sequence(self._num_sequences, group, sample_index, tokens, max_len, self.config.block_size)
        seq.script = script
        self._num_sequences += 1
        return seq

    def _check_stop(self, seq: Sequence) -> None:
        if seq.group.request.sampling.stop and self.executor.detokenize([]) is None:
            raise ConfigError(
                f"request {seq.request_id!r} has stop strings, but the model has no tokenizer; use stop_token_ids"
            )

    def _let_in(self, until: int) -> None:
        while self.coming.next <= until:
            group = self.coming.pop()
            for seq in group.sequences:
                if seq.status is Status.WAITING:
                    self.waiting.append(seq)
                    self._stands = False
                    if self.events.enabled:
                        self.events.record(ev.REQUEST_ARRIVED, seq.seq_id, detail=seq.request_id)
                    if self.prefetching is not None:
                        self.prefetching.arrived(seq)

    # ---- out ---------------------------------------------------------------------------------------------------

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
        if group is not None:
            # Nobody waits for the arrival of what nobody wants.
            self.coming.forget(group)
        self._settle()
        return bool(alive)

    def _settle(self) -> None:
        """After the last step nobody's leaving waits for a plan."""
        if self.leaving and not (self.running or self.waiting or self.coming):
            self._let_go()

    def _finish(self, seq: Sequence, reason: str) -> None:
        ran = seq.status is Status.RUNNING
        if ran:
            self._stop(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self._stands = False
        if ran and self.config.async_scheduling:
            self.leaving.append(seq)
        else:
            self.cache.release(seq.table)
        self._ended.append(seq.seq_id)
        self.events.record(ev.REQUEST_FINISHED, seq.seq_id, detail=reason)
        self._retire(seq, reason)

    def _retire(self, seq: Sequence, reason: str) -> None:
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        seq.finished_at = self.events.time
        seq.table.prefix.forget()
        self.finished.append(seq)
        group = seq.group
        # Samples that have not parted yet never will.
        group.unfinished -= 1 + seq.to_fork
        if not group.unfinished:
            if self.prefetching is not None and seq.admitted_at is not None:
                self.prefetching.finished(group.sequences[0])
            for follower in self._followers.pop(group.request.request_id, ()):
                if any(s.status is not Status.FINISHED for s in follower.sequences):
                    self._send(follower)
