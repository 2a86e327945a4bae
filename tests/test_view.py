"""What policies are shown of the world: the time, the queue, and what recomputing costs."""

from __future__ import annotations

from typing import Any

import pytest
from strategies import registry_restored

import pagedlab as pl
from pagedlab.costs import find_model
from pagedlab.engine.clock import PS_PER_SECOND, StepClock
from pagedlab.engine.engine import Engine
from pagedlab.engine.request import Request, SamplingParams
from pagedlab.executors.stub import StubExecutor
from pagedlab.policies import Block, Eviction
from pagedlab.policies.lookup import Prefix

SEEN: list[Any] = []


class Curious(Eviction):
    """Notes what it sees whenever a block is stored."""

    def priority(self, block: Block) -> float:
        SEEN.append((self.view.now, self.view.queue_state, [list(keys) for keys in self.view.coming(2)]))
        return self.view.recompute_flops(block)


@pytest.fixture(autouse=True)
def _nothing_seen() -> Any:
    SEEN.clear()
    with registry_restored():
        yield


def test_an_engine_shows_its_clock_and_its_queue() -> None:
    prompts = [list(range(i, i + 9)) for i in (0, 100, 200, 300)]
    config = pl.Config(num_blocks=64, block_size=4, max_num_seqs=1, eviction=Curious())
    engine = Engine(config, StubExecutor(), clock=StepClock())
    for i, prompt in enumerate(prompts):
        engine.add(
            Request(request_id=str(i), prompt=prompt, sampling=SamplingParams(max_tokens=2, ignore_eos=True))
        )
    engine.run()
    keys = [Prefix(prompt, 4).keys(2) for prompt in prompts]
    # One at a time, two steps each; what a request leaves is scored when it ends.
    expected = [
        (2 * PS_PER_SECOND, (3, 1, 3), [keys[1], keys[2]]),
        (4 * PS_PER_SECOND, (2, 2, 3), [keys[2], keys[3]]),
        (6 * PS_PER_SECOND, (1, 3, 3), [keys[3]]),
        (8 * PS_PER_SECOND, None, []),
    ]
    assert list(dict.fromkeys(map(repr, SEEN))) == list(map(repr, expected))


def test_a_replay_shows_the_traces_time_and_what_a_model_costs() -> None:
    shape = find_model("qwen3-8b")
    shown = []

    class Costly(Eviction):
        def priority(self, block: Block) -> float:
            shown.append((self.view.now, block.depth, self.view.recompute_flops(block)))
            return 0.0

    requests = [
        Request(request_id=str(i), prompt=list(range(i, i + 8)), arrival=float(i * 3)) for i in range(3)
    ]
    pl.replay(requests, Costly(), 8, block_size=4, model="qwen3-8b")
    assert [now for now, *_ in shown] == [i * 3 * PS_PER_SECOND for i in (0, 0, 1, 1, 2, 2)]
    for _, depth, flops in shown:
        pairs = sum(depth + i + 1 for i in range(4))
        assert flops == pytest.approx(4 * shape.flops_per_token + pairs * shape.pair_flops)


def test_a_block_further_back_costs_more() -> None:
    view = Eviction().view
    near, far = Block(0, size=16), Block(1, size=16)
    far.depth = 1000
    assert view.recompute_flops(near) == view.recompute_flops(far) == 16.0
    assert view.now == 0
    assert not list(view.coming(5))
