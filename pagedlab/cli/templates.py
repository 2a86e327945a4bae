"""What ``pagedlab new-policy`` writes: for each slot a small policy that works, and a test of what it does.

``@NAME@`` stands for the policy's name, ``@CLASS@`` for its class, ``@MODULE@`` for the module and ``@SLOT@`` for the
slot.
"""

from __future__ import annotations

from typing import NamedTuple

FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=70.1"]
build-backend = "setuptools.build_meta"

[project]
name = "pagedlab-@NAME@"
version = "0.1.0"
description = "The @SLOT@ policy @NAME@ for pagedlab"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["pagedlab"]

[project.optional-dependencies]
dev = ["pytest>=8"]

[project.entry-points."pagedlab.policies"]
"@SLOT@.@NAME@" = "@MODULE@:@CLASS@"

[tool.setuptools.packages.find]
where = ["src"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["src"]
""",
    "README.md": """\
# pagedlab-@NAME@

The @SLOT@ policy `@NAME@` for pagedlab. Installed beside it, this package makes the policy selectable by name:

    pip install -e .
    pagedlab list @SLOT@

    import pagedlab as pl
    pl.Config(@SLOT@="@NAME@")

The policy is in `src/@MODULE@/__init__.py`; what it must keep to is on top of pagedlab's module
`pagedlab.policies.@SLOT@`. Its tests run before it is installed, too:

    pytest
""",
    "src/@MODULE@/__init__.py": """\
\"""The @SLOT@ policy `@NAME@`.\"""

from __future__ import annotations

@IMPORTS@


@BODY@
""",
    "tests/test_@MODULE@.py": """\
from __future__ import annotations

@TEST_IMPORTS@


@TEST@


def test_it_never_changes_what_is_said() -> None:
    prompts = ["def add(a, b):", "def add(a, b): return", "class Cache:"]
    sizes = {"num_blocks": 24, "block_size": 4, "max_num_seqs": 2}
    mine = pl.run(pl.Config(@SLOT@=@CLASS@(), **sizes), prompts, max_tokens=8, progress=False)
    plain = pl.run(pl.Config(**sizes), prompts, max_tokens=8, progress=False)
    assert mine.outputs == plain.outputs


def test_a_clone_has_its_parameters() -> None:
    policy = @CLASS@()
    assert policy.clone() == policy
    assert policy.clone().get_params() == policy.get_params()
""",
}


class Template(NamedTuple):
    """The part of the package that depends on the slot."""

    imports: str
    body: str
    test_imports: str
    test: str


def _template(imports: str, body: str, test: str, test_imports: str = "") -> Template:
    lines = ["import pagedlab as pl", "from @MODULE@ import @CLASS@", *test_imports.splitlines()]
    return Template(imports.strip(), body.strip(), "\n".join(filter(None, lines)), test.strip())


