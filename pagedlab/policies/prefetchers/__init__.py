"""Prefetchers: what will be asked for next, by what the blocks, the sessions, the agents or the past say of it."""
