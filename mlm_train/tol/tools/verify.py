"""Verifying a ToL: its files against the index, and its rows against FFN-M."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mlm_train.checkpoint.hf.folder import FolderTensors
from mlm_train.checkpoint.reading.logical_folder import open_model
from mlm_train.errors import UserError
from mlm_train.tol.build.row_source import EMBEDDING, ComputedRows, chunks_of, ffn_m_weights
from mlm_train.tol.format.codec import TORCH_DTYPE, decode, encode, grouped
from mlm_train.tol.format.index import X0, Partition, TableFile, TolIndex, check_fits
from mlm_train.tol.format.index_file import index_at, is_intact, read_index
from mlm_train.tol.format.partition import map_partition
from mlm_train.tol.format.schemes import Encoding, layout
from mlm_train.tol.serve.reader import TableReader, read_bases
from mlm_train.tol.storage.base import Storage
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.tol.storage.resolve import storage_at
from mlm_train.utils.files import sha256_of
from mlm_train.utils.progress import ByteProgress
from mlm_train.utils.urls import is_url

CHUNK_ROWS = 512
# Tolerance relative to a row's largest value: other thread counts and chunk sizes sum in another order, and
# a matmul's output that rounds differently is the next one's input.
_NOISE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Damage:
    """Damaged rows [start, stop) of a file."""

    file: str
    start: int
    stop: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}: rows [{self.start}, {self.stop}): {self.what}"


@dataclass
class VerifyReport:
    """The result of verify_tol, with errors of recomputed rows.

    max_rel_error: relative to a row's largest value.
    """

    index: TolIndex
    recomputed: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    damages: list[Damage] = field(default_factory=list)

    @property
    def fix(self) -> str:
        """How to repair the table."""
        if self.index.basis is not None and self.index.basis.file in {damage.file for damage in self.damages}:
            return "build it again into a new folder, since no row can be rebuilt without the basis"
        return f"repair it with {self.index.repair}"


class _Recompute:
    """Compares rows with FFN-M; `sample`: ascending ids to compare, None for every row."""

    def __init__(
        self, tensors: FolderTensors, computed: ComputedRows, table: TableReader, sample: Tensor | None
    ) -> None:
        self.tensors, self.computed, self.table, self.sample = tensors, computed, table, sample

    def ids(self, first: int, last: int) -> Tensor:
        """The ids of [first, last) to compare."""
        if self.sample is None:
            return torch.arange(first, last)
        return self.sample[(self.sample >= first) & (self.sample < last)]

    def compare(self, rows: Tensor, first: int, last: int, report: VerifyReport) -> Tensor:
        """Compare stored rows [first, last) with FFN-M; return the ids of rows that differ too much."""
        ids = self.ids(first, last)
        if not ids.numel():
            return ids
        x0 = self.tensors.rows(EMBEDDING, first, last)[ids - first].float()
        rows, bad = rows[ids - first], torch.zeros(len(ids), dtype=torch.bool)
        index = self.table.index
        for layer, encoding, values in zip(index.layers, index.fields, self.computed.of(x0), strict=True):
            true = values.float()
            stored = self.table.values(rows, layer)
            assert stored is not None
            error, scale = (stored.float() - true).abs(), true.abs().amax(-1, keepdim=True)
            finite = error.where(error.isfinite(), 0.0)
            report.max_abs_error = max(report.max_abs_error, float(finite.max()))
            report.max_rel_error = max(report.max_rel_error, float((finite / scale.clamp_min(1e-30)).max()))
            bad |= ~self._is_near(encoding, decode(encoding, rows, index.hidden_size).float(), true, layer)
        report.recomputed += ids.numel()
        return ids[bad]

    def other_embeddings(self, rows: Tensor, first: int, last: int) -> Tensor:
        """The ids of stored rows [first, last) whose embeddings are not exactly the model's."""
        ids = self.ids(first, last)
        stored = self.table.values(rows[ids - first], X0)
        if stored is None:
            return ids[:0]
        x0 = self.computed.embedding(first, last)[ids - first].to(stored.dtype)
        return ids[(stored != x0).any(1)]

    def _is_near(self, field: Encoding, stored: Tensor, true: Tensor, layer: int) -> Tensor:
        """Which rows equal FFN-M's values in their type, up to rounding and summation order: bool [n]."""
        source = self.table.index.source
        noise = _NOISE[source.compute if source.table is None else "bfloat16"]
        if field.rank is not None:
            true = self.table.in_basis(true, layer)
        tolerance = noise * true.abs().amax(-1, keepdim=True)
        error = (stored - true).abs()
        if not field.quantised:
            info = torch.finfo(TORCH_DTYPE[field.dtype])
            # Rounding is at most half an eps; values below the smallest normal one keep fewer digits.
            limit = 0.505 * info.eps * true.abs() + tolerance + info.smallest_normal * info.eps
            return (error <= limit).all(1)
        # A group's error may be that of encoding it again, whichever codes the noise has chosen.
        assert field.group_size is not None
        hidden = self.table.index.hidden_size
        (encoding,) = layout([field], hidden)
        encoded = torch.empty(len(true), field.bytes(hidden), dtype=torch.uint8)
        encode(field, true, encoded)
        expected = decode(encoding, encoded, hidden) - true
        actual, allowed = (grouped(x, field.group_size).norm(dim=-1) for x in (error, expected))
        return (actual <= 1.05 * allowed + tolerance * field.group_size**0.5).all(1)


