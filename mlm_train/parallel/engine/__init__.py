"""Data parallelism and the optimizer."""
