"""Estimates of what a run or a table needs, before anything is allocated."""
