"""Evaluation of a model: perplexity, logits, count-based baselines."""
