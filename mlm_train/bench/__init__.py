"""Benchmarks: alternated runs, medians, and the machine beside every figure."""
