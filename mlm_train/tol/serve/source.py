"""A memory source that looks FFN-M's output up in a ToL instead of computing it."""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.model.source import MemoryReader
from mlm_train.tol.format.index import check_fits
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.serve.reader import TableReader
from mlm_train.utils.checks import Check


class TolSource:
    """FFN-M's output by token id, read from a table; see `open_folder`."""

    def __init__(self, table: TableReader) -> None:
        self.table = table

    @classmethod
    def open_folder(
        cls, folder: str | Path, config: ModelConfig, in_memory: bool = False, verify: Check = "sizes"
    ) -> Self:
        """Memory-map a folder's partitions, or with `in_memory` read them into memory.

        A layer that the table dropped reads as zeros. `verify`: see TableReader.open_folder. Raises UserError
        for detected damage and for a table of a model of another shape.
        """
        check_fits(Path(folder), read_index(folder), config)
        table = TableReader.open_folder(folder, in_memory, verify)
        return cls(table)

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """Read each distinct id's row once, for all layers. ids: [batch, sequence]; x0: their embeddings."""
        distinct, inverse = ids.flatten().unique(return_inverse=True)
        rows = self.table.rows(distinct.cpu()).to(x0.device)

        def read(layer: int) -> Tensor:
            values = self.table.values(rows, layer)
            if values is None:
                return torch.zeros_like(x0)
            return values.to(x0.dtype).index_select(0, inverse).view(x0.shape)

        return read
