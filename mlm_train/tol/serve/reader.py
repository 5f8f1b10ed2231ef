"""A ToL folder, opened for reading: encoded rows, and the values in them."""

from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mlm_train.errors import UserError
from mlm_train.tol.format.codec import decode
from mlm_train.tol.format.cpu_codec import decode_rows
from mlm_train.tol.format.index import BASIS, INDEX, REBUILD, X0, Partition, TableFile, TolIndex, file_of
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.format.partition import map_partition
from mlm_train.tol.format.schemes import Encoding
from mlm_train.tol.storage.base import Storage, StorageReader
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.utils.checks import Check
from mlm_train.utils.files import listed, sha256_of
from mlm_train.utils.progress import ByteProgress

_HASHED_AT_ONCE = 4  # partitions
BASIS_HEADER = 128  # bytes per layer; more than its entry can need


class RowDecoder:
    """Decodes the layers of encoded rows, and the embedding as layer X0.

    layers: those that will be asked for (None: all that are stored). span: the bytes [first, last) of a row
    that hold them, from which all others count. start: where the first layer begins. alike: that layer's
    encoding, where the rest of the span is layers of the same encoding and of full rank, one by one.
    complete: whether these are all layers of the model.
    """

    def __init__(
        self, index: TolIndex, bases: dict[int, Tensor], layers: Collection[int] | None = None
    ) -> None:
        self.hidden, self._bases = index.hidden_size, bases
        self._rounded: dict[tuple[int, torch.dtype], Tensor] = {}
        stored = {layer: field for layer, field in index.stored.items() if layers is None or layer in layers}
        ends = {}
        for layer, field in stored.items():
            spans = field.spans(index.hidden_size)
            ends[layer] = min(start for start, _ in spans), max(stop for _, stop in spans)
        self.span = 0, index.row_bytes
        if layers is not None:
            self.span = (
                min((first for first, _ in ends.values()), default=0),
                max((last for _, last in ends.values()), default=0),
            )
        self._fields = {
            layer: (first - self.span[0], last - self.span[0], stored[layer].moved(-first))
            for layer, (first, last) in ends.items()
        }
        self._layers = [layer for layer in self._fields if layer != X0]
        self.start = self._fields[self._layers[0]][0] if self._layers else 0
        self.alike = self._all_alike()
        self.complete = self._layers == list(range(index.num_layers))
        self._numbers = {layer: number for number, layer in enumerate(self._layers)}

    @property
    def size(self) -> int:
        """Bytes of the span."""
        return self.span[1] - self.span[0]

    def _all_alike(self) -> Encoding | None:
        count, whole = len(self._layers), self.size - self.start
        if not count or whole % count:
            return None
        first = self._fields[self._layers[0]][2]
        places = ((self._fields[layer][0], self._fields[layer][2]) for layer in self._layers)
        wanted = [(self.start + number * (whole // count), first) for number in range(count)]
        return first if first.rank is None and list(places) == wanted else None

    def columns(self, layer: int) -> tuple[int, int] | None:
        """The bytes [first, last) of the span that hold a layer; None for one that is not stored."""
        found = self._fields.get(layer)
        return None if found is None else found[:2]

    def values(self, columns: Tensor, layer: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode a layer from its `columns`, uint8 [n, last - first], to [n, hidden].

        In `dtype`, fp32 or the layer's plain type. A low-rank layer is multiplied by its basis, in `dtype`.
        """
        field = self._fields[layer][2]
        decoded = decode_in(field, columns, self.hidden, dtype)
        if field.rank is None:
            return decoded
        return decoded.to(dtype) @ self._basis(layer, dtype).to(columns.device)

    def number(self, layer: int) -> int:
        """The place of a stored layer in what all_values returns."""
        return self._numbers[layer]

    def all_values(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode all stored layers of rows from `start` on, uint8 [n, bytes], at once: [n, layers, hidden].

        They must be stored alike. `dtype`: of the values.
        """
        assert self.alike is not None
        parts = rows.reshape(rows.shape[0] * len(self._layers), -1)
        return decode_in(self.alike, parts, self.hidden, dtype).to(dtype).view(rows.shape[0], -1, self.hidden)

    def _basis(self, layer: int, dtype: torch.dtype) -> Tensor:
        found = self._rounded.get((layer, dtype))
        if found is None:
            found = self._rounded[layer, dtype] = self._bases[layer].to(dtype)
        return found

    def in_basis(self, values: Tensor, layer: int) -> Tensor:
        """Project values [n, hidden] of a low-rank layer to its stored coordinates [n, rank]."""
        return values.float() @ projector(self._bases[layer])


class TableReader:
    """Reads encoded rows, uint8 [n, row bytes], from mapped partitions, and decodes them."""

    def __init__(self, index: TolIndex, partitions: Sequence[Tensor], bases: dict[int, Tensor]) -> None:
        self.index = index
        self._partitions = partitions
        self._decoder = RowDecoder(index, bases)
        self._starts = torch.tensor([partition.rows[0] for partition in index.partitions])

    @classmethod
    def open_folder(cls, folder: str | Path, verify: Check = "sizes") -> Self:
        """Memory-map a folder's partitions; `verify`: see `open_partitions`."""
        folder = Path(folder)
        index = read_index(folder)
        return cls(index, open_partitions(folder, index, verify), read_bases(folder, index))

    @classmethod
    def open_plain(cls, folder: str | Path, verify: Check = "sizes") -> Self:
        """As open_folder. UserError for a table that is compressed."""
        table = cls.open_folder(folder, verify)
        if any(field.quantised or field.rank is not None for field in table.index.fields):
            raise UserError(f"{folder} is compressed already; give the table that `tol build` wrote")
        return table

    def rows(self, ids: Tensor) -> Tensor:
        """Read the rows of ascending ids [n] on the CPU: uint8 [n, row bytes]."""
        owner = torch.searchsorted(self._starts, ids, right=True) - 1
        parts = [
            self._partitions[i].index_select(0, ids[owner == i] - self._starts[i])
            for i in owner.unique().tolist()
        ]
        return torch.cat(parts)

    def range(self, first: int, last: int) -> Tensor:
        """Read rows [first, last), of one or several partitions: uint8 [last - first, row bytes]."""
        parts = []
        for partition, rows in zip(self.index.partitions, self._partitions, strict=True):
            start, stop = partition.rows
            if start < last and first < stop:
                parts.append(rows[max(first - start, 0) : min(last, stop) - start])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def values(self, rows: Tensor, layer: int) -> Tensor | None:
        """Decode a layer, or X0, of stored rows: see RowDecoder.values. None for one that is not stored."""
        columns = self._decoder.columns(layer)
        if columns is None:
            return None
        return self._decoder.values(rows[:, slice(*columns)], layer)

    def in_basis(self, values: Tensor, layer: int) -> Tensor:
        """Project values [n, hidden] of a low-rank layer to its stored coordinates [n, rank]."""
        return self._decoder.in_basis(values, layer)


def decode_in(encoding: Encoding, rows: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """codec.decode, in `dtype` at once where that is faster."""
    values = decode_rows(encoding, rows, hidden, dtype)
    return decode(encoding, rows, hidden) if values is None else values


def open_partitions(folder: Path, index: TolIndex, verify: Check) -> list[Tensor]:
    """Memory-map the partitions: uint8 [rows, row bytes] each.

    `verify`: "full" reads and hashes every partition first. Sizes and headers are always checked. Raises
    UserError for a damaged file.
    """
    if verify == "full":
        check_rows(folder, [(0, index.vocab_size)], _HASHED_AT_ONCE)
    partitions = []
    for partition in index.partitions:
        try:
            partitions.append(map_partition(folder, index, partition))
        except ValueError as error:
            raise _damaged(folder, index, partition, str(error)) from None
    return partitions


def check_rows(folder: str | Path, ranges: Iterable[tuple[int, int]], threads: int) -> None:
    """Read the partitions of these row ranges in full, and compare their SHA-256 with the index.

    A table made from damaged rows would pass every check. Raises UserError naming the partition.
    """
    index, folder, wanted = read_index(folder), Path(folder), list(ranges)
    needed = [
        partition
        for partition in index.partitions
        if any(first < partition.rows[1] and partition.rows[0] < last for first, last in wanted)
    ]
    done = 0
    with (
        ByteProgress("check", sum(partition.bytes for partition in needed)) as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        digests = pool.map(lambda partition: sha256_of(listed(folder, partition.file, INDEX)), needed)
        for partition, digest in zip(needed, digests, strict=True):
            if digest != partition.sha256:
                raise _damaged(folder, index, partition, "its SHA-256 is not the index's")
            progress.show(done := done + partition.bytes)


def _damaged(folder: Path, index: TolIndex, partition: Partition, what: str) -> UserError:
    start, stop = partition.rows
    where = f"{folder / partition.file} (rows [{start}, {stop}))"
    return UserError(f"{where} is damaged: {what}; repair it with {index.repair}")


def read_bases(folder: Path, index: TolIndex) -> dict[int, Tensor]:
    """Read the bases of all low-rank layers: fp32 [rank, hidden] by layer. UserError for a damaged file."""
    if index.basis is None:
        return {}
    listed(folder, index.basis.file, INDEX)
    schemes = zip(index.layers, index.fields, strict=True)
    ranks = {layer: field.rank for layer, field in schemes if field.rank is not None}
    bases = bases_at(LocalFolder(folder), index.basis, list(ranks))
    for layer, rank in ranks.items():
        if bases[layer].shape != (rank, index.hidden_size):
            where = folder / index.basis.file
            raise UserError(f"{where}: {basis_name(layer)} does not fit the index; {REBUILD}")
    return bases


def bases_at(storage: StorageReader, file: TableFile, layers: Sequence[int]) -> dict[int, Tensor]:
    """Read the bases of these layers from their file: fp32 [rank, hidden] by layer. UserError if damaged."""
    data, where = storage.read(file.file), storage.at(file.file)
    if data is None or file_of(file.file, data) != file:
        raise UserError(f"{where} is missing or damaged: its SHA-256 is not the index's; {REBUILD}")
    try:
        bases = load(data)
        return {layer: bases[basis_name(layer)].float() for layer in layers}
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{where} is damaged: {error}; {REBUILD}") from None


def projector(basis: Tensor) -> Tensor:
    """The least-squares projection [hidden, rank] onto a basis [rank, hidden] with orthogonal rows."""
    return (basis / basis.square().sum(1, keepdim=True)).T


def write_bases(storage: Storage, bases: dict[int, Tensor]) -> TableFile:
    """Write the bases [rank, hidden] of low-rank layers as float16.

    The header is padded to BASIS_HEADER bytes per layer, so that the bytes a layer adds are known beforehand.
    """
    data = save({basis_name(layer): basis.half().contiguous() for layer, basis in bases.items()})
    start, room = 8 + int.from_bytes(data[:8], "little"), BASIS_HEADER * len(bases) - 8
    header = data[8:start].rstrip(b" ")
    assert len(header) <= room
    data = room.to_bytes(8, "little") + header.ljust(room) + data[start:]
    storage.write(BASIS, data)
    return file_of(BASIS, data)


def basis_name(layer: int) -> str:
    """The name of a basis's tensor."""
    return f"layer.{layer}"
