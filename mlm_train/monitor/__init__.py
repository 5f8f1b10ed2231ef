"""Monitoring of a run: log lines, metrics, throughput, memory."""
