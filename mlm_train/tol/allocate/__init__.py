"""Which layer is stored how, by what it costs in perplexity."""
