"""Tenants: what one sends must not decide what another one gets.

From the strictest configuration to the most useful one. Without a prefix cache (``lookup="none"``), or for requests
with a salt each, contents change nothing at all, lengths and arrivals being the same. With a salt for every tenant,
what another one sends counts only by what it repeats of its own: renaming its tokens changes nothing. With reserved
shares (eviction ``quota``) how much it sends never changes what a tenant finds in a cache of given requests (`replay`).
What the last two leave open is time: tenants run in the same steps, so a prefix that one finds again makes everybody's
step shorter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Scenario, examples, says_the_truth, scenarios, servable, serve
from test_law6 import Linear, quiet

import pagedlab as pl
from pagedlab.config import Config
from pagedlab.engine.clock import VirtualClock
from pagedlab.engine.engine import Engine
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.errors import ConfigError
from pagedlab.executors.simulated import SimulatedExecutor
from pagedlab.policies.block import Block, Origin
from pagedlab.policies.quota import Quota

INNER = [name for name in servable("eviction") if name != "quota"]


# ---- replay: a share is a tier of one's own --------------------------------------------------------------------------


@st.composite
def streams(draw: st.DrawFn, tenant: str | None, high: int = 40) -> list[Request]:
    """Requests of one tenant over few stems, so that there is something to hit."""
    requests = []
    for i in range(draw(st.integers(1, high))):
        stem, length = draw(st.integers(0, 4)), draw(st.integers(1, 6))
        requests.append(
            Request(
                request_id=f"{tenant}{i}",
                prompt=[stem] * length + [stem + 1] * draw(st.integers(0, 2)),
                arrival=float(i),
                salt=tenant,
                session=str(stem % 2),
            )
        )
    return requests


def merged(data: st.DataObject, *streams: list[Request]) -> list[Request]:
    """The streams in one, each in its own order; arrivals as in the stream."""
    whose = data.draw(st.permutations([i for i, stream in enumerate(streams) for _ in stream]))
    left = [iter(stream) for stream in streams]
    return [next(left[i]) for i in whose]


def hits(requests: list[Request], policy: Any, num_blocks: int, semantics: str) -> dict[str, int]:
    """Blocks found, by request."""
    done = pl.replay(requests, policy, num_blocks, semantics=semantics, block_size=1, progress=False)  # type: ignore[call-overload]
    return dict(zip(done.trace.request_ids, done.request_hits))


@pytest.mark.parametrize("inner", INNER)
@settings(max_examples=examples(0.2))
@given(data=st.data(), semantics=st.sampled_from(["plain", "prefix"]), share=st.integers(1, 9))
def test_a_reserved_share_is_a_tier_of_its_own(
    inner: str, data: st.DataObject, semantics: str, share: int
) -> None:
    """Whatever the others send, tenant a hits what it would hit alone in a tier of the size of its share."""
    mine, num_blocks = data.draw(streams("a")), data.draw(st.sampled_from((10, 20)))
    other = data.draw(streams("b"))
    nobody = data.draw(streams(None, 10))
    policy = Quota(inner=inner, shares=f"a={share / 10}", reserved=True)
    together = hits(merged(data, mine, other, nobody), policy, num_blocks, semantics)
    alone = hits(mine, inner, num_blocks * share // 10, semantics)
    assert {name: together[name] for name in alone} == alone


@pytest.mark.parametrize("semantics", ["plain", "prefix"])
def test_a_reserved_share_of_no_block_keeps_nothing(semantics: str) -> None:
    """A tenth of nine blocks is none; the other tenants' blocks are theirs, also while they are free."""
    requests = [Request(request_id=f"{salt}{i}", prompt=[7], salt=salt) for i in range(3) for salt in "ab"]
    found = hits(requests, Quota(shares="a=0.1", reserved=True), 9, semantics)
    assert found == {"a0": 0, "b0": 0, "a1": 0, "b1": 1, "a2": 0, "b2": 1}


