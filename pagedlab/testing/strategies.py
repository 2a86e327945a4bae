"""Strategies for other people's property tests: policies, configurations, requests, access traces, block tables.

>>> from hypothesis import given
>>> from pagedlab.testing import strategies as pst
>>> @given(pst.request_streams(), pst.policies("eviction"))
... def test_mine(requests, eviction): ...

Importing this module also teaches `hypothesis.strategies.from_type` about `Config`, `Request` and the ten contracts.
Names of policies come from the registry and values from their declared parameters, so a policy that is registered later
is drawn too. One that must know the future (``needs_future = True``) is left out.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hypothesis import strategies as st

from pagedlab.config import Config
from pagedlab.engine.request import Hints, Request, SamplingParams
from pagedlab.policies.base import Parameter, Policy
from pagedlab.registry import SLOTS, check_slot, lookup_class, policy_names

VOCAB = 4
"""So few tokens that prefixes are shared by accident too, and that outputs meet prompts."""


def servable(slot: str) -> list[str]:
    """Return the names of a slot that can run without knowing the future."""
    return [n for n in policy_names(slot) if not getattr(lookup_class(slot, n), "needs_future", False)]


def parameter_values(parameter: Parameter) -> st.SearchStrategy[Any]:
    """Values that a declared parameter allows, near the small end of its range."""
    if parameter.choices is not None:
        return st.sampled_from(parameter.choices)
    if parameter.type is bool:
        return st.booleans()
    if parameter.type is int and parameter.low is not None:
        low = int(parameter.low)
        high = low + 8 if parameter.high is None else min(int(parameter.high), low + 8)
        return st.just(parameter.default) | st.integers(low, high)
    if parameter.type is float and parameter.low is not None and parameter.high is not None:
        return st.just(parameter.default) | st.floats(parameter.low, parameter.high, allow_nan=False)
    slot = parameter.name.rpartition("_")[2]  # "disk_eviction" names an eviction policy
    if slot in SLOTS and parameter.type is str:
        return st.sampled_from(servable(slot))
    return st.just(parameter.default)


@st.composite
def _policies(draw: st.DrawFn, slot: str, names: tuple[str, ...] | None) -> Policy:
    cls = lookup_class(slot, draw(st.sampled_from(names or servable(slot))))
    return cls.from_params({p.name: draw(parameter_values(p)) for p in cls.params()})


def policies(slot: str, names: tuple[str, ...] | None = None) -> st.SearchStrategy[Policy]:
    """Any policy of a slot (or one of ``names``), with any parameters."""
    check_slot(slot)
    for name in names or ():
        lookup_class(slot, name)
    return _policies(slot, names)


@st.composite
def configs(draw: st.DrawFn, /, **fixed: Any) -> Config:
    """Any configuration: all ten slots and all sizes, except what is ``fixed``."""
    values: dict[str, Any] = {slot: draw(policies(slot)) for slot in SLOTS if slot not in fixed}
    values.update(
        model=draw(st.sampled_from(("tiny", "some/model", "ordner/mit ü"))),
        dtype=draw(st.sampled_from(("auto", "float32", "bfloat16", "float16", "float64"))),
        num_blocks=draw(st.integers(2, 10_000)),
        block_size=draw(st.integers(1, 256)),
        host_blocks=draw(st.none() | st.integers(1, 10_000)),
        disk_blocks=draw(st.none() | st.integers(1, 10_000)),
        disk_path=draw(st.sampled_from((None, "folder", "ordner/mit ü"))),
        max_num_seqs=draw(st.integers(1, 1024)),
        max_num_batched_tokens=draw(st.integers(1, 100_000)),
        max_model_len=draw(st.none() | st.integers(1, 1_000_000)),
        watermark=draw(st.floats(0, 1, exclude_max=True)),
        null_block=draw(st.booleans()),
        prefetch_budget=draw(st.integers(1, 1000)),
        seed=draw(st.integers(0, 2**63 - 1)),
        num_threads=draw(st.none() | st.integers(1, 64)),
        device=draw(st.sampled_from(("cpu", "cuda", "cuda:1"))),
    )
    return Config(**{**values, **fixed})


def token_lists(low: int = 1, high: int = 28, vocab: int = VOCAB) -> st.SearchStrategy[list[int]]:
    """Prompts of ``low`` to ``high`` tokens."""
    return st.lists(st.integers(0, vocab - 1), min_size=low, max_size=high)


@st.composite
def block_tables(draw: st.DrawFn, max_tables: int = 6, max_blocks: int = 12) -> list[list[int]]:
    """Block tables as lists of physical numbers; tables may share blocks, a table never holds one twice."""
    numbers = st.integers(0, 2 * max_blocks - 1)
    return draw(
        st.lists(st.lists(numbers, unique=True, max_size=max_blocks), min_size=1, max_size=max_tables)
    )


@st.composite
def access_traces(draw: st.DrawFn, max_keys: int = 12, max_accesses: int = 80) -> list[int]:
    """Streams of block keys as caches meet them: scans, loops, and keys that come again and again."""
    trace: list[int] = []
    keys = st.integers(0, max_keys - 1)
    while len(trace) < max_accesses and (kind := draw(st.integers(0, 3))):
        first, length = draw(keys), draw(st.integers(1, max_keys))
        if kind == 1:
            trace += [first] * length
        elif kind == 2:
            trace += [(first + i) % max_keys for i in range(length)]
        else:
            trace += [(first + i) % max_keys for i in range(length)] * draw(st.integers(2, 3))
    return trace[:max_accesses]


@st.composite
def request_streams(
    draw: st.DrawFn,
    *,
    max_requests: int = 8,
    max_prompt: int = 28,
    max_output: int = 18,
    max_samples: int = 3,
    vocab: int = VOCAB,
    block_size: int = 4,
) -> list[Request]:
    """Requests that share prefixes (also ones that end inside a block), with salts, priorities, arrivals, samples."""
    bases = draw(st.lists(token_lists(1, max_prompt, vocab), min_size=1, max_size=3))
    requests = []
    for i in range(draw(st.integers(1, max_requests))):
        base = draw(st.sampled_from(bases))
        keep = draw(st.just(len(base)) | st.integers(1, len(base)))
        prompt = (base[:keep] + draw(token_lists(0, block_size + 2, vocab)))[: max_prompt + 6]
        max_tokens = draw(st.integers(1, max_output))
        requests.append(
            Request(
                request_id=str(i),
                prompt=prompt,
                arrival=float(draw(st.sampled_from((0, 0, 0, 1, 3, 9, 30)))),
                priority=draw(st.integers(0, 2)),
                salt=draw(st.sampled_from((None, None, None, "a", "b"))),
                session=draw(st.sampled_from((None, "s", "t"))),
                sampling=SamplingParams(
                    max_tokens=max_tokens, n=draw(st.sampled_from((1, 1, 1, 1, 2, max_samples)))
                ),
                hints=Hints(output_len=draw(st.sampled_from((None, max_tokens, max(1, max_tokens // 2), 1)))),
            )
        )
    return requests


def _contract(slot: str) -> type[Policy]:
    found = getattr(import_module(f"pagedlab.policies.{slot}"), slot.capitalize())
    assert isinstance(found, type)
    return found


st.register_type_strategy(Config, configs())
st.register_type_strategy(Request, request_streams(max_requests=1).map(lambda requests: requests[0]))
for _slot in SLOTS:
    st.register_type_strategy(_contract(_slot), policies(_slot))
