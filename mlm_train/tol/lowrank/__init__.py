"""Layers of low rank."""
