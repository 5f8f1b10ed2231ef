"""Token-wise lookups (ToL): FFN-M of every vocabulary token, precomputed, stored and served."""
