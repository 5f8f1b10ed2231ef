"""One self-contained HTML page of a model's analyses."""
