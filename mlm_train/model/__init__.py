"""The model in plain torch. Nothing here knows of processes, data or files."""
