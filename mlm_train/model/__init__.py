"""The model in plain torch, independent of processes, data and files."""
