"""The Ray actor of a build: computes a range of rows for a group of layers and writes it into a partition."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlm_train.checkpoint.reading.logical_folder import OpenedModel, open_model
from mlm_train.errors import UserError
from mlm_train.tol.build.row_source import ComputedRows, RowSource, StoredRows, chunks_of, from_numpy
from mlm_train.tol.build.state import BuildPlan, spectrum_name
from mlm_train.tol.format.codec import NotFinite, decode, encode
from mlm_train.tol.format.index import Partition, TableFile, file_of
from mlm_train.tol.format.layout import Layout
from mlm_train.tol.format.partition import Draft, hash_draft
from mlm_train.tol.format.schemes import Scheme, layout
from mlm_train.tol.lowrank.ranks import RankErrors, Sample
from mlm_train.tol.lowrank.spectrum import Gram, Spectrum
from mlm_train.tol.serve.reader import bases_at, projector
from mlm_train.tol.storage.base import StorageReader, put
from mlm_train.tol.storage.direct_io import Stream, buffers
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.tol.storage.resolve import reader_at
from mlm_train.utils.host_memory import keep_freed

Sums = list[tuple[float, float]]  # per layer: squared error and squared norm of its values


class FilledRows(NamedTuple):
    """The result of filling layers of a draft; `partition` if these are all layers."""

    sums: Sums
    partition: Partition | None = None


@dataclass(frozen=True)
class WorkerJob:
    """What every worker of a build needs to know.

    model: folder with FFN-M's weights, or None with `table`, the folder to read rows from. output: address of
    the storage to write to. row_weights: what each row's squared error counts in the choice of low rank, fp32
    [vocabulary]; None: all alike.
    """

    model: str | None
    table: str | None
    output: str
    plan: BuildPlan
    device: str = "cpu"
    row_weights: np.ndarray | None = None


def prepare_process(threads: int) -> None:
    """Set up torch in a worker process, before its first tensor."""
    # Each chunk needs the same memory: allocating it again, page by page, takes a fifth of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed(every_size=True)
    torch.set_num_threads(threads)


class BuildWorker:
    """Runs in its own process; holds the layers of one group at a time.

    `weights`: a Ray reference per layer of a group, to an object that a node's processes share.
    """

    def __init__(self, job: WorkerJob) -> None:
        prepare_process(job.plan.threads)
        self.job = job
        self._layers: tuple[int, ...] = ()
        self._source: RowSource | None = None
        self._buffers: list[Tensor] = []
        self._basis: tuple[TableFile, tuple[int, ...], dict[int, Tensor]] | None = None

    def ready(self) -> None:
        """Return once the worker runs and has opened its model."""
        if self.job.model is not None:
            _ = self._model

    @cached_property
    def _model(self) -> OpenedModel:
        assert self.job.model is not None
        return open_model(self.job.model, verify="sizes")

    @cached_property
    def _storage(self) -> StorageReader:
        return reader_at(self.job.output)

    @property
    def _folder(self) -> Path:
        """The output folder; files are filled group by group only in a folder."""
        assert isinstance(self._storage, LocalFolder)
        return self._storage.path

    def fill(
        self,
        draft: str,
        number: int,
        layers: Sequence[int],
        weights: list[Any],
        layout: Layout,
        basis: TableFile | None,
    ) -> FilledRows:
        """Write these layers of a partition into its draft, which the builder has created.

        `basis`: the file with the bases of low-rank layers, if any.
        """
        plan = self.job.plan
        start, stop = plan.rows(number)
        chunks = chunks_of(start, stop, plan.chunk_rows)
        encoder = _Encoder(layout, layers, self._bases(basis, layout, layers))
        source = self._open(tuple(layers), weights)
        if list(layers) == layout.layers:
            header, row_buffers = layout.shape.header(stop - start), self._row_buffers(encoder.bytes)
            with Stream(self._storage.sink(draft, header), header, row_buffers) as stream:
                for first, last in chunks:
                    encoder.encode(source, first, last, stream.rows(last - first))
                    stream.put(last - first)
                digest = stream.finish()
            file_name, rows = plan.file(number), (start, stop)
            partition = Partition(file=file_name, rows=rows, bytes=stream.bytes, sha256=digest)
            return FilledRows(encoder.sums, partition)
        with Draft(self._folder / draft, layout.shape, stop - start) as file:
            for first, last in chunks:
                out = torch.empty(last - first, encoder.bytes, dtype=torch.uint8)
                encoder.encode(source, first, last, out)
                file.write(first - start, encoder.start, out)
            file.sync()
        return FilledRows(encoder.sums)

    def _bases(self, basis: TableFile | None, layout: Layout, layers: Sequence[int]) -> dict[int, Tensor]:
        """The bases of those of these layers that are low-rank; cached for the last layers."""
        ranks = dict(zip(layout.layers, layout.schemes, strict=True))
        cut = tuple(layer for layer in layers if ranks[layer].rank is not None)
        if basis is None or not cut:
            return {}
        if self._basis is None or self._basis[:2] != (basis, cut):
            self._basis = (basis, cut, bases_at(self._storage, basis, cut))
        return self._basis[2]

    def _row_buffers(self, row_bytes: int) -> list[Tensor]:
        """Buffers for a chunk's rows; reused, since allocating memory takes time."""
        if not self._buffers or self._buffers[0].shape[1] != row_bytes:
            self._buffers = []
            self._buffers = buffers(self.job.plan.chunk_rows, row_bytes)
        return self._buffers

    def spectrum(self, layer: int, weights: list[Any], draft: str) -> TableFile:
        """Write the spectrum of a layer, over the whole vocabulary, into a draft; return its entry.

        With a budget, also the predicted errors of all schemes.
        """
        plan, source = self.job.plan, self._open((layer,), weights)
        gram, sample = Gram(plan.hidden_size), Sample(plan.vocab_size, plan.hidden_size)
        weighing = None if self.job.row_weights is None else torch.from_numpy(self.job.row_weights)
        for first, last in chunks_of(0, plan.vocab_size, plan.chunk_rows):
            for values in source.values(first, last):
                gram.add(values, None if weighing is None else weighing[first:last])
                sample.add(values)
        try:
            spectrum = Spectrum.of(gram)
        except ValueError as error:
            raise UserError(f"layer {layer} cannot be cut to low rank: {error}; train again") from None
        schemes = [] if plan.spec.budget is None else plan.spec.searched
        data = RankErrors.of(spectrum, sample, plan.vocab_size, schemes).pack()
        put(self._storage.sink(draft), data)
        return file_of(spectrum_name(layer), data)

    def hash(self, draft: str, number: int) -> Partition:
        """Flush and hash a draft that several workers have filled; the builder gives it its name."""
        plan = self.job.plan
        return hash_draft(self._folder / draft, plan.file(number), plan.rows(number))

    def _open(self, layers: tuple[int, ...], weights: list[Any]) -> RowSource:
        """The row source of these layers; the previous group is released."""
        if layers == self._layers and self._source is not None:
            return self._source
        import ray

        self._source = None
        job = self.job
        if job.table is not None:
            self._source = StoredRows(job.table, layers)
        else:
            shared = zip(layers, ray.get(weights), strict=True)
            by_layer = {layer: from_numpy(arrays) for layer, arrays in shared}
            self._source = ComputedRows(self._model, by_layer, job.plan.compute, job.device)
        self._layers = layers
        return self._source


