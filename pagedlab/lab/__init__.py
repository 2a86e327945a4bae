"""Experiments: run a configuration on a workload, watch it live, compare several, keep and plot what came out."""
