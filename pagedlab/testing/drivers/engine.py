"""A small engine that is short of memory, around one policy: real admission, preemption and eviction, and no model.

The executor is `StubExecutor`, which draws every token from a hash of what it reads through the block table. So a
policy that makes the engine read a wrong slot changes what is said, and that is compared with what should be said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pagedlab import events as ev
from pagedlab.config import Config
from pagedlab.engine.clock import StepClock
from pagedlab.engine.engine import Engine
from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.errors import ConfigError, InvariantBroken, PolicyError
from pagedlab.events import Event
from pagedlab.executors.stub import StubExecutor
from pagedlab.testing.driver import Driver

BLOCK_SIZE = 2
MAX_MODEL_LEN = 14
_ENDLESS = 2000
"""Steps after which so little work is taken for endless."""
_PERSONS = (None, "s", "t")
_SURROUNDINGS: tuple[dict[str, Any], ...] = (
    {},
    {"swap": "host", "preemption": "swap", "prefetch": "queue-lookahead", "lookup": "radix"},
    {"scheduler": "iteration-level", "async_scheduling": True},
    {"swap": "host", "host_blocks": 24, "prefetch": "queue-lookahead", "eviction": "fifo"},
    {"allocator": "first-fit", "reservation": "max", "lookup": "none"},
    {"reservation": "pow2", "watermark": 0.1, "max_num_batched_tokens": 5},
    {"scheduler": "static-batch", "null_block": True, "preemption": "swap"},
    {"lookup": "none", "reservation": "oracle", "max_num_batched_tokens": 3},
)
"""What the other nine decisions are: one for each size."""
_LAWS = (
    ("it would stall for ever", "work_ends"),
    ("asked twice for", "nobody_is_asked_for_twice"),
    ("which was not offered", "chooses_a_candidate"),
)
"""What the engine says of a policy that breaks its contract, and the law that this is."""
_TOLD = {
    ev.REQUEST_ADMITTED: "is admitted",
    ev.REQUEST_PREEMPTED: "is preempted",
    ev.REQUEST_RESUMED: "resumes",
    ev.REQUEST_FINISHED: "ends",
}


class Serving(Driver):
    """Requests come while others run.

    Options: ``watch`` is called with the driver once the engine is there; ``reuse`` hands the policy itself to the
    engine, where it would work with a clone.
    """

    longest: ClassVar[int] = 14
    share: ClassVar[float] = 0.4
    operations: ClassVar[tuple[str, ...]] = (
        "arrive",
        "arrive_like_before",
        "step_once",
        "arrive",
        "steps",
        "disturb",
    )

    def begin(self, codes: Sequence[int]) -> None:
        """Build the engine around a clone of the policy."""
        if self.options.get("reuse"):
            vars(self.policy)["clone"] = lambda: self.policy
        around = dict(_SURROUNDINGS[(self.size - 1) % len(_SURROUNDINGS)])
        if self.policy.slot == "prefetch":  # who is to bring something up needs a tier below, and a queue
            around.update(swap="host", lookup="chained-hash", max_num_seqs=3)
        around[self.policy.slot] = self.policy
        least = -(-MAX_MODEL_LEN // BLOCK_SIZE)
        self.requests: list[Request] = []
        self.num_steps = 0
        self.config = self.ask(
            "a Config with it",
            Config,
            **{
                "num_blocks": least + self.size % 3,
                "block_size": BLOCK_SIZE,
                "max_num_seqs": 4,
                "max_num_batched_tokens": 16,
                "max_model_len": MAX_MODEL_LEN,
                **around,
            },
        )
        self.stub = StubExecutor(vocab_size=3, seed=self.size)
        # A yardstick may look ahead: all that is to come has been added, but for what comes while it runs.
        known = bool(getattr(self.policy, "needs_future", False))
        self.engine: Engine = self.ask(
            "reset", Engine, self.config, self.stub, clock=StepClock(), knows_future=known
        )
        self.asked = getattr(self.engine.policies, self.policy.slot)
        self.seen = 0
        watch = self.options.get("watch")
        if watch is not None:
            watch(self)

    # ---- operations ----------------------------------------------------------------------------------------------

    def arrive(self, argument: int) -> None:
        """A request joins the queue."""
        prompt = [argument % 2, *[(argument >> i) % 3 for i in range(argument // 2 % 8)]]
        self.add(prompt, argument)

    def arrive_like_before(self, argument: int) -> None:
        """A request joins that begins like an earlier one."""
        if self.requests:
            before = self.requests[argument % len(self.requests)].prompt
            self.add([*before, argument % 3][:9], argument)
        else:
            self.arrive(argument)

    def add(self, prompt: list[int], argument: int) -> None:
        """Send a request."""
        name = str(len(self.requests))
        max_tokens = 1 + (argument // 3 + 3) % 9
        n = 2 if argument % 11 == 10 else 1
        request = Request(
            request_id=name,
            prompt=prompt,
            arrival=0.0,
            priority=argument % 3,
            session=_PERSONS[argument % 3],
            sampling=SamplingParams(max_tokens=max_tokens, n=n),
            hints=Hints(output_len=max(1, max_tokens - argument % 2)),
        )
        self.requests.append(request)
        self.tell(f"request {name} ({len(prompt)} tokens, up to {max_tokens * n} new)")
        self.ask(f"add request {name}", self.guarded, self.engine.add, request)
        refused = [s for s in self.engine.groups[name].sequences if s.finish_reason == "refused"]
        if refused:
            raise self.broke("what_fits_is_not_refused", f"request {name} is refused: {refused[0].error}")

    def step_once(self, argument: int) -> None:
        """The engine takes one step."""
        self.one_step()

    def steps(self, argument: int) -> None:
        """The engine takes some steps."""
        for _ in range(1 + argument % 4):
            self.one_step()

    def one_step(self) -> bool:
        """Take a step, and look at the books; False if there was nothing to do."""
        took = self.ask("the next step", self.guarded, self.engine.step)
        self.ask("after a step", self.guarded, self.engine.check)
        self.num_steps += bool(took)
        events = list(self.engine.events.since(self.seen))
        self.seen += len(events)
        if took:
            said = ", ".join(filter(None, map(self.said, events)))
            self.tell(f"step {self.num_steps}" + (f" ({said})" if said else ""), [tuple(e) for e in events])
        if self.num_steps > _ENDLESS:
            raise self.broke("work_ends", f"{_ENDLESS} steps later it has not ended")
        return bool(took)

    def said(self, event: Event) -> str:
        """Return what became of a request, if that is what the event is about."""
        if event.kind not in _TOLD:
            return ""
        groups = self.engine.groups.items()
        name = next(name for name, group in groups if any(s.seq_id == event.seq_id for s in group.sequences))
        return f"{name} {_TOLD[event.kind]}"

    def disturb(self, argument: int) -> None:
        """Somebody gives up, or the cache is cleared."""
        if argument % 8 < 7:
            if not self.requests:
                return
            name = self.requests[argument % len(self.requests)].request_id
            if self.ask(f"cancel request {name}", self.guarded, self.engine.cancel, name):
                self.tell(f"cancel request {name}")
        else:
            self.ask("clear", self.guarded, self.engine.clear_cache)
            self.tell("clear the cache")

    def finish(self) -> None:
        """Step until all work is done, and compare what was said."""
        while self.one_step():
            pass
        self.ask("at the end", self.guarded, self.engine.check)
        for pool in (self.engine.cache.device, self.engine.cache.host):
            if pool is not None and pool.num_in_use:
                raise self.broke(
                    "books_balance", f"all requests have ended, and {pool.num_in_use} blocks are in use"
                )
        if self.engine.has_work:
            raise self.broke("work_ends", "no step is taken any more, and there is work left")
        for request in self.requests:
            self.outputs(request)

    def outputs(self, request: Request) -> None:
        """Compare what was said with what should have been said."""
        room = MAX_MODEL_LEN - len(request.prompt)
        for seq in self.engine.groups[request.request_id].sequences:
            limit = min(request.sampling.max_tokens, room)
            wanted = self.stub.reference(request.prompt, limit, seq.sample_index)
            if seq.finish_reason == "cancelled":
                wanted = wanted[: len(seq.output)]
            if seq.output != wanted:
                said = f"request {request.request_id} said {seq.output}, not {wanted}"
                raise self.broke("outputs_are_unchanged", said)

    def guarded(self, method: Any, *arguments: Any) -> Any:
        """Call the engine; what it says against the policy is the law that was broken."""
        try:
            return method(*arguments)
        except PolicyError as error:
            law = next((law for words, law in _LAWS if words in str(error)), None)
            if law is None:
                raise
            raise self.broke(law, str(error)) from error
        except InvariantBroken as error:
            raise self.broke("books_balance", str(error)) from error
        except ConfigError as error:
            raise self.broke(self.error_law, str(error)) from error
