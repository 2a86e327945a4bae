"""Blocks, tables, prefix reuse and tiers: decides and counts, holds no tensors."""
