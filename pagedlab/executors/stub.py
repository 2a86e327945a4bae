"""An executor without a model: seeded tokens at no cost, and a memory that notices when a block holds the
wrong content.

It carries out orders on a shadow of the cache, in which each slot stores ``(position, hash of all tokens up
to it)``. The next token is a function of that hash alone, so any mistake of cache or engine (a wrong slot, a
stale block, a lost copy) changes what is said, as it would with a real model, and a thousand times faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from pagedlab.engine.orders import DEVICE, DISK, HOST, Damage, Move, SequenceStep, StepOrders, StepResult
from pagedlab.executors.disk import Spoils

EMPTY = -1
"""What a slot holds before anything is written to it."""
SPOILED = -2
"""What it holds where a move to it failed."""


class StubExecutor:
    """Draws tokens from ``0 .. vocab_size - 1`` by a hash of the context that it reads through the block
    table.

    ``disk_fault`` is asked about every move to and from the disk: why it fails, or None.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 64,
        seed: int = 0,
        max_model_len: int = 4096,
        eos_token_id: int | None = None,
        disk_fault: Callable[[Move], str | None] = lambda move: None,
    ) -> None:
        self.vocab_size = vocab_size
        self.seed = seed
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset() if eos_token_id is None else frozenset({eos_token_id})
        self.disk_fault = disk_fault

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
        """Start with empty slots in every tier."""
        self._block_size = block_size
        self._slots = {
            tier: [[EMPTY] * block_size for _ in range(n)]
            for tier, n in ((DEVICE, num_blocks), (HOST, host_blocks), (DISK, disk_blocks))
        }
        self._spoils = Spoils()

    def move(self, moves: deque[Move]) -> None:
        """Copy whole blocks, in order."""
        while moves:
            src_tier, src, dst_tier, dst = move = moves[0]
            self._slots[dst_tier][dst] = list(self._slots[src_tier][src])
            if not self._spoils.passed_on(move):
                reason = self.disk_fault(move) if DISK in (src_tier, dst_tier) else None
                if reason is None:
                    self._spoils.done(move)
                else:
                    self._slots[dst_tier][dst] = [SPOILED] * self._block_size
                    self._spoils.failed(move, reason)
            moves.popleft()

    def take_damage(self) -> Damage | None:
        """See `pagedlab.engine.orders.Fallible`."""
        return self._spoils.take()

    def execute(self, orders: StepOrders) -> StepResult:
        """Write the batch's tokens, then read each context back and draw."""
        for entry in orders.batch:
            for i, token in enumerate(entry.tokens):
                self._write(entry, entry.start + i, token)
        return StepResult([self._sample(entry) for entry in orders.batch])

    def _write(self, entry: SequenceStep, position: int, token: int) -> None:
        block, offset = divmod(position, self._block_size)
        before = self._read(entry, position - 1) if position else self.seed
        self._slots[DEVICE][entry.table[block]][offset] = hash((before, token))

    def _read(self, entry: SequenceStep, position: int) -> int:
        block, offset = divmod(position, self._block_size)
        return self._slots[DEVICE][entry.table[block]][offset]

    def _sample(self, entry: SequenceStep) -> list[int]:
        state = self.seed
        for position in range(entry.context_len):
            # Attention reads every slot, so every slot must matter.
            state = hash((state, self._read(entry, position)))
        return [hash((state, entry.sample_index + j, 17)) % self.vocab_size for j in range(entry.num_samples)]

    def reference(self, prompt: Sequence[int], num_tokens: int, sample_index: int = 0) -> list[int]:
        """Return what it says to ``prompt`` without any cache: the truth that every policy must reproduce."""
        chain, state, before = [], self.seed, self.seed
        out: list[int] = []
        for token in prompt:
            before = hash((before, token))
            chain.append(before)
        for value in chain:
            state = hash((state, value))
        while len(out) < num_tokens:
            token = hash((state, sample_index, 17)) % self.vocab_size
            out.append(token)
            if token in self.eos_token_ids:
                break
            before = hash((before, token))
            state = hash((state, before))
        return out

    def detokenize(self, tokens: Sequence[int]) -> str | None:
        """No text."""
        return None
