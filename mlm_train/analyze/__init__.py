"""What a model's feed-forward memory does, and what the model loses without it."""
