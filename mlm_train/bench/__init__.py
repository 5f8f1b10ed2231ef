"""Benchmarks: alternating runs, medians, and a description of the machine with every figure."""
