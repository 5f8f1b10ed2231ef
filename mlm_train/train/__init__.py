"""The training run: setup, step, loop, state."""
