"""The disk tier: what goes down to it and when; a disk that fails costs a recompute and never a wrong token."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    Scenario,
    ended,
    event_rows,
    examples,
    mechanisms,
    says_the_truth,
    scenarios,
    serve,
)
from test_faults import Fault, persist
from test_law5_stub import conversation
from test_law6 import left_behind, quiet, scripts, simulated

import pagedlab as pl
from pagedlab import events as ev
from pagedlab.config import Config
from pagedlab.costs import Calibrated, Roofline
from pagedlab.engine.clock import StepClock, VirtualClock
from pagedlab.engine.engine import Engine
from pagedlab.engine.orders import DEVICE, DISK, HOST, Damage, Fallible, Move, StepOrders, TierFault
from pagedlab.engine.request import SamplingParams
from pagedlab.errors import ConfigError
from pagedlab.executors.disk import BlockFile, SlotFault, Spoils
from pagedlab.executors.simulated import SimulatedExecutor
from pagedlab.executors.stub import StubExecutor
from pagedlab.lab import measures
from pagedlab.policies.swap import ADMISSIONS
from pagedlab.registry import make

DISKS = {"choose": {"swap": ("disk",), "lookup": ("chained-hash", "radix")}}
SMALL = {"host_blocks": 6, "disk_blocks": 40}


# ---- what goes down, and when ------------------------------------------------------------------------------------


def turns(swap: Any, **sizes: int) -> Scenario:
    """Conversations that push each other out of the device and the host, and come once more."""
    scenario = conversation("chained-hash", **SMALL | sizes)
    scenario.requests = [
        replace(r, request_id=f"{r.request_id}.{again}", arrival=r.arrival + 60 * again)
        for again in range(2)
        for r in scenario.requests
    ]
    scenario.config = scenario.config.replace(swap=swap, preemption="recompute")
    return scenario


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_every_admission_brings_blocks_to_the_disk_and_back(admission: str) -> None:
    scenario = turns(make("swap", "disk", admission=admission))
    engine = serve(scenario)
    says_the_truth(engine, scenario)
    seen = mechanisms(engine)
    for what in ("kept on host", "kept on disk", "prefix loaded from disk"):
        assert seen[what], f"{what} did not happen"
    assert engine.totals.moved.to_disk == seen["kept on disk"]
    assert engine.totals.moved.from_disk > 0
    assert engine.steps[-1].moved == engine.totals.moved


def test_what_is_written_through_lies_below_as_soon_as_it_is_stored() -> None:
    """Nothing is evicted here, so nothing but writing through can bring anything down, the last step's block too."""
    requests = [replace(r, sampling=SamplingParams(max_tokens=5)) for r in conversation().requests[:2]]
    for admission in ADMISSIONS:
        swap = make("swap", "disk", admission=admission)
        config = Config(swap=swap, num_blocks=64, block_size=2, host_blocks=64, disk_blocks=64)
        engine = serve(Scenario(config, requests))
        stored = [sum(b.key is not None for b in pool.blocks) for pool in engine.cache.pools]
        assert stored[DEVICE] > 0
        assert stored == ([stored[DEVICE]] * 3 if admission == "write-through" else [stored[DEVICE], 0, 0])
        assert engine.totals.moved.to_disk == stored[DISK]


def test_writing_through_waits_for_as_many_hits_as_are_asked_for() -> None:
    swap = make("swap", "disk", admission="write-through", min_hits=2)
    one = conversation().requests[0]
    requests = [replace(one, request_id=str(i), arrival=20.0 * i) for i in range(4)]
    config = Config(swap=swap, num_blocks=64, block_size=2, host_blocks=64, disk_blocks=64)
    engine = Engine(config, StubExecutor(), clock=StepClock())
    kept = []
    for request in requests:
        engine.add(request)
        engine.run()
        kept.append(sum(e.kind == ev.BLOCK_STORED and e.medium == "disk" for e in engine.events))
    assert kept[:2] == [0, 0], "stored before it was hit twice"
    assert kept[2] > 0
    assert kept[3] == kept[2], "stored although it is there"


