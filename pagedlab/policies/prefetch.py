"""Slot `prefetch`: what to bring up the tiers before it is asked for.

The engine tells of what happens, asks for a plan, and says what became of it::

    arrived(sequence) ──▶ used(sequence, blocks) ──▶ finished(sequence)
    plan(waiting, residency, link_budget) ──▶ loads ──▶ feedback(block, fate)

`plan` is asked after scheduling, in a step in which requests wait, after something that was told of, and when the time
has come that `wake_at` named, also while nothing runs. Between such steps nothing is asked, so a simulation may leap.
A plan is a list of `Load`s in order of worth. The engine carries out the first ``link_budget`` of them, as far as
there are free blocks, or, where a load says so, cached ones that the eviction policy gives up: but not what
``residency`` showed for this plan, nor what the front of the queue will find, nor what was brought up and not used yet.
Where there is no room even so, it stops. If the budget cut some off, it asks again once the link has room.

Each load that is carried out (``"done"``) has one end:

* ``"useful"``: an admission found the block on the device;
* ``"late"``: an admission wanted it while it was still on its way, and waited;
* ``"harmful"``: before it was used, an admission missed the block that it had displaced;
* ``"useless"``: it was given up unused, or the run ended.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

from pagedlab.policies.base import Policy, param
from pagedlab.policies.block import DEVICE, Block, Origin
from pagedlab.policies.view import NOTHING_KNOWN, View
from pagedlab.registry import register

Fate = Literal["done", "refused", "useful", "late", "harmful", "useless"]
FATES: tuple[Fate, ...] = get_args(Fate)
ENDS: tuple[Fate, ...] = ("useful", "late", "harmful", "useless")
"""How a load that was carried out ends, in the end."""


class Load(NamedTuple):
    """Bring the content of ``block`` from its tier to ``to_tier``."""

    block: Block
    to_tier: int = DEVICE
    evict: bool = False
    """If no block is free, take the place of a cached one."""


class Waiting(Protocol):
    """What a prefetcher sees of a sequence, waiting or not."""

    @property
    def request_id(self) -> str:
        """The request it belongs to."""

    @property
    def session(self) -> str | None:
        """Conversation or agent it belongs to."""

    @property
    def origin(self) -> Origin:
        """All that its request said of where it comes from: session, class, tenant, agent's step."""


class Residency(Protocol):
    """Read-only answers about where prefixes lie. Looking is not using."""

    def prefix(self, sequence: Waiting) -> list[Block]:
        """Return the cached blocks of the sequence's tokens in order, each in the highest tier that holds it.

        Of one that has finished: what its next turn would find. O(blocks).
        """

    def below(self, sequence: Waiting) -> list[Block]:
        """Return those of `prefix` that lie in a lower tier."""

    def children(self, block: Block) -> list[Block]:
        """Return the cached blocks that continue ``block`` and lie in a lower tier alone, latest first. O(children)."""


class Arrival(NamedTuple):
    """A request to come."""

    at: float
    """Seconds on the engine's clock."""
    sequence: Waiting


class Future(Protocol):
    """What is known of requests to come."""

    def coming(self, n: int) -> list[Arrival]:
        """Return the next ``n`` arrivals whose time is known (a follower's is, once its predecessor ended)."""


class Prefetch(Policy):
    """Contract. ``enabled`` False spares the engine the question.

    Only `plan` must be written::

        @pagedlab.register("prefetch", "last-answered")
        class LastAnswered(Prefetch):
            "Keep up what the sessions left behind, the one that was answered last before the others."

            def reset(self):
                self._answered = {}

            def finished(self, sequence):
                self._answered.pop(sequence.session, None)
                self._answered[sequence.session] = sequence

            def plan(self, waiting, residency, link_budget):
                return loads_of(reversed(self._answered.values()), residency, evict=True)
    """

    slot: ClassVar[str] = "prefetch"
    enabled: ClassVar[bool] = True
    needs_future: ClassVar[bool] = False
    """`reset` wants ``future``, a `Future`: only a run that was handed its whole workload has it."""

    _view = NOTHING_KNOWN

    @property
    def view(self) -> View:
        """The time, the queue and the costs, as far as this run knows them."""
        return self._view

    def attach(self, view: View) -> None:
        """See the world through ``view`` from the next `reset` on."""
        self._view = view

    @property
    def now(self) -> float:
        """Seconds on the engine's clock."""
        return self._view.now / 1e12

    def reset(self) -> None:
        """Forget the last run."""

    def arrived(self, sequence: Waiting) -> None:
        """A request has joined the queue."""

    def used(self, sequence: Waiting, blocks: Sequence[Block]) -> None:
        """A sequence was admitted and found ``blocks``, the beginning of its prefix, now all on the device."""

    def finished(self, sequence: Waiting) -> None:
        """A request has ended; what it stored is cached. Of parallel samples the first stands for all."""

    @abstractmethod
    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        """Return loads in order of worth; more than ``link_budget`` (blocks) are cut off."""

    def wake_at(self) -> float | None:
        """Return the time, in seconds, at which to be asked though nothing happens; None: never.

        Read after each call of a method above or of `feedback`. A time that is not after the last plan counts as None.
        """
        return None

    def feedback(self, block: Block, fate: Fate) -> None:
        """Hear what became of a load: refused (no room, or nothing to bring up any more), or done, and how it ended."""


def loads_of(sequences: Iterable[Waiting], residency: Residency, evict: bool) -> list[Load]:
    """Return the loads that bring the sequences' prefixes up, in their order.

    All of them are looked at, so that what lies on the device of one is not given up for another.
    """
    found: dict[int, Load] = {}
    for sequence in sequences:
        for block in residency.below(sequence):
            found.setdefault(block.serial, Load(block, evict=evict))
    return list(found.values())


@register("prefetch", "none")
class NoPrefetch(Prefetch):
    """Bring nothing up before it is asked for."""

    enabled: ClassVar[bool] = False

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        return []


@register("prefetch", "queue-lookahead")
class QueueLookahead(Prefetch):
    """Load the prefixes of the next waiting requests, in queue order. O(depth · blocks of a prompt).

    Gao et al., Cost-Efficient Large Language Model Serving for Multi-turn Conversations with CachedAttention, USENIX
    ATC 2024.
    """

    depth: int = param(8, low=1, unit="requests", help="how far to look down the queue")
    evict: bool = param(True, help="take the place of cached blocks when none is free")

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        return loads_of(waiting[: self.depth], residency, self.evict)
