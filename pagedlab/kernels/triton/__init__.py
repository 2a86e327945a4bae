"""Triton kernels over blocks, for GPUs of NVIDIA and AMD.

| module | kernels |
|---|---|
| `tiles` | the online softmax over a range of keys, shared by the two attention kernels |
| `decode` | one query token a sequence: split-KV, then a reduction |
| `prefill` | any mixture of chunks and decoding sequences in one variable-length launch |
| `cache_write` | new keys and values to their slots, with or without rotary embedding |
| `blocks` | blocks of many layers copied, gathered or scattered in one launch |
| `tables` | `block_of` of each layout |
| `paged` | `TritonPagedAttention`, which the executor calls |
| `resources` | every kernel compiled ahead of time, without a GPU: registers, stack, spills |

With ``TRITON_INTERPRET=1``, set before triton is first imported, the same functions run on the CPU in Triton's
interpreter: slow, and good for tests. An interpreted function cannot be compiled in the same process.
"""
