"""Fair service of tenants: the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
(OSDI 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from pagedlab.policies.base import param
from pagedlab.policies.scheduler import Decision, Schedulable, Scheduler, Step, decoding
from pagedlab.registry import register


@dataclass(slots=True)
class Account:
    """What one tenant has had."""

    inputs: int = 0
    """Prompt tokens of its admitted requests."""
    outputs: int = 0
    """Tokens generated for it."""
    lift: float = 0.0
    """What it was not there to use."""


@dataclass(slots=True)
class _Served:
    account: Account
    sequence: Schedulable
    counted: int = 0
    """Output tokens that are in the account."""


@register("scheduler", "fair")
class Fair(Scheduler):
    """The tenant that has had the least is next; within a tenant first come, first served (VTC).

    A tenant's counter is ``input_weight`` times the prompt tokens admitted for it and ``output_weight`` times the
    tokens generated for it. Who comes back to the queue is lifted to the least counter in it, so that being away earns
    nothing. Of two tenants that both have requests waiting neither gets more than the other by over
    2 max(input_weight * longest prompt, output_weight * tokens of a full batch). Prompts are charged when they are
    admitted, whatever of them was cached, and once, however often a request is preempted. O(running + waiting) a step
    in which it is asked; while requests of several tenants wait for room, that is every step.
    """

    steady_decode: ClassVar[bool] = True

    tenant: str = param("salt", choices=("salt", "session"), help="what of a request names its tenant")
    input_weight: float = param(1.0, low=0.0, high=100.0, help="what a token of a prompt counts")
    output_weight: float = param(2.0, low=0.0, high=100.0, help="what a generated token counts")
    max_chunk: int = param(8192, low=1, unit="tokens", help="longest piece of one prompt in one step")

    def reset(self) -> None:
        self.accounts: dict[Hashable, Account] = {}
        """By tenant."""
        self._served: dict[str, _Served] = {}
        """Admitted requests that have not ended."""
        self._queued: set[Hashable] = set()
        """Tenants that had requests waiting when the last plan was made."""
        self._last_out: Account | None = None
        """Whose last waiting request was the last to be admitted."""

    def counter(self, tenant: Hashable) -> float:
        """Return the tenant's virtual counter as of the last plan."""
        return self._level(self.accounts[tenant])

    def _level(self, account: Account) -> float:
        return self.input_weight * account.inputs + self.output_weight * account.outputs + account.lift

    def plan(self, step: Step) -> Decision:
        self._count_outputs()
        for sequence in step.running:
            step.grant(sequence, self.max_chunk)
        queues: dict[Hashable, deque[Schedulable]] = {}
        for sequence in step.waiting:
            tenant = sequence.salt if self.tenant == "salt" else sequence.session
            queues.setdefault(tenant, deque()).append(sequence)
        self._lift(queues)
        while queues:
            tenant = min(queues, key=self.counter)
            sequence = queues[tenant][0]
            if not step.grant(sequence, self.max_chunk):
                break
            self._charge(tenant, sequence)
            queues[tenant].popleft()
            if not queues[tenant]:
                del queues[tenant]
                self._last_out = self.accounts[tenant]
        self._queued = set(queues)
        # Which of several tenants is next changes with every token; whether there is a seat does not.
        return None if len(queues) > 1 and step.seats > 0 else decoding(step)

    def _count_outputs(self) -> None:
        for name, served in list(self._served.items()):
            output = served.sequence.request_output
            served.account.outputs += output - served.counted
            served.counted = output
            if served.sequence.request_ended:
                del self._served[name]

    def _lift(self, queues: dict[Hashable, deque[Schedulable]]) -> None:
        """Bring tenants that are new in the queue up to those that were in it, or to who left it last."""
        present = [self.accounts[tenant] for tenant in queues if tenant in self._queued]
        for tenant in queues:
            if tenant in self._queued:
                continue
            account = self.accounts.setdefault(tenant, Account())
            others = present or ([] if self._last_out is None else [self._last_out])
            level = min(map(self._level, others), default=0.0)
            account.lift += max(0.0, level - self._level(account))
            present.append(account)

    def _charge(self, tenant: Hashable, sequence: Schedulable) -> None:
        if sequence.request_id not in self._served:
            account = self.accounts[tenant]
            account.inputs += sequence.prompt_len
            self._served[sequence.request_id] = _Served(account, sequence)