def test_shares_that_are_not_reserved_lend_what_is_unused() -> None:
    """Alone, a tenant has the whole tier; next to one that is over its share, it keeps its own."""
    mine = [Request(request_id=f"a{i}", prompt=[i % 8], salt="a") for i in range(40)]
    flood = [Request(request_id=f"b{i}", prompt=[i], salt="b") for i in range(60)]
    soft = Quota(shares="a=0.3,b=0.7")
    assert sum(hits(mine, soft, 10, "plain").values()) == 32
    assert sum(hits(mine, replace(soft, reserved=True), 10, "plain").values()) == 0, "8 do not fit into 3"
    cycle = [r for pair in zip(mine[:3] * 20, flood) for r in pair]
    cycle = [replace(r, request_id=str(i)) for i, r in enumerate(cycle)]

    def found(policy: Any) -> int:
        done = pl.replay(cycle, policy, 5, semantics="plain", block_size=1, progress=False)
        return sum(done.request_hits[::2])

    assert found("lru") == 0, "three blocks of its own and three of the flood are more than five"
    assert found(Quota(shares="a=0.6,b=0.4")) == 57


def test_whoever_is_furthest_over_its_share_gives_first() -> None:
    policy = Quota(shares="a=0.5,b=0.25")
    policy.reset(capacity=8)
    blocks = []
    for i, tenant in enumerate("aaabbbc"):
        block = Block(i)
        block.key, block.origin = i, Origin(salt=tenant)
        policy.insert(block)
        policy.release(block)
        blocks.append(block)
    assert [b.salt for b in policy.victims(1)] == ["b"]
    assert sorted(b.salt for b in policy.victims(3)) == ["a", "b", "b"] or sorted(
        b.salt for b in policy.victims(3)
    ) == ["b", "b", "c"]
    assert {b.index for b in policy.victims(2)} <= {3, 4, 5, 6}
    assert policy.victims(8) == []
    assert len(policy.victims(7)) == 7
    assert blocks[3] not in policy.victims(1, {blocks[3]})
    assert policy.stats()["a"]["blocks"] == 3
    assert policy.stats()["others"]["share"] == 2


