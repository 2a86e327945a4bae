"""Where the memory is: the kinds add up, and each is what a count over the tables says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from strategies import Scenario, examples, scenarios, serve
from test_law5_stub import conversation

from pagedlab.cache.accounting import Memory
from pagedlab.config import Config
from pagedlab.engine.engine import Engine
from pagedlab.engine.request import Request, SamplingParams


def recount(engine: Engine) -> dict[str, Any]:
    """Look at every slot of every table."""
    size, pool = engine.config.block_size, engine.cache.device
    stored: set[tuple[int, int]] = set()
    wanted: set[tuple[int, int]] = set()
    held: set[int] = set()
    tokens = 0
    ambiguous = False
    for table in engine.tables():
        tokens += table.num_tokens if table.blocks else 0
        for i, block in enumerate(table.blocks):
            held.add(block.index)
            for offset in range(size):
                position = i * size + offset
                if position < table.num_tokens:
                    stored.add((block.index, offset))
                elif position < table.final_len:
                    wanted.add((block.index, offset))
                    ambiguous |= block.ref_count > 1
    return {
        "stored": len(stored),
        "reserved": len(wanted - stored),
        "held": len(held) * size,
        "saved": tokens - len(stored),
        "cached": sum(b.key is not None and b.index not in held for b in pool.blocks) * size,
        "free": (pool.capacity - len(held)) * size
        - sum(b.key is not None and b.index not in held for b in pool.blocks) * size,
        "ambiguous": ambiguous,
    }


def agrees(engine: Engine) -> None:
    memory, truth = engine.memory(), recount(engine)
    assert sum(memory[:6]) == engine.cache.device.capacity * engine.config.block_size
    assert memory.stored == truth["stored"]
    assert memory.saved == truth["saved"]
    assert memory.cached == truth["cached"]
    assert memory.external + memory.free == truth["free"]
    assert memory.external in (0, truth["free"])
    assert memory.reserved + memory.internal == truth["held"] - truth["stored"]
    # The empty end of a shared block is promised to each of its holders; it is counted within what is held.
    if not truth["ambiguous"]:
        assert memory.reserved == truth["reserved"]
    else:
        assert memory.reserved >= truth["reserved"]


@settings(max_examples=examples(2))
@given(scenarios())
def test_the_kinds_of_memory_are_what_a_count_says(scenario: Scenario) -> None:
    engine = serve(scenario, check=False, after_step=agrees)
    for record in engine.steps:
        assert sum(record.memory[:6]) == engine.cache.device.capacity * engine.config.block_size
        assert min(record.memory) >= 0
    assert engine.memory()[:3] == (0, 0, 0)
    assert engine.memory().saved == 0


@settings(max_examples=examples(1.5))
@given(scenarios(choose={"reservation": ("on-demand",)}))
def test_paging_wastes_less_than_a_block_a_sequence(scenario: Scenario) -> None:
    """PagedAttention's bound: only the last block of a sequence is not full."""
    engine = serve(scenario, check=False)
    for record in engine.steps:
        waste = (
            record.memory.reserved
            + record.memory.internal
            + record.memory.external
            * (
                not scenario.config.policy("allocator").contiguous  # type: ignore[attr-defined]
            )
        )
        assert waste <= record.num_running * (scenario.config.block_size - 1)


def wave(**config: Any) -> tuple[Engine, list[Memory]]:
    """Six requests at once, of short outputs in a model of long contexts."""
    requests = [
        Request(
            request_id=str(i),
            prompt=[i + 1] * (5 + i % 3),
            sampling=SamplingParams(max_tokens=4 + 3 * (i % 2)),
        )
        for i in range(8)
    ]
    sizes = {
        "num_blocks": 32,
        "block_size": 4,
        "max_model_len": 32,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
    }
    scenario = Scenario(Config.preset(config.pop("preset"), **sizes, **config), requests, vocab=50)
    engine = serve(scenario)
    return engine, [r.memory for r in engine.steps]