class Chosen:
    """A block that somebody gives up, as a swap policy sees it."""

    def __init__(self, key: int, hits: int) -> None:
        self.key, self.hits = key, hits


def test_on_second_use_takes_what_was_hit_or_comes_again() -> None:
    swap: Any = make("swap", "disk", admission="on-second-use")
    swap.reset(capacities=[4, 2, 8])
    assert not swap.eager
    assert swap.store(Chosen(1, hits=1), HOST)
    assert not swap.store(Chosen(2, hits=0), HOST)
    assert not swap.store(Chosen(2, hits=0), DISK), "the tiers know nothing of each other"
    assert swap.store(Chosen(2, hits=0), HOST)
    assert not swap.store(Chosen(2, hits=0), HOST), "it begins anew"
    for key in (3, 4):
        assert not swap.store(Chosen(key, hits=0), HOST)
    assert not swap.store(Chosen(2, hits=0), HOST), "no more keys are remembered than the tier has blocks"
    swap.reset(capacities=[4, 2, 8])
    assert not swap.store(Chosen(4, hits=0), HOST), "a new run knows nothing"
    strict: Any = make("swap", "disk", admission="on-second-use", min_hits=2)
    strict.reset(capacities=[4, 2, 8])
    assert not strict.store(Chosen(1, hits=1), HOST)
    assert strict.store(Chosen(1, hits=2), HOST)


def test_each_tier_has_its_own_eviction() -> None:
    swap = make("swap", "disk", eviction="fifo", disk_eviction="lfu")
    engine = Engine(Config(swap=swap, eviction="lru"), StubExecutor(), clock=StepClock())
    assert [type(pool.eviction).name for pool in engine.cache.pools] == ["lru", "fifo", "lfu"]
    left = {
        name: event_rows(serve(turns(make("swap", "disk", disk_eviction=name), disk_blocks=8)))
        for name in ("lru", "fifo")
    }
    assert left["lru"] != left["fifo"], "an option that changes nothing"


def test_sizes_of_the_disk_tier() -> None:
    assert Config(swap="disk", num_blocks=10).num_disk_blocks == 40
    assert Config(swap="disk", host_blocks=3).num_disk_blocks == 12
    assert Config(swap="disk", disk_blocks=7).num_disk_blocks == 7
    assert Config(swap="host", disk_blocks=7).num_disk_blocks == 0
    assert Engine(Config(swap="host", disk_blocks=7), StubExecutor()).cache.disk is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"swap": "disk", "disk_blocks": 0}, "disk_blocks must be at least 1"),
        ({"swap": "disk", "host_blocks": 0}, "host_blocks must be at least 1"),
        ({"disk_blocks": -1}, "disk_blocks must be a whole number of at least 0"),
        ({"disk_path": 3}, "disk_path must be a folder"),
        ({"disk_path": ""}, "disk_path must be a folder"),
        ({"swap": make("swap", "disk", disk_eviction="lur")}, "lru"),
        ({"swap": make("swap", "disk", disk_eviction="belady")}, "needs the future"),
    ],
)
def test_a_disk_that_cannot_be_is_refused_by_name(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Config(**wrong)
    assert "\n" not in str(caught.value)


# ---- laws 5 and 6 with a disk --------------------------------------------------------------------------------------


@settings(max_examples=examples(1.0))
@given(scenarios(**DISKS))
def test_a_disk_never_changes_what_is_said(scenario: Scenario) -> None:
    says_the_truth(serve(scenario), scenario)


@settings(max_examples=examples(0.7))
@given(scenarios(**DISKS), st.booleans(), st.booleans())
def test_simulate_and_run_move_the_same(scenario: Scenario, pipelined: bool, skip: bool) -> None:
    scenario = quiet(scenario)
    scenario.config = scenario.config.replace(async_scheduling=pipelined)
    real = serve(scenario, check=False)
    again = simulated(scenario.config, scenario.requests, scripts(real), StepClock(), skip=skip)
    assert event_rows(real) == event_rows(again)
    assert left_behind(real) == left_behind(again)


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_leaping_equals_walking_with_a_disk(admission: str) -> None:
    scenario = turns(make("swap", "disk", admission=admission))
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=17)) for r in scenario.requests]
    config = scenario.config.replace(block_size=8, prefetch="none")
    leapt, walked = (simulated(config, requests, None, VirtualClock(), skip=skip) for skip in (True, False))
    assert len(leapt.steps) < len(walked.steps), "nothing was leapt over"
    assert event_rows(leapt) == event_rows(walked)
    assert left_behind(leapt) == left_behind(walked)