TEMPLATES: dict[str, Template] = {
    "allocator": _template(
        """
from collections.abc import Sequence

from pagedlab.policies import Allocator
""",
        """
class @CLASS@(Allocator):
    \"""Hand out the lowest free blocks. O(free) a call.\"""

    def reset(self, blocks: Sequence[int]) -> None:
        self._free = sorted(blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        if n > len(self._free):
            return None
        taken, self._free = self._free[:n], self._free[n:]
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        self._free = sorted([*self._free, *blocks])
""",
        """
def test_the_lowest_blocks_are_handed_out() -> None:
    policy = @CLASS@()
    policy.reset(range(6))
    assert policy.allocate(3) == [0, 1, 2]
    policy.free([1])
    assert policy.allocate(2) == [1, 3]
    assert policy.allocate(3) is None
    assert policy.num_free == 2
""",
    ),
    "reservation": _template(
        """
from pagedlab.policies import Reservation, param
from pagedlab.policies.reservation import Claimant
""",
        """
class @CLASS@(Reservation):
    \"""Claim what is known and a margin for the output. O(1).\"""

    margin: int = param(16, low=0, unit="tokens", help="room for this many tokens of output")

    def claim(self, sequence: Claimant, step_end: int, max_model_len: int) -> int:
        return min(sequence.num_tokens + self.margin, max_model_len)
""",
        """
@dataclass
class Request:
    prompt_len: int = 10
    num_tokens: int = 12
    max_len: int = 40
    expected_len: int = 40


def test_the_margin_is_claimed_within_what_the_model_allows() -> None:
    assert @CLASS@(margin=8).claim(Request(), 12, 100) == 20
    assert @CLASS@(margin=8).claim(Request(), 12, 15) == 15
""",
        "from dataclasses import dataclass",
    ),
    "lookup": _template(
        """
from pagedlab.policies import ChainedHash, param
from pagedlab.policies.lookup import NO_MATCH, Match, Prefix
""",
        """
class @CLASS@(ChainedHash):
    \"""A chained hash that makes nothing of short prefixes. O(1) a block.\"""

    least: int = param(2, low=1, unit="blocks", help="shortest prefix that is used")

    def match(self, prefix: Prefix, max_tokens: int) -> Match:
        found = super().match(prefix, max_tokens)
        return found if len(found.blocks) >= self.least else NO_MATCH
""",
        """
def found(least: int) -> int:
    config = pl.Config(lookup=@CLASS@(least=least), block_size=2, max_num_seqs=1)
    run = pl.run(config, ["def one(): pass"] * 2, max_tokens=2, progress=False)
    return int(run.requests["hit_tokens"].sum())


def test_short_prefixes_are_not_used() -> None:
    assert found(1) > 0
    assert found(50) == 0
""",
    ),
    "eviction": _template(
        """
from pagedlab.policies import Block, Eviction, param
""",
        """
class @CLASS@(Eviction):
    \"""Give up the block with the fewest hits, of which no more than `most` count. O(log cached).

    The lowest `priority` goes first; among equals the block that was released longest ago.
    \"""

    most: int = param(4, low=1, unit="hits", help="hits beyond this number do not count")

    def priority(self, block: Block) -> float:
        return min(block.hits, self.most)
""",
        """
def hits(keys: list[int], **params: int) -> int:
    return pl.replay(keys, @CLASS@(**params), 3, semantics="plain", progress=False).hits


def test_what_was_hit_stays() -> None:
    assert hits([1, 1, 1, 2, 3, 4, 5, 1]) == 3
    assert hits([1, 2, 3, 4, 5, 1]) == 0


def test_only_so_many_hits_count() -> None:
    assert hits([1, 1, 1, 2, 2, 3, 3, 4, 1], most=1) == 4
    assert hits([1, 1, 1, 2, 2, 3, 3, 4, 1], most=2) == 5
""",
    ),
    "swap": _template(
        """
from pagedlab.policies import Block, Swap, param
""",
        """
class @CLASS@(Swap):
    \"""Keep the beginnings of prompts in host memory, and forget the rest.\"""

    uses_host = True
    within: int = param(1024, low=0, unit="tokens", help="blocks that begin before this position are kept")

    def store(self, block: Block, tier: int) -> bool:
        return block.depth < self.within
""",
        """
def test_beginnings_are_kept() -> None:
    block = Block(0)
    assert @CLASS@().store(block, HOST)
    block.depth = 2048
    assert not @CLASS@().store(block, HOST)
    assert @CLASS@(within=4096).store(block, HOST)
""",
        "from pagedlab.policies.block import HOST, Block",
    ),
    "preemption": _template(
        """
from collections.abc import Sequence
from typing import Literal

from pagedlab.policies import Preemption
from pagedlab.policies.preemption import C, Candidate
""",
        """
class @CLASS@(Preemption):
    \"""Stop the sequence that has computed most, and compute it again later. O(running).\"""

    def choose(self, candidates: Sequence[C]) -> C:
        return max(candidates, key=lambda sequence: sequence.num_computed)

    def mode(self, victim: Candidate) -> Literal["recompute", "swap"]:
        return "recompute"
""",
        """
@dataclass
class Running:
    num_computed: int
    priority: int = 0
    num_shared: int = 0
    request_id: str = ""


def test_the_longest_is_stopped() -> None:
    candidates = [Running(3), Running(9), Running(5)]
    assert @CLASS@().choose(candidates) is candidates[1]
    assert @CLASS@().mode(candidates[1]) == "recompute"
""",
        "from dataclasses import dataclass",
    ),
    "prefetch": _template(
        """
from collections.abc import Sequence

from pagedlab.policies import Prefetch
from pagedlab.policies.prefetch import Load, Residency, Waiting
""",
        """
class @CLASS@(Prefetch):
    \"""Load what the first waiting request will need, and nothing for the others.\"""

    def plan(self, waiting: Sequence[Waiting], residency: Residency, link_budget: int) -> list[Load]:
        return [Load(block) for sequence in waiting[:1] for block in residency.below(sequence)]
""",
        """
class Cached:
    def below(self, sequence: str) -> list[Block]:
        return [Block(1, tier=HOST)] if sequence == "first" else [Block(2, tier=HOST)]


def test_only_the_first_request_is_served() -> None:
    loads = @CLASS@().plan(["first", "second"], Cached(), 8)
    assert [load.block.index for load in loads] == [1]
""",
        "from pagedlab.policies.block import HOST, Block",
    ),
    "scheduler": _template(
        """
from pagedlab.policies import Scheduler
from pagedlab.policies.scheduler import Decision, Step
""",
        """
class @CLASS@(Scheduler):
    \"""Whoever runs goes on; of those who wait, the last to come is the first to be served. O(waiting).

    None as an answer means: ask again at the next step.
    \"""

    def plan(self, step: Step) -> Decision:
        for sequence in step.running:
            step.grant(sequence, sequence.remaining)
        for sequence in list(step.waiting)[::-1]:
            if not step.grant(sequence, sequence.remaining):
                break
        return None
""",
        """
def test_the_last_to_come_is_served_first() -> None:
    config = pl.Config(scheduler=@CLASS@(), max_num_seqs=1)
    run = pl.run(config, ["one", "two", "three"], max_tokens=2, clock="step", progress=False)
    order = run.requests.sort_values("queue_time")["request_id"].tolist()
    assert order == ["prompt-2", "prompt-1", "prompt-0"]
""",
    ),
    "layout": _template(
        """
from pagedlab.policies.layout import Padded
""",
        """
class @CLASS@(Padded):
    \"""A padded matrix that has its full width from the beginning: no growth, and nothing to copy.

    `block_of` is that of the padded matrix; a layout with an encoding of its own names functions of its own.
    \"""

    device_functions = "pagedlab.kernels.layouts:padded"

    def reset(self, *, max_rows: int, max_blocks: int) -> None:
        super().reset(max_rows=max_rows, max_blocks=max_blocks)
        self.open(0, range(max_blocks))
        self.close(0)
""",
        """
def test_the_width_never_changes() -> None:
    layout = @CLASS@()
    layout.reset(max_rows=3, max_blocks=50)
    before = layout.nbytes
    layout.open(2, [7, 3])
    layout.append(2, range(40))
    assert layout.nbytes == before
    assert layout.decode(2) == [7, 3, *range(40)]
    assert layout.decode(0) == []
""",
    ),
    "kernel": _template(
        """
from pagedlab.policies import Kernel
""",
        """
class @CLASS@(Kernel):
    \"""Attention by the book, for caches of full precision.

    `implementation` names a class with the methods of `pagedlab.kernels.base.PagedAttention`. One that
    lacks an option (sinks, a soft cap, ...) leaves it out of the arguments of `attend`; models that need
    it are then refused.
    \"""

    implementation = "pagedlab.kernels.dense:DenseReference"
    dtypes = ("float32", "float64")
""",
        """
def test_it_says_what_it_serves() -> None:
    policy = @CLASS@()
    assert policy.resolve("cpu", "float32") is policy
    with pytest.raises(pl.ConfigError, match="float32, float64"):
        policy.resolve("cpu", "float16")
""",
        "import pytest",
    ),
}
"""By slot."""
