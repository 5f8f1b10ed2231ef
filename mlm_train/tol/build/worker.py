"""A Ray actor of a build: computes a range of rows for a group of layers and puts it into a partition."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

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
from mlm_train.tol.format.schemes import layout
from mlm_train.tol.lowrank.ranks import RankErrors, Sample
from mlm_train.tol.lowrank.spectrum import Gram, Spectrum
from mlm_train.tol.serve.reader import bases_at, projector
from mlm_train.tol.storage.base import StorageReader, put
from mlm_train.tol.storage.direct_io import Stream, buffers
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.tol.storage.resolve import reader_at
from mlm_train.utils.malloc import keep_freed

Sums = list[tuple[float, float]]  # a layer: squared error and squared norm of its numbers


class FilledRows(NamedTuple):
    """What came of filling some layers of a draft; with all of them, it is the partition."""

    sums: Sums
    partition: Partition | None = None


@dataclass(frozen=True)
class WorkerJob:
    """What every worker of a build knows.

    model: the folder with FFN-M; table: one to take the rows from; output: the folder or URL to write to.
    """

    model: str | None
    table: str | None
    output: str
    plan: BuildPlan
    device: str = "cpu"


def prepare_process(threads: int) -> None:
    """Set torch up for a worker; before its first tensor."""
    # What a chunk needs is the next one's too: asked for again, page by page, it is a fifth of its time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed(every_size=True)
    torch.set_num_threads(threads)


class BuildWorker:
    """Runs in a process of its own; holds the layers of one group at a time.

    `weights`, references of each layer of a group, are of an object that a node's processes share.
    """

    def __init__(self, job: WorkerJob) -> None:
        prepare_process(job.plan.threads)
        self.job = job
        self._layers: tuple[int, ...] = ()
        self._numbers: RowSource | None = None
        self._room: list[Tensor] = []
        self._basis: tuple[TableFile, tuple[int, ...], dict[int, Tensor]] | None = None

    def ready(self) -> None:
        """Returns once the worker runs, and has read what every piece needs."""
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
        """The same where it is one: only there a file is filled group by group."""
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
        """Write these layers of a partition into its draft, which the builder has begun.

        `basis`: the file with the bases of low-rank layers.
        """
        plan = self.job.plan
        start, stop = plan.rows(number)
        chunks = chunks_of(start, stop, plan.chunk_rows)
        encoder = _Encoder(layout, layers, self._bases(basis, layout, layers))
        numbers = self._open(tuple(layers), weights)
        if list(layers) == layout.layers:
            header, room = layout.shape.header(stop - start), self._buffers(encoder.bytes)
            with Stream(self._storage.sink(draft, header), header, room) as stream:
                for first, last in chunks:
                    encoder.encode(numbers, first, last, stream.rows(last - first))
                    stream.put(last - first)
                digest = stream.finish()
            whole = Partition(file=plan.file(number), rows=(start, stop), bytes=stream.bytes, sha256=digest)
            return FilledRows(encoder.sums, whole)
        with Draft(self._folder / draft, layout.shape, stop - start) as file:
            for first, last in chunks:
                out = torch.empty(last - first, encoder.bytes, dtype=torch.uint8)
                encoder.encode(numbers, first, last, out)
                file.write(first - start, encoder.edges[0], out)
            file.sync()
        return FilledRows(encoder.sums)

    def _bases(self, basis: TableFile | None, layout: Layout, layers: Sequence[int]) -> dict[int, Tensor]:
        """Those of these layers that have one; kept while the worker fills the same layers."""
        ranks = dict(zip(layout.layers, layout.schemes, strict=True))
        cut = tuple(layer for layer in layers if ranks[layer].rank is not None)
        if basis is None or not cut:
            return {}
        if self._basis is None or self._basis[:2] != (basis, cut):
            self._basis = (basis, cut, bases_at(self._storage, basis, cut))
        return self._basis[2]

    def _buffers(self, row_bytes: int) -> list[Tensor]:
        """For a chunk's rows; kept, since new memory costs a system time."""
        if not self._room or self._room[0].shape[1] != row_bytes:
            self._room = []
            self._room = buffers(self.job.plan.chunk_rows, row_bytes)
        return self._room

    def spectrum(self, layer: int, weights: list[Any], draft: str) -> TableFile:
        """Write the spectrum of a layer, over the whole vocabulary, into its draft; what that is.

        Where there is a budget, also what every way to store the layer loses.
        """
        plan, numbers = self.job.plan, self._open((layer,), weights)
        gram, sample = Gram(plan.hidden_size), Sample(plan.vocab_size, plan.hidden_size)
        for first, last in chunks_of(0, plan.vocab_size, plan.chunk_rows):
            for values in numbers.values(first, last):
                gram.add(values)
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
        """The partition that a draft is which several workers have filled; the builder gives it its name."""
        plan = self.job.plan
        return hash_draft(self._folder / draft, plan.file(number), plan.rows(number))

    def _open(self, layers: tuple[int, ...], weights: list[Any]) -> RowSource:
        """The numbers of these layers; the group before is let go."""
        if layers == self._layers and self._numbers is not None:
            return self._numbers
        import ray

        self._numbers = None
        job = self.job
        if job.table is not None:
            self._numbers = StoredRows(job.table, layers)
        else:
            shared = {layer: from_numpy(one) for layer, one in zip(layers, ray.get(weights), strict=True)}
            self._numbers = ComputedRows(self._model, shared, job.plan.compute, job.device)
        self._layers = layers
        return self._numbers


class _Encoder:
    """Turns numbers of some neighbouring layers into their bytes of rows, and measures what that loses."""

    def __init__(self, layout: Layout, layers: Sequence[int], bases: dict[int, Tensor]) -> None:
        first = layout.layers.index(layers[0])
        span = slice(first, first + len(layers))
        assert layout.layers[span] == list(layers)
        self.layers, self.hidden = layers, layout.hidden_size
        self.schemes = layout.schemes[span]
        self.edges = layout.edges[first : first + len(layers) + 1]
        self.bases = bases
        self.bytes = self.edges[-1] - self.edges[0]
        self.sums: Sums = [(0.0, 0.0)] * len(layers)

    def encode(self, numbers: RowSource, first: int, last: int, out: Tensor) -> None:
        """Rows [first, last) into `out`: uint8 [n, bytes of these layers]."""
        edges = [edge - self.edges[0] for edge in self.edges]
        for position, values in enumerate(numbers.values(first, last)):
            self._encode(position, values, out[:, edges[position] : edges[position + 1]], first)

    def _encode(self, position: int, values: Tensor, out: Tensor, first: int) -> None:
        scheme, layer = self.schemes[position], self.layers[position]
        basis = self.bases.get(layer)
        kept = values if basis is None else values.float() @ projector(basis)
        try:
            encode(scheme, kept, out)
        except NotFinite as found:
            raise _not_finite(found, first + found.row, layer) from None
        if basis is None and not scheme.quantised:
            return  # rounding, whose error is known
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
