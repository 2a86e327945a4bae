"""New keys and values to their slots: one program a token and KV head.

`store_tokens` fills one cache tensor. `rotate_and_store` fills both and turns the keys by their rotary embedding on
the way, which saves writing them once and reading them again.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
import triton
import triton.language as tl


@triton.jit
def store_tokens(
    cache,
    new,
    slots,
    token_stride,
    head_stride,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Store in program (token, head) ``new`` [num_tokens, heads, SIZE] at ``slots`` of ``cache``."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    channel = tl.arange(0, PADDED)
    real = channel < SIZE
    value = tl.load(new + token * token_stride + head * head_stride + channel, mask=real)
    place = (slot // BLOCK_SIZE * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    tl.store(cache + place * SIZE + channel, value.to(cache.dtype.element_ty), mask=real)


@triton.jit
def rotate_and_store(
    key_cache,
    value_cache,
    key,
    value,
    cos,
    sin,
    slots,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    REAL: tl.constexpr,
):
    """Store in program (token, head) the value, and the key turned by ``cos``, ``sin`` [num_tokens, ROTARY / 2].

    Of each key the first ROTARY channels turn; the partner of channel c is ``c ± ROTARY / 2`` (Su et al. 2021 in the
    halves of GPT-NeoX and Llama) or, INTERLEAVED, its neighbour (GPT-J). Computed in REAL.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    place = (slot // BLOCK_SIZE * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    channel = tl.arange(0, PADDED)
    real, turned = channel < SIZE, channel < ROTARY
    if INTERLEAVED:
        angle, second = channel // 2, channel % 2 == 1
        partner = tl.where(second, channel - 1, channel + 1)
    else:
        angle, second = channel % (ROTARY // 2), channel >= ROTARY // 2
        partner = tl.where(second, channel - ROTARY // 2, channel + ROTARY // 2)
    source = key + token * key_token_stride + head * key_head_stride
    here = tl.load(source + channel, mask=real, other=0.0).to(REAL)
    there = tl.load(source + partner, mask=turned, other=0.0).to(REAL)
    c = tl.load(cos + token * (ROTARY // 2) + angle, mask=turned, other=1.0).to(REAL)
    s = tl.load(sin + token * (ROTARY // 2) + angle, mask=turned, other=0.0).to(REAL)
    rotated = here * c + tl.where(second, there, -there) * s
    tl.store(key_cache + place * SIZE + channel, rotated.to(key_cache.dtype.element_ty), mask=real)

    channel = tl.arange(0, VALUE_PADDED)
    real = channel < VALUE_SIZE
    copied = tl.load(value + token * value_token_stride + head * value_head_stride + channel, mask=real)
    tl.store(value_cache + place * VALUE_SIZE + channel, copied.to(value_cache.dtype.element_ty), mask=real)
