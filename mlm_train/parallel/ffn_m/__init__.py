"""FFN-M's tables over data-parallel ranks."""
