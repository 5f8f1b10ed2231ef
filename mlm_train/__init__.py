"""mlm_train: distributed pretraining of MemoryLLM and Flex-MemoryLLM (arXiv 2602.00398)."""

__version__ = "0.1.0"
