"""The training run: checks, setup, step and loop."""