# ---- faults, on the stub -------------------------------------------------------------------------------------------


def failing(rate: float, seed: int, ways: tuple[int, ...] = (DISK, DEVICE)) -> Callable[[Move], str | None]:
    """Moves to these tiers fail at ``rate``, the same ones every time."""
    pick = Random(seed)

    def reason(move: Move) -> str | None:
        return "damaged" if move.dst_tier in ways and pick.random() < rate else None

    return reason


def with_faults(scenario: Scenario, rate: float, seed: int = 0, **ways: Any) -> StubExecutor:
    executor = scenario.executor()
    executor.disk_fault = failing(rate, seed, **ways)
    return executor


def faults_of(engine: Engine) -> list[Any]:
    return [e for e in engine.events if e.kind == ev.TIER_FAULT]


@settings(max_examples=examples(1.5))
@given(
    scenarios(**DISKS),
    st.sampled_from((0.1, 0.5, 1.0)),
    st.integers(0, 5),
    st.sampled_from(((DISK,), (DEVICE,), (DISK, DEVICE))),
    st.booleans(),
)
def test_a_disk_that_fails_never_changes_what_is_said(
    scenario: Scenario, rate: float, seed: int, ways: tuple[int, ...], pipelined: bool
) -> None:
    scenario.config = scenario.config.replace(async_scheduling=pipelined)
    engine = serve(scenario, with_faults(scenario, rate, seed, ways=ways))
    says_the_truth(engine, scenario)
    found = faults_of(engine)
    assert engine.totals.tier_faults == len(found)
    assert {(e.medium, e.detail) for e in found} <= {("disk", "damaged")}


def fixed_faults() -> Iterator[tuple[Scenario, float, int, tuple[int, ...]]]:
    """Runs in which disks fail in every way."""
    for lookup in ("chained-hash", "radix"):
        for admission in ADMISSIONS:
            for preemption in ("recompute", "swap"):
                scenario = conversation(lookup, **SMALL)
                scenario.config = scenario.config.replace(
                    swap=make("swap", "disk", admission=admission), preemption=preemption
                )
                for rate, ways in ((0.3, (DEVICE,)), (1.0, (DEVICE,)), (0.5, (DISK,)), (0.3, (DISK, DEVICE))):
                    yield scenario, rate, len(lookup), ways


def test_the_planted_faults_are_survived() -> None:
    told = put_back = 0
    for scenario, rate, seed, ways in fixed_faults():
        engine = serve(scenario, with_faults(scenario, rate, seed, ways=ways))
        says_the_truth(engine, scenario)
        told += len(faults_of(engine))
        put_back += mechanisms(engine)["preempted by fault"]
    assert told > 100
    assert put_back > 10


class Broken(StubExecutor):
    """Every disk move fails at a rate, and now and then a move or a batch is cut short besides."""

    def __init__(self, cut: float, faults: int, **params: Any) -> None:
        super().__init__(disk_fault=failing(0.4, faults), **params)
        self.cut, self.pick, self.raised = cut, Random(faults), 0

    def _perhaps(self) -> None:
        if self.pick.random() < self.cut:
            self.raised += 1
            raise Fault

    def move(self, moves: Any) -> None:
        while moves:
            self._perhaps()
            first = type(moves)([moves[0]])
            super().move(first)
            moves.popleft()

    def execute(self, orders: Any) -> Any:
        self._perhaps()
        return super().execute(orders)


