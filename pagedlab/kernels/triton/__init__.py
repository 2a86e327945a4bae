"""Triton kernels over blocks, for GPUs of NVIDIA and AMD.

| module | what it holds |
|---|---|
| `paged` | `TritonPagedAttention`, which the executor calls |
| `decode` | one query token a sequence: split-KV, then a reduction |
| `prefill` | any mixture of chunks and decoding sequences in one variable-length launch |
| `tiles` | the online softmax over a range of keys, shared by those two |
| `tables` | `block_of` of each layout; a layout that is new needs one function here |
| `cache_write` | new keys and values to their slots, with or without rotary embedding |
| `quantised`, `formats` | fp8 and int8: numbers to bytes and back, scales that travel with their block |
| `blocks`, `moves` | blocks of many layers copied, gathered or scattered in one launch; swaps through staging |
| `plans` | a batch on the device |
| `shapes` | tiles, warps and stages by the shape of the heads: a rule, and what else may be faster |
| `tuning`, `choices` | which of those is taken: measured once a case, kept in a file |
| `resources` | every kernel compiled ahead of time, without a GPU: registers, stack, spills |

With ``TRITON_INTERPRET=1``, set before triton is first imported, the same functions run on the CPU in Triton's
interpreter: slow, and good for tests. An interpreted function cannot be compiled in the same process.
"""
