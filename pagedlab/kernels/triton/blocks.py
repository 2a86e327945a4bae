"""Blocks copied within a cache (copy-on-write), or to and from contiguous staging (swap): all layers in one launch.

Tensors are given by address, so that one launch serves those of every layer. A block is a run of ``WORDS`` words of 1,
2, 4 or 8 bytes, as wide as the block's size and the addresses allow.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
import triton
import triton.language as tl


@triton.jit
def move_words(
    sources, targets, from_blocks, to_blocks, WORDS: tl.constexpr, CHUNK: tl.constexpr, WORD: tl.constexpr
):
    """Copy in program (pair, tensor, chunk) one chunk of block ``from_blocks[pair]`` to ``to_blocks[pair]``.

    ``sources`` and ``targets`` are int64 [num_tensors], addresses of tensors of equal blocks. No pair may read what
    another one writes.
    """
    pair, tensor, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source = tl.load(sources + tensor).to(tl.pointer_type(WORD))
    target = tl.load(targets + tensor).to(tl.pointer_type(WORD))
    word = chunk * CHUNK + tl.arange(0, CHUNK)
    within = word < WORDS
    moved = tl.load(source + tl.load(from_blocks + pair).to(tl.int64) * WORDS + word, mask=within)
    tl.store(target + tl.load(to_blocks + pair).to(tl.int64) * WORDS + word, moved, mask=within)
