"""Writing models to disk and reading them back: checkpoints and Hugging Face folders."""
