"""Which of a shape's launches a kernel takes: the rule, or the one that was measured to be the fastest.

A `Case` is all that fixes the work: GPU, kernel, heads, cache, layout, and the batch to the nearest powers of four. A
case is measured on a batch made up for it, which reads the caches that are there: so a choice depends on the case and
the machine alone, no output is at stake, and little memory is needed. Launches take turns, each as a CUDA graph with a
cold L2 cache; one that cannot be compiled, or asks for too much, is left out; and the rule stays unless another is
faster by more than noise.

Two launches differ in the last bits. A kernel settles each case once and then keeps to it, so equal inputs give equal
bits in one kernel, and everywhere with one file of `choices`. A batch-invariant kernel's cases know no batch, and its
pieces of context have one length whatever is chosen: an output is the same bits whoever shares the batch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from pagedlab.kernels.base import AttentionBatch
from pagedlab.kernels.triton.choices import Choice, Choices
from pagedlab.kernels.triton.moves import on
from pagedlab.kernels.triton.shapes import Launch
from pagedlab.policies.layout import Layout

Run = Callable[[Launch], object]
"""Does the work of a case once."""
Measure = Callable[[Launch], float]
"""Returns the seconds of that."""

ROUNDS = 5
"""Turns of each launch; the median counts."""
LEAST_GAIN = 1.03
"""How many times as fast as the rule a launch must be to take its place."""
REPLAYS = 10
COLD = 256 * 2**20
"""Bytes written between replays: more than any L2 cache holds."""
LEAST_CHUNK = 4
LEAST_CONTEXT = 256
"""Shorter contexts are one case."""
ANY = {"decode": (16, 1, 4096), "prefill": (4, 512, 2048)}
"""Sequences, query tokens and context of each that stand for every batch."""

_log = logging.getLogger(__name__)
Event: Any = torch.cuda.Event


class Case(NamedTuple):
    """What a choice is made for; its text is the key in the file."""

    device: str
    kernel: str
    """decode or prefill."""
    layout: str
    dtype: str
    kv_format: str
    group: int
    num_kv_heads: int
    size: int
    value_size: int
    block_size: int
    window: int = 0
    features: str = ""
    """Which of soft cap, ALiBi slopes and sinks there are."""
    split_len: int = 0
    """Keys of a piece where that is fixed; such a case knows no batch."""
    num_seqs: int = 0
    query_len: int = 0
    context_len: int = 0

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in zip(self._fields, self) if value)

    def among(self, num_seqs: int, num_tokens: int, context_len: int) -> Case:
        """Return the case for ``num_tokens`` query tokens of ``num_seqs`` sequences, the longest context as given."""
        query_len = nearest_power(-(-num_tokens // num_seqs))
        if self.kernel == "prefill":
            query_len = max(LEAST_CHUNK, query_len)
        if self.window:
            context_len = min(context_len, self.window + query_len)
        return self._replace(
            num_seqs=nearest_power(num_seqs),
            query_len=query_len,
            context_len=max(LEAST_CONTEXT, nearest_power(context_len)),
        )


def nearest_power(n: int) -> int:
    """Return the power of four to which ``n`` has the smallest ratio: 1 for 1 and 2, 4 for 3 to 8, 16 for 9 to 32."""
    power = 1
    while n > 2 * power:
        power *= 4
    return power


def sample_batch(case: Case, layout: Layout, num_blocks: int) -> AttentionBatch:
    """Return a batch for ``case``: sequences of one length whose blocks lie in random order among ``num_blocks``."""
    num_seqs, query_len, context_len = (
        (case.num_seqs, case.query_len, case.context_len) if case.num_seqs else ANY[case.kernel]
    )
    context_len = max(context_len, query_len)
    per_seq = -(-context_len // case.block_size)
    order = np.random.default_rng(0).permutation(num_blocks)
    layout = layout.clone()
    layout.reset(max_rows=num_seqs, max_blocks=per_seq)
    for row in range(num_seqs):
        layout.open(row, order[np.arange(row * per_seq, (row + 1) * per_seq) % num_blocks].tolist())
    entries, index = layout.arrays()
    return AttentionBatch(
        query_start=np.arange(num_seqs + 1, dtype=np.int32) * np.int32(query_len),
        context_lens=np.full(num_seqs, context_len, np.int32),
        rows=np.arange(num_seqs, dtype=np.int32),
        slots=np.arange(num_seqs * query_len, dtype=np.int64),
        entries=entries,
        index=index,
        block_size=case.block_size,
        max_query_len=query_len,
        max_context_len=context_len,
    )


def choose(launches: Sequence[Launch], measure: Measure) -> Choice | None:
    """Return the fastest of ``launches``, or the first, the rule, unless that is beaten by `LEAST_GAIN`.

    They take turns, in one order and then in the other. A launch that cannot be measured is left out; None if that is
    the rule.
    """
    rule, seconds = launches[0], {launch: list[float]() for launch in launches}
    for turn in range(ROUNDS):
        for launch in list(seconds)[:: -1 if turn % 2 else 1]:
            try:
                seconds[launch].append(measure(launch))
            except Exception as error:  # whatever it is, the others are there
                _log.info("%s cannot run here: %s", launch, error)
                del seconds[launch]
    if rule not in seconds:
        return None
    median = {launch: statistics.median(times) for launch, times in seconds.items()}
    best = min(median, key=median.__getitem__)
    gain = median[rule] / median[best]
    return Choice(best, gain) if gain >= LEAST_GAIN else Choice(rule)


class Tuner:
    """The choices of one kernel, each settled when its case first comes up.

    Without ``choices`` it is always the rule. With them, what they hold is taken; what they do not hold is measured if
    ``autotune``, and is the rule otherwise. Nothing is measured on a CPU, nor while a CUDA graph is captured.
    """

    def __init__(self, choices: Choices | None, *, autotune: bool = False) -> None:
        self._choices, self._autotune = choices, autotune
        self.settled: dict[Case, Choice] = {}
        self.idle = choices is None or not (autotune or len(choices))
        """Whether it is the rule for every case, and will be."""

    def launch(
        self, case: Case, launches: Sequence[Launch], prepare: Callable[[], Run], device: torch.device
    ) -> Launch:
        """Return which of ``launches`` to take; ``prepare()`` is asked for the work if it must be measured."""
        choice = self.settled.get(case)
        if choice is None:
            choice = self.settled[case] = self._settle(case, launches, prepare, device)
        return choice.launch

    def _settle(
        self, case: Case, launches: Sequence[Launch], prepare: Callable[[], Run], device: torch.device
    ) -> Choice:
        if self._choices is None:
            return Choice(launches[0])
        known = self._choices.get(str(case), launches)
        if known is not None or not self._autotune or not can_measure(device):
            return known or Choice(launches[0])
        try:
            choice = choose(launches, stopwatch(prepare(), device))
        except torch.OutOfMemoryError:
            choice = None
        if choice is None:
            warnings.warn(f"nothing could be measured for {case}; the rule is taken", stacklevel=2)
            return Choice(launches[0])
        choice = self._choices.add(str(case), launches, choice)
        _log.info("%s: %s, %.2f times as fast as the rule", case, *choice)
        return choice


def can_measure(device: torch.device) -> bool:
    """Whether launches can be timed there now."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def stopwatch(run: Run, device: torch.device) -> Measure:
    """Return what says the median seconds of ``run`` with a launch on a GPU, without the Python around it."""
    flush = torch.empty(COLD, dtype=torch.int8, device=device)
    pool = torch.cuda.graph_pool_handle()  # of all graphs, which run one at a time
    replays: dict[Launch, Callable[[], object]] = {}

    def measure(launch: Launch) -> float:
        with on(device):
            if launch not in replays:
                replays[launch] = _captured(functools.partial(run, launch), pool)
            events = [(Event(enable_timing=True), Event(enable_timing=True)) for _ in range(REPLAYS)]
            for start, end in events:
                flush.zero_()
                start.record()
                replays[launch]()
                end.record()
            torch.cuda.synchronize()
            return float(statistics.median(start.elapsed_time(end) for start, end in events)) / 1e3

    return measure


def _captured(run: Callable[[], object], pool: Any) -> Callable[[], object]:
    """Return the replay of ``run`` as a CUDA graph, or ``run`` where none can be captured."""
    run()  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the name of a GPU as a `Case` has it; ``interpreter`` for the CPU."""
    return "interpreter" if device.type == "cpu" else torch.cuda.get_device_properties(device).name


@functools.cache
def stamp() -> str:
    """Return what choices hold for: the version of Triton and the source of the kernels."""
    here = Path(__file__).parent
    modules = ("decode", "prefill", "tiles", "tables", "quantised", "shapes")
    source = b"".join((here / f"{name}.py").read_bytes() for name in modules)
    return f"triton {triton.__version__}, kernels {hashlib.sha256(source).hexdigest()[:12]}"
