"""Kernels of one kind of device."""
