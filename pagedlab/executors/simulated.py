"""`SimulatedExecutor`: carries out a step's orders on paper. A cost model says how long they take, a script what is
said.

Outputs come from a run, from token lists, from a function, or, for a trace that knows lengths alone, from nowhere: then
every request makes as many tokens as it may, and nobody can share them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from pagedlab.costs.base import CostModel, StepWork
from pagedlab.costs.shape import ModelShape
from pagedlab.engine.orders import Move, StepOrders, StepResult
from pagedlab.engine.records import Moved
from pagedlab.engine.request import Request
from pagedlab.engine.script import Script
from pagedlab.errors import ConfigError

Outputs = Mapping[tuple[str, int], Script] | Callable[[Request, int], Script | Sequence[int]]
"""Scripts by (request id, sample), or a function of the request and the sample that gives one (or its tokens)."""


class SimulatedExecutor:
    """Takes the place of a model. ``shape`` says what a token weighs on the links between tiers."""

    eos_token_ids: frozenset[int] = frozenset()

    def __init__(
        self,
        cost: CostModel,
        *,
        outputs: Outputs | None = None,
        max_model_len: int = 1 << 40,
        shape: ModelShape | None = None,
        vocab_size: int | None = None,
        tokenize: Callable[[str], list[int]] | None = None,
    ) -> None:
        self.cost = cost
        self.outputs = outputs
        self.max_model_len = max_model_len
        self.shape = shape
        self.vocab_size = vocab_size
        """Token ids there are, for prompts that are to look as they do to a model; None takes any."""
        self.tokenize = tokenize
        self._transfer = 0
        self.kv_bytes_per_block = 0
        """Bytes of one block's keys and values, all layers (0 before `prepare`, or if unknown)."""

    def prepare(
        self,
        *,
        num_blocks: int,
        block_size: int,
        host_blocks: int,
        max_num_seqs: int,
        disk_blocks: int = 0,
        disk_path: str | None = None,
    ) -> None:
        """Forget the last run."""
        self.kv_bytes_per_block = 0 if self.shape is None else block_size * self.shape.kv_bytes_per_token
        self._transfer = 0

    def script(self, request: Request, sample_index: int, unique: int) -> Script:
        """See `pagedlab.engine.orders.Scripted`."""
        if self.outputs is None:
            return Script(request.sampling.max_tokens, unique=unique)
        if callable(self.outputs):
            said = self.outputs(request, sample_index)
        else:
            try:
                said = self.outputs[request.request_id, sample_index]
            except KeyError:
                raise ConfigError(
                    f"the outputs know nothing of sample {sample_index} of request {request.request_id!r}"
                ) from None
        return said if isinstance(said, Script) else Script(len(said), said, "stop", unique)

    def linear(self, work: StepWork) -> tuple[int, int] | None:
        """See `pagedlab.costs.base.CostModel.linear`."""
        return self.cost.linear(work)

    def load_ps(self, num_blocks: int, from_disk: int = 0) -> int:
        """See `pagedlab.engine.orders.Scripted`."""
        size, price = self.kv_bytes_per_block, self.cost.transfer_ps
        host = price(num_blocks * size, "host")
        return max(host, price(from_disk * size, "disk-read")) if from_disk else host

    def move(self, moves: deque[Move]) -> None:
        """Note what goes over the links; copies within a tier cost nothing beside a step."""
        moved = Moved().and_also(moves)
        moves.clear()
        # The link is full-duplex: what comes up and what goes down do not wait for each other. A disk does one after
        # the other, but not in the way of the link: what it has read goes on while it reads the next block.
        size, price, transfer = self.kv_bytes_per_block, self.cost.transfer_ps, 0
        if blocks := max(moved.to_device, moved.to_host):
            transfer = self.load_ps(blocks)
        if moved.from_disk or moved.to_disk:
            disk = price(moved.from_disk * size, "disk-read") + price(moved.to_disk * size, "disk-write")
            transfer = max(transfer, disk)
        self._transfer += transfer

    def execute(self, orders: StepOrders) -> StepResult:
        """Return how long the step takes: transfers run beside the computation, layer by layer, and one that takes
        longer is waited for.
        """
        if orders.moves:
            self.move(orders.moves)
        duration = max(self.cost.step_ps(orders.work), self._transfer, orders.wait_ps)
        self._transfer = 0
        return StepResult([], duration_ps=duration)

    def detokenize(self, tokens: Sequence[int]) -> str | None:
        """No text."""
        return None
