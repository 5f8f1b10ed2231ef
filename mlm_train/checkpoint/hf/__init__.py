"""Folders that Hugging Face transformers reads."""
