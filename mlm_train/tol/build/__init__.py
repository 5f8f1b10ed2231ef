"""Building tables with Ray."""
