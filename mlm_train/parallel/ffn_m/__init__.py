"""How FFN-M is executed in parallel."""