@settings(max_examples=examples(0.7))
@given(scenarios(**DISKS), st.integers(0, 9))
def test_faults_of_the_disk_and_of_the_executor_together(scenario: Scenario, seed: int) -> None:
    executor = Broken(0.1, seed, vocab_size=scenario.vocab, seed=scenario.seed, eos_token_id=scenario.eos)
    engine = Engine(scenario.config, executor, clock=StepClock())
    for request in scenario.requests:
        engine.add(request)
    assert persist(engine, scenario) == executor.raised
    says_the_truth(engine, scenario)


def test_who_lies_in_a_spoiled_host_block_starts_over() -> None:
    """Swapped out in the very step that had a load of its fail: what was saved is what was not there."""
    scenario = conversation("chained-hash", "disk")
    executor = scenario.executor()
    engine = Engine(scenario.config, executor, clock=StepClock())
    for request in scenario.requests:
        engine.add(request)
    while not (swapped := [s for s in engine.waiting if s.table.swapped]):
        assert engine.step(), "nobody was ever swapped out"
    (seq,) = swapped
    lost = seq.table.host_blocks[0].index
    executor._slots[HOST][lost] = [-7] * engine.config.block_size
    assert engine._suffer(Damage([TierFault(DISK, 0, "damaged")], {(HOST, lost)})) == []
    engine.check()
    assert not seq.table.swapped
    engine.run()
    ended(engine)
    says_the_truth(engine, scenario)
    assert engine.totals.tier_faults == 1


def test_spoils_follow_the_moves() -> None:
    spoils = Spoils()
    assert spoils.take() is None
    load, save, down = Move(DISK, 5, DEVICE, 1), Move(DEVICE, 1, HOST, 2), Move(HOST, 2, DISK, 6)
    spoils.failed(load, "damaged")
    assert spoils.passed_on(save)
    assert spoils.passed_on(down)
    over = Move(DEVICE, 4, HOST, 2)
    assert not spoils.passed_on(over)
    spoils.done(over)
    assert not spoils.passed_on(down)
    spoils.done(down)
    damage = spoils.take()
    assert damage is not None
    assert damage.faults == [TierFault(DISK, 5, "damaged")]
    assert damage.spoiled == {(DISK, 5), (DEVICE, 1)}, "the places that are wrong now, and no others"
    assert spoils.take() is None
    assert not spoils.passed_on(save)
    spoils.failed(down, "no space")
    damage = spoils.take()
    assert damage is not None
    assert damage == ([TierFault(DISK, 6, "no space")], {(DISK, 6)}), (
        "what could not be stored is whole above"
    )


# ---- the file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[BlockFile]:
    made = BlockFile(4, 1000, str(tmp_path))
    yield made
    made.close()


def put(file: BlockFile, slot: int, content: bytes) -> None:
    file.staging[:] = content
    file.store(slot)


def get(file: BlockFile, slot: int) -> bytes:
    file.staging[:] = bytes(file.block_bytes)
    file.load(slot)
    return bytes(file.staging)


CONTENT = bytes(i * 7 % 251 for i in range(1000))
OTHER = bytes(i * 11 % 241 for i in range(1000))


def test_slots_hold_what_was_stored_last(file: BlockFile) -> None:
    with pytest.raises(SlotFault, match="not stored"):
        get(file, 2)
    put(file, 2, CONTENT)
    put(file, 3, OTHER)
    assert get(file, 2) == CONTENT
    assert get(file, 3) == OTHER
    put(file, 2, OTHER)
    assert get(file, 2) == OTHER
    file.forget(2)
    with pytest.raises(SlotFault, match="not stored"):
        get(file, 2)
    assert get(file, 3) == OTHER


