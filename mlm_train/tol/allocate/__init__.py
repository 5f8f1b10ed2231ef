"""Choosing how each layer is stored, by its measured cost in perplexity."""
