"""How good a model is: perplexity, logits, count-based baselines."""
