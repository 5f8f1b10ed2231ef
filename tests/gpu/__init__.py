"""The suite for a machine with GPUs: `python -m tests.gpu`, or `make test-gpu` (docs/gpu.md)."""
