"""What a person asks for: a prompt, how to sample, and hints that policies may use."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from pagedlab.errors import ConfigError
from pagedlab.policies.block import Origin


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn and when it ends.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1 are off.
    ``n`` parallel samples share the prompt's blocks. The draw at each position depends on ``seed`` (None: one
    from the run's own seed), the sample's number and the position alone, so preemption, batching and policies
    cannot change it. Stop strings end the text before their first occurrence; ``stop_token_ids`` end it as
    the model's own end-of-sequence ids do, unless ``ignore_eos``.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop: str | tuple[str, ...] = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        limits: list[tuple[str, float, float]] = [
            ("max_tokens", 1, float("inf")),
            ("temperature", 0, 100),
            ("top_k", 0, float("inf")),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
            ("seed", 0, 2**63 - 1),
            ("n", 1, 1024),
        ]
        for name, low, high in limits:
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            whole = name in ("max_tokens", "top_k", "seed", "n")
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else int | float)
                or not low <= value <= high
            ):
                kind = "a whole number" if whole else "a number"
                raise ConfigError(f"{name} must be {kind} from {low} to {high}, not {value!r}")
        if self.top_p == 0:
            raise ConfigError("top_p must be above 0")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ConfigError(f"stop must be non-empty strings, not {self.stop!r}")

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a client may know about its request; policies may use it, the engine never needs it."""

    output_len: int | None = None
    """Expected output length in tokens (the `oracle` and `pow2` reservations use it)."""
    deadline: float | None = None
    """Seconds on the engine's clock."""
    agent_step: int | None = None
    """Step of an agent graph."""
    next_step: int | None = None
    """Step of the same session at which this agent runs again (eviction `kvflow` uses it)."""
    retention_priority: int | None = None
    """How much the cached blocks are worth, from 0 to 100 (eviction `ttl` uses it)."""
    retention_seconds: float | None = None
    """How long that priority lasts after the last use of a block; None: for ever."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt in, ``sampling.n`` outputs out.

    ``prompt`` is a sequence of token ids (workloads with text are tokenised before they reach the engine).
    ``arrival`` is in seconds on the engine's clock. ``salt`` separates tenants: prefixes are shared only
    between requests of equal salt. Higher ``priority`` runs first where the policies look at it.

    A request that ``follows`` another (by id, of the same workload) is sent ``think_time`` seconds after that one
    has ended, whatever its own ``arrival`` says: the next turn of a conversation, the next call of an agent.
    """

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    arrival: float = 0.0
    priority: int = 0
    salt: Hashable = None
    session: str | None = None
    request_class: str | None = None
    hints: Hints = field(default_factory=Hints)
    text: str | None = None
    follows: str | None = None
    think_time: float = 0.0

    @property
    def origin(self) -> Origin:
        """What the blocks that it stores will say of where they come from."""
        hints = self.hints
        return Origin(
            self.session,
            self.request_class,
            self.salt,
            hints.agent_step,
            hints.next_step,
            hints.retention_priority,
            hints.retention_seconds,
        )
