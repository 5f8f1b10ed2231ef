"""Logical tensors in and out of a folder of safetensors, through torch.distributed.checkpoint.

Its Hugging Face storage holds no pickle and no index: the manifest beside the files is ours.
"""

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from mlm_train.errors import SharedUserError, UserError


def write_tensors(folder: Path, state: dict[str, Tensor]) -> None:
    """Write tensors that every rank holds alike, each once; every rank calls it.

    Raises UserError on every rank where one could not write.
    """
    try:
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.api.CheckpointException as error:  # derives from BaseException
        raise SharedUserError(
            f"{folder} cannot be written: {_cause(error)}; free space or choose another train.output"
        ) from None


def read_tensors(folder: Path, wanted: dict[str, Tensor], alone: bool = False) -> None:
    """Read tensors into the ones given, which held NaN before, so that what is not read shows.

    `alone`: on this process, without process groups. Raises UserError.
    """
    try:
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except dcp.api.CheckpointException as error:
        raise UserError(f"checkpoint {folder} cannot be read: {_cause(error)}") from None
    for name, tensor in wanted.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise UserError(f"checkpoint {folder}: {name} is incomplete or holds NaN; use an older one")


def _cause(error: Any) -> str:
    """The first rank's own error, in one line."""
    cause = next(iter(error.failures.values()))[0] if error.failures else error
    return str(cause).splitlines()[0]
