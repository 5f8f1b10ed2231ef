"""Decoding: one engine over a model and any memory source."""
