"""The layout of ranks, and their process groups."""
