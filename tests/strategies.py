"""What the property tests draw from: configurations, request streams, whole scenarios, and how to run one.

Names of policies come from the registry and values from their declared parameters, so a policy that is added later
is drawn without a change here. A policy that must know the future says so by ``needs_future = True`` and is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from pagedlab import events as ev
from pagedlab import registry
from pagedlab.config import Config
from pagedlab.engine.clock import StepClock
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import Executor
from pagedlab.engine.request import Request
from pagedlab.engine.sequence import Sequence
from pagedlab.executors.stub import StubExecutor
from pagedlab.policies.eviction import Eviction
from pagedlab.policies.kernel import Kernel
from pagedlab.policies.layout import Layout
from pagedlab.registry import SLOTS, policy_names
from pagedlab.testing.strategies import (  # noqa: F401
    VOCAB,
    block_tables,
    configs,
    parameter_values,
    policies,
    request_streams,
    servable,
    token_lists,
)

ENDLESS = 20_000
"""Steps after which a run of these small requests is taken for endless."""


def examples(share: float = 1.0, *, least: int = 10) -> int:
    """Number of examples: ``share`` of what the profile gives."""
    return max(least, round(settings.default.max_examples * share))


def _stand_ins() -> None:
    """Config asks for a name in every slot; without the real layouts and kernels these answer, and do nothing."""
    if not policy_names("layout"):
        registry.register("layout", "padded")(type("StandInLayout", (Layout,), {}))
    if not policy_names("kernel"):
        registry.register("kernel", "auto")(type("StandInKernel", (Kernel,), {}))


_stand_ins()


@contextmanager
def registry_restored() -> Iterator[None]:
    """Forget on leaving what was registered inside."""
    classes = {slot: dict(names) for slot, names in registry._classes.items()}
    points = registry._entry_points
    try:
        yield
    finally:
        for slot, names in classes.items():
            registry._classes[slot].clear()
            registry._classes[slot].update(names)
        registry._entry_points = points


def blocks_for_longest(requests: list[Request], block_size: int) -> int:
    """Blocks of the smallest pool in which every one of the requests can run alone."""
    longest = max(max(len(r.prompt), len(r.prompt) + r.sampling.max_tokens - 1) for r in requests)
    return -(-longest // block_size)


# ---- scenarios ---------------------------------------------------------------------------------------------------

ENGINE_SLOTS = SLOTS[:8]


@dataclass
class Scenario:
    """A configuration, requests, and what people do meanwhile."""

    config: Config
    requests: list[Request]
    cancels: dict[int, str] = field(default_factory=dict)
    """Step → request that is cancelled after it."""
    clears: frozenset[int] = frozenset()
    """Steps after which the cache is cleared."""
    vocab: int = VOCAB
    seed: int = 0
    eos: int | None = None

    def executor(self) -> StubExecutor:
        """A fresh executor for it."""
        return StubExecutor(vocab_size=self.vocab, seed=self.seed, eos_token_id=self.eos)


@st.composite
def scenarios(
    draw: st.DrawFn,
    *,
    disturbed: bool = True,
    choose: dict[str, tuple[str, ...]] | None = None,
    **streams: Any,
) -> Scenario:
    """Any combination of policies in a pool that is often as small as it can be."""
    block_size = draw(st.sampled_from((1, 2, 3, 4, 8)))
    requests = draw(request_streams(block_size=block_size, **streams))
    slots: dict[str, Any] = {slot: draw(policies(slot, (choose or {}).get(slot))) for slot in SLOTS}
    if hasattr(slots["kernel"], "kv_dtype"):  # one byte a channel changes what is said
        slots["kernel"] = slots["kernel"].clone(kv_dtype="model")
    longest = max(len(r.prompt) + r.sampling.max_tokens for r in requests)
    max_model_len = longest + draw(st.sampled_from((0, 0, 1, 7)))
    least = blocks_for_longest(requests, block_size)
    if slots["reservation"].name not in ("on-demand", "oracle"):
        least = max(least, -(-max_model_len // block_size))
    num_blocks = least + draw(st.sampled_from((0, 0, 1, 2, 4, 8, 30)))
    null_block = draw(st.sampled_from((False, False, False, True)))
    config = Config(
        **slots,
        num_blocks=num_blocks + null_block,
        null_block=null_block,
        block_size=block_size,
        host_blocks=draw(st.sampled_from((None, None, max(1, num_blocks // 2), 4 * num_blocks))),
        disk_blocks=draw(st.sampled_from((None, None, 1, max(1, num_blocks // 2)))),
        max_num_seqs=draw(st.sampled_from((3, 4, 8))),
        max_num_batched_tokens=draw(st.sampled_from((1, 3, 7, 64))),
        max_model_len=max_model_len,
        watermark=draw(st.sampled_from((0.0, 0.0, 0.1))),
        prefetch_budget=draw(st.sampled_from((1, 64))),
    )
    cancels: dict[int, str] = {}
    clears: frozenset[int] = frozenset()
    if disturbed and draw(st.booleans()):
        ids = st.integers(0, len(requests) - 1).map(str)
        cancels = draw(st.dictionaries(st.integers(0, 40), ids, max_size=3))
        clears = frozenset(draw(st.sets(st.integers(0, 40), max_size=2)))
    return Scenario(
        config,
        requests,
        cancels,
        clears,
        seed=draw(st.integers(0, 6)),
        eos=draw(st.sampled_from((None, None, VOCAB - 1))),
    )


def serve(
    scenario: Scenario,
    executor: Executor | None = None,
    *,
    check: bool = True,
    after_step: Callable[[Engine], None] = lambda engine: None,
    config: Config | None = None,
) -> Engine:
    """Run a scenario to its end: law 1 at every step, law 7 on the way, and nothing in use at the end."""
    engine = Engine(config or scenario.config, executor or scenario.executor(), clock=StepClock())
    for request in scenario.requests:
        engine.add(request)
    steps = 0
    while engine.step():
        if check:
            engine.check()
        after_step(engine)
        if steps in scenario.cancels:
            engine.cancel(scenario.cancels[steps])
        if steps in scenario.clears:
            engine.clear_cache()
        if check:
            engine.check()
        steps += 1
        assert steps < ENDLESS, "law 7: the work does not end"
    ended(engine)
    return engine


def ended(engine: Engine) -> None:
    """Law 1 and 7 at the end of all work."""
    engine.check()
    assert not engine.has_work
    for pool in engine.cache.pools:
        assert pool.num_in_use == 0, "law 1: blocks are in use after all requests ended"
    assert not engine.cache.moves
    for group in engine.groups.values():
        for seq in group.sequences:
            assert seq.finish_reason in ("stop", "length", "cancelled", "refused", "error")


def too_large(engine: Engine, seq: Sequence) -> bool:
    """Whether the request can really never run: what it must claim does not fit the pool."""
    claim = engine.config.policy("reservation").claim(seq, seq.prompt_len, engine.max_model_len)  # type: ignore[attr-defined]
    tokens = max(claim, seq.table.final_len)
    return (
        -(-tokens // engine.config.block_size) > engine.cache.device.capacity
        or seq.group.request.sampling.n > engine.config.max_num_seqs
        or seq.prompt_len >= engine.max_model_len
    )


def says_the_truth(engine: Engine, scenario: Scenario, *, but: tuple[str, ...] = ()) -> None:
    """Law 5: every request that was not cancelled, refused or failed (``but``) says what the reference says."""
    stub = scenario.executor()
    for request in scenario.requests:
        group = engine.groups[request.request_id]
        reasons = {s.finish_reason for s in group.sequences}
        if "refused" in reasons:
            assert too_large(engine, group.sequences[0]), group.sequences[0].error
            continue
        assert len(group.sequences) == request.sampling.n or reasons & {"cancelled", "error"}
        for seq in group.sequences:
            room = engine.max_model_len - len(request.prompt)
            want = stub.reference(request.prompt, min(request.sampling.max_tokens, room), seq.sample_index)
            if seq.finish_reason in ("cancelled", *but):
                assert seq.output == want[: len(seq.output)], f"law 5: {seq} went astray before it ended"
            else:
                assert seq.output == want, f"law 5: {seq} with {engine.config}"


def mechanisms(engine: Engine) -> Counter[str]:
    """How often each mechanism was really at work in a run."""
    seen: Counter[str] = Counter()
    size = engine.config.block_size
    for event in engine.events:
        if event.kind == ev.BLOCK_REMOVED:
            seen["orphan displaced" if event.detail == "orphan" else f"evicted from {event.medium}"] += 1
        elif event.kind == ev.REQUEST_PREEMPTED:
            seen[f"preempted by {event.detail}"] += 1
        elif event.kind == ev.REQUEST_RESUMED:
            seen[f"resumed by {event.detail}"] += 1
        elif event.kind == ev.BLOCKS_LOADED and event.detail != "resumed":
            seen[f"prefix loaded from {event.medium}"] += 1
        elif event.kind == ev.PREFIX_HIT:
            seen["prefix hit"] += 1
            seen["partial hit"] += int(event.detail.split()[0]) % size != 0
        elif event.kind == ev.BLOCK_STORED and event.medium != "device":
            seen[f"kept on {event.medium}"] += 1
        else:
            seen[event.kind] += 1
    seen["prefetch useful"] = engine.totals.prefetch["useful"]
    seen["prefetch useless"] = engine.totals.prefetch["useless"]
    seen["recomputed"] = engine.totals.recomputed_tokens
    seen["blocks shared"] = sum(r.memory.saved > 0 for r in engine.steps)
    return seen


def event_rows(engine: Engine) -> list[tuple[Any, ...]]:
    """The event log as comparable rows."""
    return [tuple(event) for event in engine.events]


# ---- a spy on the eviction protocol ------------------------------------------------------------------------------


class Spy(Eviction):
    """Wraps an eviction policy and holds both sides to the protocol (law 2).

    Towards the cache: every observation comes in legal order. Towards the policy: victims are resident, released,
    unprotected and distinct, exactly n or none, and asking changes nothing.
    """

    inner: object = None

    def reset(self, *, capacity: int) -> None:
        self.policy: Eviction = self.inner  # type: ignore[assignment]
        self.policy.reset(capacity=capacity)
        self.capacity = capacity
        self.used: set[Any] = set()
        self.released: set[Any] = set()
        self.due: set[Any] = set()
        self.log: list[tuple[str, Any]] = []

    def miss(self, key: Any, readmitted: bool = False) -> None:
        assert isinstance(key, int)
        self.log.append(("miss", key))
        self.policy.miss(key, readmitted)

    def insert(self, block: Any) -> None:
        assert block not in self.used | self.released, f"{block!r} inserted twice"
        assert block.key is not None
        assert block.ref_count >= 1, f"{block!r} inserted while nobody uses it"
        self.used.add(block)
        self.log.append(("insert", block.index))
        self.policy.insert(block)

    def hit(self, block: Any) -> None:
        assert block in self.used | self.released, f"{block!r} hit and not resident"
        self.released.discard(block)
        self.used.add(block)
        self.log.append(("hit", block.index))
        self.policy.hit(block)

    def release(self, block: Any) -> None:
        assert block in self.used, f"{block!r} released and not in use"
        assert block.ref_count == 0, f"{block!r} released while in use"
        self.used.discard(block)
        self.released.add(block)
        self.log.append(("release", block.index))
        self.policy.release(block)

    def remove(self, block: Any) -> None:
        assert block in self.used | self.released, f"{block!r} removed and not resident"
        assert block.key is not None, "a policy must still be able to read the key of what is removed"
        self.used.discard(block)
        self.released.discard(block)
        self.due.discard(block)
        self.log.append(("remove", block.index))
        self.policy.remove(block)

    def victims(self, n: int, protected: Any = ()) -> list[Any]:
        chosen = self.policy.victims(n, protected)
        assert chosen == self.policy.victims(n, protected), "asking for victims changed the answer"
        assert len(chosen) in (0, n), f"{len(chosen)} victims of {n}: neither all nor nothing"
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= self.released, "a victim is in use or not resident"
        assert not set(chosen) & set(protected), "a victim is protected"
        assert all(b.ref_count == 0 and b.key is not None for b in chosen)
        if not chosen:
            assert len(self.released - set(protected)) < n, "there were enough victims"
        self.due |= set(chosen)
        self.log.append(("victims", tuple(b.index for b in chosen)))
        return chosen

    def agrees_with(self, pool: Any) -> None:
        """What the policy was told is what the pool holds."""
        assert not self.due, f"named as victims and still there: {self.due}"
        assert self.used == {b for b in pool.blocks if b.key is not None and b.ref_count > 0}
        assert self.released == {b for b in pool.blocks if b.key is not None and b.ref_count == 0}
        assert len(self.used | self.released) <= self.capacity
