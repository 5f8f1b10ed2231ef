"""FFN-M as token keys and values: which keys every token of the vocabulary opens."""
