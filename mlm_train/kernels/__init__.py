"""Kernels for specific devices."""
