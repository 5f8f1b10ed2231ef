"""Hangs and failures: which rank is stuck, where, and which one failed first."""
