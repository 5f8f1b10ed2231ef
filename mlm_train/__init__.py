"""mlm_train: distributed pretraining of MemoryLLM and Flex-MemoryLLM (arXiv 2602.00398).

`mlm_train.load(folder)` returns a model that generates: see mlm_train/inference/language_model.py.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load`, imported when it is first used: torch takes seconds, and no `--help` waits for it."""
    if name == "load":
        return importlib.import_module("mlm_train.inference.language_model").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
