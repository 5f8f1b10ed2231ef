"""Pruning of base models, to compare with memory and flex at equal active parameters."""
