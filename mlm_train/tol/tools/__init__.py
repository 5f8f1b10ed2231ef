"""Verifying, copying and inspecting tables."""
