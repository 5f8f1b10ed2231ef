"""Text generation with a model and any memory source."""