# ---- shares are text, and checked ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ("a", "is not a tenant and its share"),
        ("a=", "is not a tenant and its share"),
        ("=0.3", "is not a tenant and its share"),
        ("a=x", "is not a tenant and its share"),
        ("a=0", "above 0"),
        ("a=-0.1", "above 0"),
        ("a=1.5", "at most 1"),
        ("a=nan", "above 0"),
        ("a=0.6,b=0.5", "more than 1"),
        ("a=0.1,a=0.2", "twice"),
    ],
)
def test_bad_shares_are_named(shares: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Quota(shares=shares)
    assert "\n" not in str(caught.value)


def test_inner_policies_that_cannot_be_are_named() -> None:
    for inner, says in (("quota", "itself"), ("belady", "future"), ("lruu", "did you mean")):
        with pytest.raises(ConfigError, match=says):
            Quota(inner=inner)


def test_shares_survive_a_file() -> None:
    config = Config(eviction=Quota(shares="a=0.3, b=0.7", inner="lfu", reserved=True))
    assert Config.from_json(config.to_json()) == config


# ---- the engine ------------------------------------------------------------------------------------------------------


class Guarded(Quota):
    """Checks every decision: what a tenant keeps within its share is not given up for another."""

    def victims_for(self, origin: Origin, n: int, free: int, protected: Any = ()) -> list[Block] | None:
        victims = super().victims_for(origin, n, free, protected)
        own = self._part(origin)
        before = {part: part.resident for part in self._parts}
        for block in victims or ():
            part = self._home[block]
            assert block not in protected
            assert part is own or before[part] > part.quota, "taken from what another tenant had reserved"
            before[part] -= 1
        assert victims is None or len(set(victims)) == len(victims)
        assert victims is None or free + len(victims) >= n
        assert (victims is not None) == (n <= free + self.obtainable(origin, protected))
        return victims

    def victims(self, n: int, protected: Any = ()) -> list[Block]:
        raise AssertionError("asked without saying for whom")


def reserving(config: Config, policy: Quota) -> Config:
    """The configuration with shares, twice the pool, and an allocator of single blocks."""
    allocator = "fifo" if config.policy("allocator").contiguous else config.allocator  # type: ignore[attr-defined]
    return config.replace(eviction=policy, allocator=allocator, num_blocks=2 * config.num_blocks)


def test_runs_of_blocks_and_reserved_shares_do_not_go_together() -> None:
    shares = Quota(shares="a=0.5", reserved=True)
    for name in ("first-fit", "best-fit", "buddy"):
        with pytest.raises(ConfigError, match=f"allocator='{name}' could wait") as caught:
            Config(allocator=name, eviction=shares)
        assert "\n" not in str(caught.value)
        assert Config(allocator=name, eviction=Quota(shares="a=0.5"))
    assert Config(allocator="fifo", eviction=shares)


@settings(max_examples=examples(2))
@given(scenarios(), st.data())
def test_reserved_shares_hold_in_every_run(scenario: Scenario, data: st.DataObject) -> None:
    """Laws 1, 5 and 7 under division, and no block of a reserved share is ever taken by another tenant."""
    shares = data.draw(st.sampled_from(("a=0.4,b=0.4", "a=0.5", "b=0.2,a=0.6", "")))
    policy = Guarded(shares=shares, inner=data.draw(st.sampled_from(INNER)), reserved=True)
    config = reserving(scenario.config, policy)
    engine = serve(scenario, config=config)
    stub = scenario.executor()
    for request in scenario.requests:
        for seq in engine.groups[request.request_id].sequences:
            if seq.finish_reason == "refused":
                most = engine.cache.device.limit(request.origin)
                assert most < engine.cache.device.capacity or request.sampling.n > config.max_num_seqs
                assert str(most) in (seq.error or "") or "sequences" in (seq.error or "")
            else:
                room = engine.max_model_len - len(request.prompt)
                want = stub.reference(
                    request.prompt, min(request.sampling.max_tokens, room), seq.sample_index
                )
                assert seq.output == want[: len(seq.output)]


def test_a_request_beyond_its_tenants_share_is_refused_by_name() -> None:
    config = Config(
        eviction=Quota(shares="a=0.25", reserved=True), num_blocks=16, block_size=4, max_model_len=100
    )
    requests = [
        Request(request_id=f"{salt}", prompt=[1] * 30, salt=salt, sampling=SamplingParams(max_tokens=4))
        for salt in ("a", "b")
    ]
    scenario = Scenario(config, requests)
    engine = serve(scenario)
    refused, served = engine.groups["a"].sequences[0], engine.groups["b"].sequences[0]
    assert refused.finish_reason == "refused"
    assert "at most 4 are available" in (refused.error or "")
    assert "tenant's share" in (refused.error or "")
    assert served.finish_reason == "length"


def test_quotas_keep_a_tenants_prefix_through_a_flood() -> None:
    """The same requests with and without: the prefix of tenant a is there when it comes again."""
    stem = [1, 2, 3, 4] * 6
    ask = [
        Request(
            request_id=f"a{i}",
            prompt=[*stem, i],
            salt="a",
            arrival=40.0 * i,
            sampling=SamplingParams(max_tokens=2),
        )
        for i in range(4)
    ]
    flood = [
        Request(
            request_id=f"b{i}",
            prompt=[i] * 24,
            salt="b",
            arrival=float(i),
            sampling=SamplingParams(max_tokens=2),
        )
        for i in range(120)
    ]
    found = {}
    for policy in ("lru", Quota(shares="a=0.5,b=0.5"), Quota(shares="a=0.5,b=0.5", reserved=True)):
        config = Config(eviction=policy, num_blocks=24, block_size=4, max_num_seqs=2, max_model_len=60)
        scenario = Scenario(config, [*ask, *flood], vocab=200)
        engine = serve(scenario)
        says_the_truth(engine, scenario)
        found[str(policy)] = [engine.groups[f"a{i}"].sequences[0].hit_tokens for i in range(4)]
    plain, soft, hard = found.values()
    assert plain == [0, 0, 0, 0]
    assert soft == hard == [0, 24, 24, 24]


# ---- noninterference -------------------------------------------------------------------------------------------------


def seen_by(tenant: str, config: Config, requests: list[Request]) -> list[Any]:
    """All that a tenant can see of a run in virtual time: its events, and when its tokens came."""
    engine = Engine(config, SimulatedExecutor(Linear(), max_model_len=4096), clock=VirtualClock())
    for request in requests:
        engine.add(request)
    engine.run(max_steps=20_000)
    groups = [g for g in engine.groups.values() if g.request.salt == tenant]
    ids = {s.seq_id for g in groups for s in g.sequences}
    sequences = [
        (
            s.seq_id,
            s.finish_reason,
            s.admitted_at,
            s.finished_at,
            s.token_times,
            s.hit_tokens,
            s.num_preemptions,
        )
        for g in groups
        for s in g.sequences
    ]
    return [*sequences, *(tuple(e) for e in engine.events if e.seq_id in ids)]


def of_two_tenants(scenario: Scenario) -> list[Request]:
    """The scenario's requests, half of them tenant a's, close enough together to meet."""
    return [
        replace(
            r, salt="ab"[i % 2], arrival=r.arrival * 2e-8, sampling=replace(r.sampling, max_tokens=12 + i)
        )
        for i, r in enumerate(scenario.requests)
    ]


def roomy(scenario: Scenario) -> Config:
    """The scenario's configuration, with room for the longer outputs."""
    size = scenario.config.block_size
    longest = max(len(r.prompt) for r in scenario.requests) + 40
    return scenario.config.replace(
        num_blocks=-(-longest // size) + 2 + scenario.config.num_blocks, max_model_len=longest
    )


def other_words(data: st.DataObject, request: Request) -> list[int]:
    """Any prompt of the same length."""
    length = len(request.prompt)
    return data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))


