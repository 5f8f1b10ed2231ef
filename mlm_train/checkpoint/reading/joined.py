"""Read a checkpoint's weights by slice, whatever layout wrote them, without a model or process groups."""

from pathlib import Path

import torch
from torch import Tensor

from mlm_train.checkpoint.headers import FIX
from mlm_train.checkpoint.hf.folder import FolderTensors
from mlm_train.checkpoint.index import CheckpointIndex, read_index
from mlm_train.checkpoint.manifest import Manifest
from mlm_train.checkpoint.reading.slices import read_tensor
from mlm_train.checkpoint.shards import DTYPES
from mlm_train.errors import UserError

WEIGHT = "weight/"  # prefix of weights; the optimizer's moments have others


class _Joined:
    """A logical tensor in parts, with the interface of a safetensors slice and of the open file."""

    def __init__(self, index: CheckpointIndex, name: str) -> None:
        self._index, self._name, self._stored = index, name, index.stored(name)

    def get_slice(self, name: str) -> "_Joined":
        """Itself: it also stands in for the open file."""
        return self

    def get_shape(self) -> list[int]:
        """Shape of the logical tensor."""
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        """Stored dtype as safetensors spells it, such as F32."""
        return DTYPES[self._stored.dtype]

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of the logical tensor; only the parts that hold some are read."""
        return read_tensor(self._index, self._name, rows.start or 0, rows.stop)


def open_joined(folder: Path, manifest: Manifest) -> FolderTensors:
    """The weights of a checkpoint by export name. Its files are verified already.

    Raises UserError for a file that is not safetensors and for a tensor with missing parts.
    """
    index = read_index(folder, manifest.files, manifest.index)
    names = [name for name in index.tensors if name.startswith(WEIGHT)]
    for name in names:
        index.check_whole(name)
        if index.tensors[name].dtype != torch.float32:
            raise UserError(f"checkpoint {folder}: {name} is not in fp32; {FIX}")
    return FolderTensors(folder, {name.removeprefix(WEIGHT): _Joined(index, name) for name in names}, FIX)
