"""Benchmarks: workloads, providers, one runner, one report made from the stored rows alone."""
