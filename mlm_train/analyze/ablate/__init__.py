"""Ablations: what a model loses when parts of its feed-forward memory are scaled, dropped or compressed."""