@settings(max_examples=examples(1.5))
@given(scenarios(max_samples=1), st.data())
def test_without_a_prefix_cache_contents_change_nothing(scenario: Scenario, data: st.DataObject) -> None:
    """Same lengths, same arrivals, any other contents of tenant b: tenant a sees the same run to the picosecond."""
    requests, config = of_two_tenants(quiet(scenario)), roomy(scenario).replace(lookup="none")
    others = [replace(r, prompt=other_words(data, r)) if r.salt == "b" else r for r in requests]
    assert seen_by("a", config, requests) == seen_by("a", config, others)


@settings(max_examples=examples(3))
@given(scenarios(max_samples=1), st.permutations(range(4)), st.booleans())
def test_with_salts_another_tenants_words_change_nothing(
    scenario: Scenario, words: list[int], reserved: bool
) -> None:
    """Tenant b says the same in other words: its own repetitions are the same, and tenant a cannot tell."""
    requests, config = of_two_tenants(quiet(scenario)), roomy(scenario)
    if reserved:
        config = reserving(config, Quota(shares="a=0.5,b=0.5", reserved=True))
    renamed = [
        replace(r, prompt=[words[token] for token in r.prompt]) if r.salt == "b" else r for r in requests
    ]
    assume(renamed != requests)
    assert seen_by("a", config, requests) == seen_by("a", config, renamed)


@settings(max_examples=examples(1.5))
@given(scenarios(max_samples=1), st.data())
def test_with_a_salt_for_every_request_contents_change_nothing(
    scenario: Scenario, data: st.DataObject
) -> None:
    """Who reuses nothing has nothing to tell: tenant a keeps its cache, and b's requests have a salt each."""
    requests, config = of_two_tenants(quiet(scenario)), roomy(scenario)
    requests = [replace(r, salt=("b", i)) if r.salt == "b" else r for i, r in enumerate(requests)]
    others = [replace(r, prompt=other_words(data, r)) if r.salt != "a" else r for r in requests]
    assert seen_by("a", config, requests) == seen_by("a", config, others)


SECRET, OTHER = [7, 3] * 40, [8, 3] * 40


def first_token(before: list[int], beside: list[int], salts: tuple[str | None, str | None]) -> int:
    """When tenant a, who says the secret, gets its first token, by what b says before it and beside it."""
    requests = [
        Request(request_id="before", prompt=before, salt=salts[1]),
        Request(request_id="beside", prompt=[*beside, 2], salt=salts[1], arrival=1.0),
        Request(request_id="a", prompt=[*SECRET, 1], salt=salts[0], arrival=1.0),
    ]
    engine = Engine(
        Config(block_size=4), SimulatedExecutor(Linear(), max_model_len=4096), clock=VirtualClock()
    )
    for request in requests:
        engine.add(request)
    engine.run()
    return engine.groups["a"].sequences[0].first_token_at or 0


def test_without_salts_another_tenants_words_can_be_heard() -> None:
    """What the salts are for: b has said what a says, and a's first token comes sooner."""
    for salts in ((None, None), ("a", "b")):
        guessed, missed = (first_token(words, [9] * 80, salts) for words in (SECRET, OTHER))
        assert (guessed < missed) == (salts[0] is None)
        assert guessed <= missed


def test_what_a_tenant_finds_again_of_its_own_is_felt_by_all() -> None:
    """What salts do not hide: the step that both share is shorter when b says something for the second time."""
    again, new = (first_token(OTHER, words, ("a", "b")) for words in (OTHER, SECRET))
    assert again < new
