"""Attention over a paged KV cache: one contract (`base`), several implementations. Used only by executors."""
