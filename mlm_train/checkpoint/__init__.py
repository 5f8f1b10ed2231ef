"""What is written of a model and read back: checkpoints and Hugging Face folders."""