def verify_tol(
    folder: str | Path, model: str | Path | None = None, sample: int | None = None, seed: int = 0
) -> VerifyReport:
    """Check coverage, sizes, SHA-256 and finite values, and with `model` recompute rows from its weights.

    `folder` may be a URL if there is no `model`: everything is read, nothing is kept. `sample`: recompute
    that many rows, drawn with `seed`, instead of all. Damage is reported, not raised; raises UserError for
    an unreadable index and for a model that the table was not built from.
    """
    if is_url(folder):
        return _verify_url(storage_at(folder), model, sample)
    index = read_index(folder)
    folder, report = Path(folder), VerifyReport(index)
    if sample is not None and sample < 1:
        raise UserError(f"--sample {sample}: give at least 1 row")
    if sample is not None and model is None:
        raise UserError(f"--sample {sample} recomputes rows: give --model too, or leave it out")
    if model is None:
        _check_basis(LocalFolder(folder), report)
        _check_partitions(folder, report, None)
        return report
    opened = open_model(model)
    check_fits(folder, index, opened.config)
    if opened.fingerprint != index.source.checkpoint:
        raise UserError(f"{folder} was built from another model than {model}; give the one it was built from")
    chosen = None
    if sample is not None and sample < index.vocab_size:
        order = torch.randperm(index.vocab_size, generator=torch.Generator().manual_seed(seed))
        chosen = order[:sample].sort().values
    with opened:
        weights = ffn_m_weights(opened.tensors, opened.config, index.layers, index.source.compute)
        by_layer = dict(zip(index.layers, weights, strict=True))
        computed = ComputedRows(opened, by_layer, index.source.compute)
        recompute = None  # rows of low rank cannot be decoded without the basis
        if _check_basis(LocalFolder(folder), report):
            table = TableReader(index, [], read_bases(folder, index))
            recompute = _Recompute(opened.tensors, computed, table, chosen)
        _check_partitions(folder, report, recompute)
    return report


def _verify_url(storage: Storage, model: str | Path | None, sample: int | None) -> VerifyReport:
    """Check every file's size and SHA-256; a build writes only finite values."""
    if model is not None or sample is not None:
        option = "--sample" if model is None else "--model"
        raise UserError(
            f"{option} compares rows of a folder: mlm-train tol fetch {storage} FOLDER, and verify that"
        )
    report = VerifyReport(index_at(storage))
    _check_basis(storage, report)
    done = 0
    with ByteProgress("verify", report.index.bytes) as progress:
        for partition in report.index.partitions:
            _check_file(storage, partition, partition.rows, report)
            progress.show(done := done + partition.bytes)
    return report


def _check_basis(storage: Storage, report: VerifyReport) -> bool:
    """Whether the basis is intact, or there is none; a damaged one is reported as damage of all rows."""
    basis = report.index.basis
    return basis is None or _check_file(storage, basis, (0, report.index.vocab_size), report)


def _check_file(storage: Storage, file: TableFile, rows: tuple[int, int], report: VerifyReport) -> bool:
    intact = is_intact(storage, file)
    if not intact:
        what = "the file is missing, or its size or SHA-256 differs from the index"
        report.damages.append(Damage(file.file, *rows, what))
    return intact


def _check_partitions(folder: Path, report: VerifyReport, recompute: _Recompute | None) -> None:
    done = 0
    with ByteProgress("verify", sum(partition.bytes for partition in report.index.partitions)) as progress:
        for partition in report.index.partitions:
            for row in _check_partition(folder, report, partition, recompute):
                progress.show(done + (row - partition.rows[0]) * report.index.row_bytes)
            done += partition.bytes


def _check_partition(
    folder: Path, report: VerifyReport, partition: Partition, recompute: _Recompute | None
) -> Iterator[int]:
    """Add a partition's damage to the report; yields the row reached, for the progress bar."""
    start, stop = partition.rows
    try:
        rows = map_partition(folder, report.index, partition)
    except ValueError as error:
        report.damages.append(Damage(partition.file, start, stop, str(error)))
        return
    if sha256_of(folder / partition.file) != partition.sha256:
        what = "the file's SHA-256 differs from the index"
        report.damages.append(Damage(partition.file, start, stop, what))
    non_finite, different, unlike = [], [], []
    for first, last in chunks_of(start, stop, CHUNK_ROWS):
        chunk = rows[first - start : last - start]
        stored = report.index.stored.values()
        decoded = [decode(field, chunk, report.index.hidden_size) for field in stored]
        bad = torch.stack([(~values.isfinite()).any(1) for values in decoded]).any(0)
        non_finite.append(first + bad.nonzero().flatten())
        if recompute is not None:
            different.append(recompute.compare(chunk, first, last, report))
            unlike.append(recompute.other_embeddings(chunk, first, last))
        yield last
    for tokens, what in (
        (non_finite, "non-finite values"),
        (different, "values are not FFN-M's"),
        (unlike, "embeddings are not the model's"),
    ):
        report.damages += [Damage(partition.file, *span, what) for span in _spans(tokens)]


def _spans(tokens: list[Tensor]) -> list[tuple[int, int]]:
    """Merge ascending token ids into ranges [start, stop)."""
    spans: list[tuple[int, int]] = []
    for token in [int(token) for chunk in tokens for token in chunk]:
        if spans and spans[-1][1] == token:
            spans[-1] = (spans[-1][0], token + 1)
        else:
            spans.append((token, token + 1))
    return spans