def test_the_file_is_private_and_goes(tmp_path: Path) -> None:
    file = BlockFile(4, 1000, str(tmp_path))
    (path,) = tmp_path.iterdir()
    assert path == file.path
    state = path.stat()
    assert stat.S_ISREG(state.st_mode)
    assert stat.S_IMODE(state.st_mode) == 0o600
    assert state.st_size in (0, 4 * file.stride), "reserved as a whole, or not at all"
    assert file.stride % 4096 == 0
    file.close()
    file.close()
    assert not list(tmp_path.iterdir())
    forgotten = BlockFile(4, 1000, str(tmp_path))
    del forgotten
    assert not list(tmp_path.iterdir()), "nobody closed it, and it stays"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"disk_path .*nowhere.*folder") as caught:
        BlockFile(4, 1000, str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_is_noticed(file: BlockFile) -> None:
    put(file, 1, CONTENT)
    length = 24 + len(CONTENT)
    for bit in range(0, 8 * length, 37):
        at, mask = file.stride + bit // 8, 1 << bit % 8
        (byte,) = os.pread(file.fd, 1, at)
        os.pwrite(file.fd, bytes([byte ^ mask]), at)
        with pytest.raises(SlotFault, match="damaged"):
            get(file, 1)
        os.pwrite(file.fd, bytes([byte]), at)
        assert get(file, 1) == CONTENT


def test_a_truncated_file_is_noticed(file: BlockFile) -> None:
    put(file, 0, CONTENT)
    put(file, 3, CONTENT)
    os.ftruncate(file.fd, 3 * file.stride + 500)
    with pytest.raises(SlotFault, match="truncated"):
        get(file, 3)
    assert get(file, 0) == CONTENT
    os.ftruncate(file.fd, 0)
    with pytest.raises(SlotFault, match="truncated"):
        get(file, 0)
    put(file, 0, OTHER)
    assert get(file, 0) == OTHER, "and it can be written to again"


def test_a_write_that_never_arrived_is_noticed(file: BlockFile, monkeypatch: pytest.MonkeyPatch) -> None:
    put(file, 1, CONTENT)
    monkeypatch.setattr(os, "pwrite", lambda fd, content, at: len(content))
    put(file, 1, OTHER)
    with pytest.raises(SlotFault, match="stale"):
        get(file, 1)


def test_a_slot_in_another_ones_place_is_noticed(file: BlockFile) -> None:
    put(file, 1, CONTENT)
    put(file, 2, OTHER)
    os.pwrite(file.fd, os.pread(file.fd, file.stride, file.stride), 2 * file.stride)
    with pytest.raises(SlotFault, match="stale"):
        get(file, 2)


def raising(number: int) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("call", "behaviour", "words"),
    [
        ("pwrite", raising(errno.ENOSPC), "no space"),
        ("pwrite", raising(errno.EIO), "write failed"),
        ("pwrite", lambda fd, content, at: len(content) // 2, "short write"),
        ("preadv", raising(errno.EIO), "read failed"),
        ("preadv", lambda fd, buffers, at: len(buffers[0]) // 2, "truncated"),
    ],
)
def test_what_the_system_refuses_is_a_fault_of_the_slot(
    file: BlockFile, call: str, behaviour: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(file, 0, CONTENT)
    put(file, 1, CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, behaviour)
        with pytest.raises(SlotFault, match=words):
            put(file, 1, OTHER) if call == "pwrite" else get(file, 1)
    if call == "pwrite":
        with pytest.raises(SlotFault, match="not stored"):
            get(file, 1)
    assert get(file, 0) == CONTENT


@pytest.mark.parametrize(
    ("number", "stores"),
    [(errno.ENOSPC, False), (errno.EOPNOTSUPP, True), (errno.EINVAL, True), (errno.EIO, None)],
)
def test_room_that_cannot_be_reserved(
    number: int, stores: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is not enough room, nothing is stored, rather than filling the disk to its last byte; a file system
    that cannot reserve any is used as it is."""
    monkeypatch.setattr(os, "posix_fallocate", raising(number))
    if stores is None:
        with pytest.raises(ConfigError, match="no room could be reserved"):
            BlockFile(4, 1000, str(tmp_path))
        assert not list(tmp_path.iterdir())
        return
    file = BlockFile(4, 1000, str(tmp_path))
    if stores:
        put(file, 3, CONTENT)
        assert get(file, 3) == CONTENT
    else:
        with pytest.raises(SlotFault, match="no space"):
            put(file, 3, CONTENT)
        assert file.path.stat().st_size == 0
    file.close()


# ---- faults, on a model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tiny: Path, torch_threads: int) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        tiny, dtype=torch.float64, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def reference(tiny_model: Any) -> Any:
    from test_law5_model import Reference

    return Reference(tiny_model)


def model_scenario(folder: Path, admission: str = "write-back") -> Scenario:
    scenario = turns(make("swap", "disk", admission=admission))
    scenario.config = scenario.config.replace(disk_path=str(folder), kernel="gather-sdpa")
    return scenario


def serve_model(
    model: Any, scenario: Scenario, meddle: Callable[[Any], None] = lambda executor: None
) -> Engine:
    """Serve with the model, on a cache full of NaN; ``meddle`` is called after every step."""
    from pagedlab.executors.model import ModelExecutor

    executor = ModelExecutor(
        model,
        layout=make("layout", "padded"),  # type: ignore[arg-type]
        kernel=make("kernel", "gather-sdpa"),  # type: ignore[arg-type]
        poison=True,
    )
    assert isinstance(executor, Fallible)
    try:
        return serve(scenario, executor, after_step=lambda engine: meddle(executor))
    finally:
        executor.release()
        assert executor.disk is None


def flip(executor: Any) -> None:
    """One bit in every slot."""
    for slot in range(executor.disk.num_blocks):
        at = slot * executor.disk.stride + 24 + slot
        found = os.pread(executor.disk.fd, 1, at)
        if found:
            os.pwrite(executor.disk.fd, bytes([found[0] ^ 4]), at)


def cut(executor: Any) -> None:
    os.ftruncate(executor.disk.fd, 0)


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_a_model_says_the_same_with_a_disk(
    tiny_model: Any, reference: Any, tmp_path: Path, admission: str
) -> None:
    from test_law5_model import says_what_generate_says

    scenario = model_scenario(tmp_path, admission)
    engine = serve_model(tiny_model, scenario)
    says_what_generate_says(engine, scenario, reference)
    assert engine.totals.moved.to_disk > 0
    assert engine.totals.moved.from_disk > 0
    assert engine.totals.tier_faults == 0
    assert not list(tmp_path.iterdir()), "the file is still there"


@pytest.mark.parametrize(("meddle", "reason"), [(flip, "damaged"), (cut, "truncated")])
def test_a_damaged_file_costs_a_recompute_and_no_wrong_token(
    tiny_model: Any, reference: Any, tmp_path: Path, meddle: Callable[[Any], None], reason: str
) -> None:
    from test_law5_model import says_what_generate_says

    scenario = model_scenario(tmp_path)
    engine = serve_model(tiny_model, scenario, meddle)
    says_what_generate_says(engine, scenario, reference)
    found = faults_of(engine)
    assert {e.medium for e in found} == {"disk"}
    # What is written beyond the end makes the file long again, and a slot before it reads as zeros.
    assert reason in {e.detail for e in found} <= {reason, "damaged"}
    assert engine.totals.tier_faults == len(found) > 0
    assert mechanisms(engine)["preempted by fault"] > 0
    assert engine.totals.recomputed_tokens > 0


@pytest.mark.parametrize(
    ("call", "behaviour", "reason"),
    [
        ("pwrite", raising(errno.ENOSPC), "no space"),
        ("pwrite", lambda fd, content, at: len(content) // 2, "short write"),
        ("posix_fallocate", raising(errno.ENOSPC), "no space"),
        ("preadv", raising(errno.EIO), "read failed"),
    ],
)
def test_a_full_or_broken_disk_costs_a_recompute_and_no_wrong_token(
    tiny_model: Any,
    reference: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    behaviour: Any,
    reason: str,
) -> None:
    from test_law5_model import says_what_generate_says

    scenario = model_scenario(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, behaviour)
        engine = serve_model(tiny_model, scenario)
    says_what_generate_says(engine, scenario, reference)
    found = faults_of(engine)
    assert {(e.medium, e.detail) for e in found} == {("disk", reason)}
    assert engine.totals.tier_faults == len(found) > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB, mounted where nobody else sees it and gone with the process that holds it."""
    script = 'mount -t tmpfs -o size=128k tmpfs "$0" && echo ready && read -r line'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path)]
    try:
        holder = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)
    except OSError:
        pytest.skip("no unshare here")
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != "ready\n":
                pytest.skip("no file system may be mounted here")
            place = Path(f"/proc/{holder.pid}/root{tmp_path}")
            if not os.access(place, os.W_OK):
                pytest.skip("what is mounted cannot be reached")
            yield place
        finally:
            holder.stdin.close()


@pytest.mark.parametrize("reserving", [True, False])
def test_a_file_system_that_is_full(
    tiny_model: Any, reference: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, reserving: bool
) -> None:
    """A real one. If its room can be reserved it is too small from the start, else it fills up on the way."""
    from test_law5_model import says_what_generate_says

    scenario = model_scenario(small_disk)
    if not reserving:
        monkeypatch.setattr(os, "posix_fallocate", raising(errno.EOPNOTSUPP))
    engine = serve_model(tiny_model, scenario)
    says_what_generate_says(engine, scenario, reference)
    found = faults_of(engine)
    assert found
    assert {e.detail for e in found} <= {"no space", "short write"}
    assert (engine.totals.moved.to_disk > len(found)) == (not reserving), "some fit, or none"
    assert not list(small_disk.iterdir())


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself cuts a write short, and refuses the next."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(os, "posix_fallocate", raising(errno.EOPNOTSUPP))
    file = BlockFile(4, 1000, str(tmp_path))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stride + 100, before[1]))
        put(file, 0, CONTENT)
        with pytest.raises(SlotFault, match="short write"):
            put(file, 1, CONTENT)
        with pytest.raises(SlotFault, match="no space"):
            put(file, 2, CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert get(file, 0) == CONTENT
    file.close()


@pytest.mark.parametrize(("call", "error"), [("pwrite", MemoryError), ("preadv", KeyboardInterrupt)])
def test_a_transfer_that_is_killed_is_done_again(
    tiny_model: Any,
    reference: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: type[BaseException],
) -> None:
    """Half of the block has moved when it happens; the next step finds the move still to be done."""
    from test_law5_model import says_what_generate_says

    from pagedlab.executors.model import ModelExecutor

    scenario = model_scenario(tmp_path)
    executor = ModelExecutor(
        tiny_model,
        layout=make("layout", "padded"),  # type: ignore[arg-type]
        kernel=make("kernel", "gather-sdpa"),  # type: ignore[arg-type]
        poison=True,
    )
    own, calls = getattr(os, call), iter(range(10**6))

    def killed(fd: int, content: Any, at: int) -> int:
        if next(calls) % 3 == 1:
            half = content[: len(content) // 2] if call == "pwrite" else [content[0][: len(content[0]) // 2]]
            own(fd, half, at)
            raise error
        done: int = own(fd, content, at)
        return done

    engine = Engine(scenario.config, executor, clock=StepClock())
    for request in scenario.requests:
        engine.add(request)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, killed)
            assert persist(engine, scenario, error) > 2
    finally:
        executor.release()
    says_what_generate_says(engine, scenario, reference)
    assert engine.totals.tier_faults == 0


# ---- what is told of it, and what it costs ---------------------------------------------------------------------------


class Noting(StubExecutor):
    """Counts what it moves by the tiers between which it goes."""

    def prepare(self, **sizes: Any) -> None:
        self.ways: Counter[tuple[int, int]] = Counter()
        super().prepare(**sizes)

    def move(self, moves: Any) -> None:
        self.ways.update((m.src_tier, m.dst_tier) for m in moves)
        super().move(moves)


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_a_run_tells_what_went_over_the_disk(admission: str) -> None:
    scenario = turns(make("swap", "disk", admission=admission))
    executor = Noting()
    run = pl.run(scenario.config, scenario.requests, executor=executor, clock="step", progress=False)
    said, ways = run.summary(), executor.ways
    assert said["blocks_to_disk"] == ways[HOST, DISK] > 0
    assert said["blocks_from_disk"] == ways[DISK, DEVICE] > 0
    assert said["blocks_to_device"] == ways[DISK, DEVICE] + ways[HOST, DEVICE]
    assert said["tier_faults"] == 0
    for link in measures.LINKS:
        assert run.steps[f"blocks_{link}"].sum() == said[f"blocks_{link}"]
    assert run.steps.moves.sum() == sum(ways.values())
    assert "disk tier" in run._repr_html_()
    assert "disk faults" not in run._repr_html_()
    labels = [line.get_label() for line in run.plot("moved").axes[0].lines]
    assert {"host to disk", "disk to host"} <= set(labels)
    executor.disk_fault = failing(0.5, 0)
    broken = pl.run(scenario.config, scenario.requests, executor=executor, clock="step", progress=False)
    assert broken.summary()["tier_faults"] == (broken.events.kind == ev.TIER_FAULT).sum() > 0
    assert broken.tokens == run.tokens
    assert "disk faults" in broken._repr_html_()


def test_reading_and_writing_take_their_time_beside_the_step() -> None:
    """What goes over the host link meanwhile is not added, for it waits for nothing else."""
    roofline = Roofline(model="llama-3.1-8b", hardware="h100-sxm")
    executor = SimulatedExecutor(roofline, shape=roofline.shape)
    executor.prepare(num_blocks=9, block_size=16, host_blocks=9, max_num_seqs=1, disk_blocks=9)
    card, size = roofline.accelerator, executor.kv_bytes_per_block
    latency = round(1e12 * card.disk_latency_s)

    def takes(*moves: Move) -> int:
        return executor.execute(StepOrders(0, deque(moves), [])).duration_ps

    up = [Move(DISK, i % 9, DEVICE, i % 9) for i in range(900)]
    down = [Move(HOST, i % 9, DISK, i % 9) for i in range(900)]
    over = [Move(DEVICE, i % 9, HOST, i % 9) for i in range(900)]
    read, write = (latency + 900 * size * 1e12 / (0.8 * rate) for rate in (card.disk_read, card.disk_write))
    assert takes(*up) == pytest.approx(read, rel=1e-6)
    assert takes(*down) == pytest.approx(write, rel=1e-6)
    assert takes(*up, *down) == pytest.approx(read + write, rel=1e-6)
    assert takes(*up, *over) == takes(*up)
    assert takes(*over) < takes(*up) / 5, "the host's link is faster than a disk"
    calibrated = Calibrated.from_roofline(roofline)
    for link in ("host", "disk-read", "disk-write"):
        assert calibrated.transfer_ps(10**9, link) == pytest.approx(
            roofline.transfer_ps(10**9, link), rel=1e-6
        )


def test_a_slower_disk_makes_a_simulation_slower() -> None:
    scenario = turns("disk")
    took = {}
    for share in (1.0, 0.001):
        cost = Roofline(model="llama-3.1-8b", block_size=2, disk_efficiency=share, step_overhead_us=0)
        run = pl.simulate(scenario.config, scenario.requests, cost=cost, progress=False)
        assert run.summary()["bytes_from_disk"] > 0
        took[share] = run.summary()["duration"]
    assert took[0.001] > took[1.0]


def test_the_model_and_its_simulation_move_the_same(tiny: Path, tmp_path: Path) -> None:
    config = pl.Config(
        num_blocks=24,
        swap=make("swap", "disk", admission="write-through"),
        host_blocks=12,
        disk_blocks=80,
        disk_path=str(tmp_path),
        max_model_len=320,
    )
    workload = pl.workloads.chat(conversations=4, turns=3, max_tokens=12)
    real = pl.run(config, workload, clock="step", progress=False)
    again = pl.simulate(config, workload, clock="step", outputs=real, progress=False)
    assert real.summary()["blocks_from_disk"] > 0
    for table in ("events", "requests", "memory", "steps"):
        assert real.columns(table) == again.columns(table)
    assert not list(tmp_path.iterdir()), "the model went back to the shelf and its file stayed"
