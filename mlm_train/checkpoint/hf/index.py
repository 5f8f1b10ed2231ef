"""Where an export's tensors are in its files, in the terms of a checkpoint's index."""

from pathlib import Path

from mlm_train.checkpoint.headers import read_headers
from mlm_train.checkpoint.hf.folder import open_tensors, weight_files
from mlm_train.checkpoint.index import CheckpointIndex, Stored
from mlm_train.checkpoint.shards import DTYPES
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError


def export_index(folder: Path, config: ModelConfig) -> CheckpointIndex:
    """What is where in the files of an export, or a Llama, as weights of a checkpoint.

    So ranks read their own slices of either alike. Raises UserError for tensors that do not fit the config.
    """
    with open_tensors(folder) as tensors:
        tensors.check(config)
        for name in tensors.names():
            if (dtype := tensors.dtype(name)) not in DTYPES.values():
                raise UserError(f"{folder}: tensor {name} is in {dtype}: save it in bfloat16 or float32")
    files = weight_files(folder)
    found = read_headers(folder, files)
    stored = {f"weight/{name}": Stored.of(part) for name, part in found.items()}
    return CheckpointIndex(folder, [file.name for file in files], stored)
