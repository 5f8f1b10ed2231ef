"""Write and read logical tensors in a folder of safetensors, with torch.distributed.checkpoint.

Its Hugging Face storage uses no pickle and no index; our manifest lies beside the files.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from mlm_train.checkpoint.shards import ShardWriter
from mlm_train.errors import SharedUserError, UserError
from mlm_train.model.logical import Piece
from mlm_train.utils.files import with_fix


class LogicalPart(Tensor):
    """A part of a logical tensor with its offset: the shard interface of torch.distributed.checkpoint."""

    whole: torch.Size
    offset: torch.Size

    @staticmethod
    def of(piece: Piece, local: Tensor) -> Tensor:
        """`local`, which holds the piece, as a LogicalPart; unchanged where it is the whole tensor."""
        if local.shape == piece.shape:
            return local
        part = local.as_subclass(LogicalPart)
        part.whole, part.offset = piece.shape, torch.Size(piece.offset)
        return part

    def size(self, *dim: int) -> Any:  # type: ignore[override]
        """Size of the logical tensor, as the reader expects."""
        return self.whole[dim[0]] if dim else self.whole

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self.offset, self.as_subclass(Tensor).shape)]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        plain = self.as_subclass(Tensor)
        data = TensorWriteData(
            self.__create_chunk_list__()[0], TensorProperties.create_from_tensor(plain), self.whole
        )
        return [WriteItem(MetadataIndex(name, self.offset), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, _: object) -> Tensor:
        return self.as_subclass(Tensor)


def write_tensors(folder: Path, state: dict[str, Tensor], group: Any = None) -> list[dict[str, Any]]:
    """Write tensors and LogicalParts; replicated ones are written once.

    Every rank of `group` (default: all) calls it. Returns the manifest entries of this rank's files.
    Raises UserError on every rank where any rank could not write.
    """
    try:
        writer = ShardWriter(folder)
        dcp.save(state, storage_writer=writer, process_group=group)
        return writer.entries
    except dcp.api.CheckpointException as error:  # derives from BaseException
        _raise_stop(error)
        raise SharedUserError(f"{folder.parent} cannot be written: {_disk_error(error)}") from None


def read_tensors(folder: Path, wanted: dict[str, Tensor], alone: bool = False) -> None:
    """Read into the given tensors and LogicalParts, filled with NaN before so that gaps are found.

    `alone`: in this process only, without process groups. Raises UserError.
    """
    try:
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except dcp.api.CheckpointException as error:
        _raise_stop(error)
        raise UserError(f"checkpoint {folder} cannot be read: {_cause(error)}") from None
    for name, tensor in wanted.items():
        if tensor.is_floating_point() and bool(tensor.as_subclass(Tensor).isnan().any()):
            raise UserError(f"checkpoint {folder}: {name} is incomplete or holds NaN; use an older one")


def _raise_stop(error: Any) -> None:
    """Raise a signal's KeyboardInterrupt again, which the library reports as a failure."""
    for failure, _ in error.failures.values():
        if isinstance(failure, KeyboardInterrupt):
            raise failure from None


def _disk_error(error: Any) -> str:
    """The first rank's OSError and its fix; any other error in one line."""
    cause = next(iter(error.failures.values()))[0] if error.failures else error
    return with_fix(cause) if isinstance(cause, OSError) else _cause(error)


def _cause(error: Any) -> str:
    """The first rank's own error, in one line."""
    cause = next(iter(error.failures.values()))[0] if error.failures else error
    return next(iter(str(cause).splitlines()), type(cause).__name__)