PROCESS_TITLE = f"ray::{BuildWorker.__name__}"  # how Ray names a worker's process, followed by its method


class _Encoder:
    """Encodes neighbouring layers of rows, the first with the embedding, and sums the layers' errors."""

    def __init__(self, layout: Layout, layers: Sequence[int], bases: dict[int, Tensor]) -> None:
        first = layout.layers.index(layers[0])
        span = slice(first, first + len(layers))
        assert layout.layers[span] == list(layers)
        self.layers, self.hidden = layers, layout.hidden_size
        self.schemes = layout.schemes[span]
        self.start, stop = layout.span(layers)
        self.edges = [edge - self.start for edge in layout.edges[first : first + len(layers) + 1]]
        self.bases, self.bytes = bases, stop - self.start
        self.embedding = None
        if layout.embedding is not None and first == 0:
            self.embedding = Scheme(dtype=layout.embedding)
        self.sums: Sums = [(0.0, 0.0)] * len(layers)

    def encode(self, source: RowSource, first: int, last: int, out: Tensor) -> None:
        """Encode rows [first, last) into `out`: uint8 [n, bytes of these layers]."""
        if self.embedding is not None:
            try:
                encode(self.embedding, source.embedding(first, last), out[:, : self.edges[0]])
            except NotFinite as found:
                raise UserError(
                    f"the embedding of token {first + found.row} is not finite; train again"
                ) from None
        for position, values in enumerate(source.values(first, last)):
            self._encode(position, values, out[:, self.edges[position] : self.edges[position + 1]], first)

    def _encode(self, position: int, values: Tensor, out: Tensor, first: int) -> None:
        scheme, layer = self.schemes[position], self.layers[position]
        basis = self.bases.get(layer)
        projected = values if basis is None else values.float() @ projector(basis)
        try:
            encode(scheme, projected, out)
        except NotFinite as found:
            raise _not_finite(found, first + found.row, layer) from None
        if basis is None and not scheme.quantised:
            return  # the rounding error of plain types is not measured
        (field,) = layout([scheme], self.hidden)
        stored, true = decode(field, out, self.hidden).float(), values.float()
        error = (stored if basis is None else stored @ basis) - true
        before = self.sums[position]
        self.sums[position] = (before[0] + _square(error), before[1] + _square(true))


def _square(values: Tensor) -> float:
    return float(values.square().sum(-1).sum(dtype=torch.float64))


def _not_finite(error: NotFinite, token: int, layer: int) -> UserError:
    advice = "the embedding has NaN: train again"
    if error.dtype in ("float16", "int8", "int4"):
        advice = "build with --dtype bfloat16"
    return UserError(f"FFN-M of token {token} in layer {layer} is not finite in {error.dtype}; {advice}")
