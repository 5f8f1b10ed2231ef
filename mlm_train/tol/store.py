"""The ToL store: a memory source that reads FFN-M's output instead of computing it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.source import MemoryReader
from mlm_train.tol.format import REBUILD, TolIndex, check_fits, map_partition, read_index


class TolSource:
    """FFN-M's output by token id, out of the partitions of a ToL folder; see `open_folder`."""

    def __init__(self, index: TolIndex, partitions: Sequence[Tensor]) -> None:
        self._partitions = partitions
        self._starts = torch.tensor([partition.rows[0] for partition in index.partitions])
        self._position = {layer: position for position, layer in enumerate(index.layers)}

    @classmethod
    def open_folder(cls, folder: str | Path, config: ModelConfig, in_memory: bool = False) -> Self:
        """Map a folder's partitions into memory, or with `in_memory` read them whole.

        A layer that the table dropped reads as zeros. Raises UserError when the folder is damaged as far
        as sizes and headers show, or belongs to a model of another shape.
        """
        folder = Path(folder)
        index = read_index(folder)
        check_fits(folder, index, config)
        partitions = []
        for partition in index.partitions:
            try:
                rows = map_partition(folder, index, partition)
            except ValueError as error:
                start, stop = partition.rows
                where = f"{folder / partition.file} (rows [{start}, {stop}))"
                raise UserError(f"{where} is damaged: {error}; {REBUILD}") from None
            partitions.append(rows.clone() if in_memory else rows)
        return cls(index, partitions)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of ascending ids [n] on the CPU -> [n, kept layers, hidden] of the table's dtype."""
        owner = torch.searchsorted(self._starts, ids, right=True) - 1
        parts = [
            self._partitions[number].index_select(0, ids[owner == number] - self._starts[number])
            for number in owner.unique().tolist()
        ]
        return torch.cat(parts)

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """Read each distinct id's row once, for all layers; ids [batch, sequence], x0 their embeddings."""
        distinct, inverse = ids.flatten().unique(return_inverse=True)
        rows = self.rows(distinct.cpu()).to(x0.device)

        def read(layer: int) -> Tensor:
            position = self._position.get(layer)
            if position is None:
                return torch.zeros_like(x0)
            return rows[:, position].to(x0.dtype).index_select(0, inverse).view(x0.shape)

        return read