def utilisation(memories: list[Memory]) -> float:
    """Share of the memory held that stores tokens (figure 2 of the PagedAttention paper)."""
    held = sum(m.stored + m.reserved + m.internal + m.external for m in memories)
    return sum(m.stored for m in memories) / held


def test_paging_uses_memory_best_and_reserving_the_maximum_worst() -> None:
    used = {
        name: utilisation(wave(preset=name)[1]) for name in ("vllm", "orca-oracle", "orca-pow2", "orca-max")
    }
    assert used["orca-max"] < used["orca-pow2"] <= used["orca-oracle"] < used["vllm"]


@pytest.mark.parametrize("preset", ["orca-max", "orca-pow2", "orca-oracle", "fastertransformer"])
def test_contiguous_systems_never_share_and_keep_nothing(preset: str) -> None:
    engine, memories = wave(preset=preset)
    assert all(m.saved == 0 and m.cached == 0 for m in memories)
    for event in engine.events:
        if event.kind == "BlocksAllocated" and preset != "orca-oracle":
            assert list(event.blocks) == list(range(event.blocks[0], event.blocks[0] + len(event.blocks)))


def test_reserving_the_maximum_is_seen_as_internal_fragmentation() -> None:
    _, memories = wave(preset="orca-max")
    assert max(m.internal for m in memories) > max(m.stored for m in memories)
    _, paged = wave(preset="vllm")
    assert max(m.internal for m in paged) < 6 * 4


def test_external_fragmentation_is_seen_while_it_keeps_somebody_out() -> None:
    """Room enough in pieces, none of them long enough: only a contiguous allocator knows that."""
    requests = [
        Request(request_id="a", prompt=[1] * 7, sampling=SamplingParams(max_tokens=2)),
        Request(request_id="b", prompt=[2] * 7, sampling=SamplingParams(max_tokens=30)),
        Request(request_id="c", prompt=[3] * 7, sampling=SamplingParams(max_tokens=2)),
        Request(request_id="d", prompt=[4] * 15, arrival=3.0, sampling=SamplingParams(max_tokens=2)),
    ]
    seen = {}
    for allocator in ("first-fit", "free-list"):
        config = Config(
            num_blocks=14,
            block_size=4,
            allocator=allocator,
            lookup="none",
            reservation="oracle",
            scheduler="iteration-level",
            max_model_len=40,
            max_num_batched_tokens=64,
        )
        engine = serve(Scenario(config, requests, vocab=50))
        seen[allocator] = max(r.memory.external for r in engine.steps)
    assert seen["free-list"] == 0
    assert seen["first-fit"] > 0


def test_sharing_saves_what_would_be_stored_besides() -> None:
    """Four samples of one prompt of three full blocks: three copies of it are saved."""
    request = Request(request_id="a", prompt=list(range(12)), sampling=SamplingParams(max_tokens=6, n=4))
    config = Config(num_blocks=40, block_size=4, lookup="none", max_model_len=40)
    engine = serve(Scenario(config, [request], vocab=50), after_step=agrees)
    assert max(r.memory.saved for r in engine.steps) == 3 * 12
    alone = [
        Request(request_id=str(i), prompt=list(range(12)), sampling=SamplingParams(max_tokens=6))
        for i in range(4)
    ]
    apart = serve(Scenario(config, alone, vocab=50))
    assert max(r.memory.saved for r in apart.steps) == 0
    shared = serve(Scenario(config.replace(lookup="radix"), [*alone[:1], *alone[1:]], vocab=50))
    assert shared.totals.hit_tokens == 0, (
        "those that come in the same step cannot share what is not computed yet"
    )


def test_what_is_recomputed_and_hit_is_counted() -> None:
    engine = serve(conversation())
    assert engine.totals.prompt_tokens == sum(
        s.prompt_len for s in engine.finished if s.sample_index == 0 and s.finish_reason != "refused"
    )
    assert engine.totals.hit_tokens == sum(s.hit_tokens for s in engine.finished if s.sample_index == 0)
    assert engine.totals.preemptions == sum(s.num_preemptions for s in engine.finished)
    assert 0 < engine.totals.hit_tokens < engine.totals.prompt_tokens
