"""A memory source that looks FFN-M's output up in a ToL instead of computing it."""

import functools
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mlm_train.checkpoint.hf.folder import fingerprint
from mlm_train.checkpoint.hf.manifest import read_manifest
from mlm_train.checkpoint.reading.logical_folder import ModelFolder
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.source import TokenReader
from mlm_train.tol.format.index import X0, TolIndex, check_fits
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.serve.disk import DiskStore
from mlm_train.tol.serve.layers import DecodedLayers
from mlm_train.tol.serve.patch import Overlaid, Overlay, Patch
from mlm_train.tol.serve.reader import RowDecoder, open_partitions, read_bases
from mlm_train.tol.serve.store import MemoryStore, Rows, RowStore, StoreOptions, Touch
from mlm_train.utils.host_memory import lock_memory

REQUESTS = 2  # a prompt's next chunk, and the next prompts' first one


class TolSource:
    """FFN-M's output by token id, and x0 where the table has it, read from a table; see `open_folder`."""

    def __init__(self, store: RowStore, decoder: RowDecoder, patches: Sequence[Patch] = ()) -> None:
        self.store, self._decoder, self._overlay = store, decoder, Overlay(patches)
        self._requested: deque[tuple[Tensor, Rows]] = deque(maxlen=REQUESTS)

    @classmethod
    def open_folder(
        cls,
        folder: str | Path,
        config: ModelConfig,
        options: StoreOptions | None = None,
        device: torch.device | str = "cpu",
        patches: Sequence[str | Path] = (),
        layers: Collection[int] | None = None,
    ) -> Self:
        """Open a table as `options` say (default: StoreOptions()); device: the model's.

        patches: files of `mlm-train tol patch`, later ones over earlier ones. layers: those that will be
        asked for (default: all); of each row only their bytes are read. A layer that the table dropped reads
        as zeros. Raises UserError for detected damage and for a table of a model of another shape.
        """
        folder = Path(folder)
        index = read_index(folder)
        check_fits(folder, index, config)
        with torch.device("cpu"):  # a library may make its models under another default
            overlay = [Patch.read(patch, folder) for patch in patches]
            bases = {layer: basis.to(device) for layer, basis in read_bases(folder, index).items()}
            decoder = RowDecoder(index, bases, layers)
            store = open_store(folder, index, options or StoreOptions(), torch.device(device), decoder.span)
            return cls(store, decoder, overlay)

    @classmethod
    def of_model(
        cls,
        folder: str | Path,
        model: ModelFolder,
        options: StoreOptions,
        device: torch.device | str = "cpu",
        patches: Sequence[str | Path] = (),
    ) -> Self:
        """As open_folder, for a model that must be the one that the table was built from.

        That is known of an export whose files were hashed (--verify full), from their checksums; of others
        only the shapes are compared. Raises UserError where it is another.
        """
        if model.manifest is None:
            other = "or --verify sizes where both hold the same weights"
            _check_origin(Path(folder), model.config, model.path, model.digests, other)
        return cls.open_folder(folder, model.config, options, device, patches)

    @classmethod
    def of_export(
        cls,
        folder: str | Path,
        export: str | Path,
        config: ModelConfig,
        options: StoreOptions | None = None,
        patches: Sequence[str | Path] = (),
        layers: Collection[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """As open_folder, for the model in the folder `export`, whose weights are not read.

        Where `mlm-train export` wrote it, its manifest has the checksums that say whether the table was built
        from it. Raises UserError where it was built from another.
        """
        manifest = read_manifest(Path(export))
        if manifest is not None:
            digests = {entry.file: entry.sha256 for entry in manifest.files}
            other = f"or build one with `mlm-train tol build {export}`"
            _check_origin(Path(folder), config, Path(export), digests, other)
        return cls.open_folder(folder, config, options, device, patches, layers)

    def request(self, ids: Tensor) -> None:
        """Begin to read the rows of ids [...] that will be opened soon; the last REQUESTS are kept."""
        distinct = ids.flatten().unique().cpu()
        if any(torch.equal(requested, distinct) for requested, _ in self._requested):
            return  # a batch asks for its first chunk, which the batch before it has asked for
        self._requested.append((distinct, self.store.fetch(distinct)))

    def open(self, ids: Tensor, x0: Tensor) -> TokenReader:
        """Begin to read each distinct id's row, for all layers; a layer waits for its own bytes alone.

        ids: [batch, sequence], or [tokens]; x0: [*ids.shape, hidden], of which the dtype and the device are
        taken.
        """
        return self._reader(ids, x0.dtype, x0.device)

    @property
    def has_embeddings(self) -> bool:
        """Whether the table has x0, so that the model needs no embedding."""
        return self._decoder.columns(X0) is not None

    def open_with_x0(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, TokenReader]:
        """See model.source.EmbeddingSource; for a table that has embeddings."""
        assert self.has_embeddings
        read = self._reader(ids, dtype, ids.device)
        return read(X0), read

    def _reader(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> TokenReader:
        distinct, inverse = ids.flatten(), None
        if len(distinct) > 1:  # a token that is decoded alone is distinct
            distinct, inverse = distinct.unique(return_inverse=True)
        asked = distinct.cpu()
        rows, patched = self._rows(asked), self._overlay.over(asked, dtype, device)
        self.store.counters.rows += ids.numel()
        layers = DecodedLayers(self._decoder, rows, len(asked), dtype, device)
        none = functools.partial(torch.zeros, *ids.shape, self._decoder.hidden, dtype=dtype, device=device)
        return _Read(layers, patched, inverse, ids.shape, none)

    def _rows(self, distinct: Tensor) -> Rows:
        for number, (requested, rows) in enumerate(self._requested):
            if torch.equal(requested, distinct):
                del self._requested[number]
                return rows
        return self.store.fetch(distinct)


class _Read(NamedTuple):
    """The rows of one forward pass, a reader of them (model.source.TokenReader)."""

    layers: DecodedLayers
    patched: Overlaid | None
    inverse: Tensor | None  # of each position: which row; None where there is but one
    shape: torch.Size  # of the ids
    none: Callable[[], Tensor]  # what a layer adds that is not stored

    def __call__(self, layer: int) -> Tensor:
        values = self.layers(layer)
        if values is None:
            return self.none()
        if self.patched is not None and layer != X0:  # a patch changes what FFN-M recalls
            values = self.patched.apply(values, layer)
        if self.inverse is not None:
            values = values.index_select(0, self.inverse)
        return values.view(*self.shape, -1)

    def of_token(self) -> Tensor | None:
        values = self.layers.all_layers() if self.patched is None and self.inverse is None else None
        return None if values is None else values[0]


def _check_origin(
    folder: Path, config: ModelConfig, export: Path, digests: Mapping[str, str], other: str
) -> None:
    """Raise a UserError if a table was not built from an export whose files have these SHA-256, by name.

    Nothing is compared where none are known. other: what else the user can do.
    """
    index = read_index(folder)
    check_fits(folder, index, config)  # the clearer error where both apply
    if digests and fingerprint(export, digests) != index.source.checkpoint:
        raise UserError(
            f"{folder} was built from another model than {export}: give the one it was built from, {other}"
        )


def open_store(
    folder: Path,
    index: TolIndex,
    options: StoreOptions,
    device: torch.device,
    span: tuple[int, int] | None = None,
) -> RowStore:
    """The store of a table's rows, or of the bytes [first, last) of each.

    Raises UserError for a damaged file and for options without effect.
    """
    options.check()
    partitions = open_partitions(folder, index, options.verify)
    first, last = span or (0, index.row_bytes)
    if options.tier == "disk" and first < last:
        return DiskStore(folder, index, options, (first, last), device)
    starts: Sequence[int] = [partition.rows[0] for partition in index.partitions]
    mapped = options.tier == "shared" and first < last
    if options.lock:
        for rows in partitions:
            lock_memory(rows.data_ptr(), rows.numel())
    partitions = [rows[:, first:last] for rows in partitions]
    if options.tier == "resident":
        partitions = [rows.to(device, copy=True) for rows in partitions]
    touch = Touch(folder, index) if options.first_touch else None
    return MemoryStore(partitions, starts, mapped, touch, device if mapped else None)
