"""Hangs and failures: who is stuck, where, and whose failure it was."""
