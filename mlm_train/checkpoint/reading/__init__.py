"""Reading a model from a checkpoint or an export."""
