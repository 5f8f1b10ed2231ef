"""Checks of prepared data against their manifest: the cheap ones on opening, all of them with --verify."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlm_train.data.manifest import AGAIN, DataManifest, SplitRecord
from mlm_train.data.token_stream import DTYPE_CODES, INDEX_HEADER, TokenStream
from mlm_train.data.tokenizer import Tokenizer
from mlm_train.errors import UserError

CHUNK_TOKENS = 1 << 24  # read at once


def check_sizes(manifest_path: Path, name: str, record: SplitRecord, dtype: str) -> None:
    """Raise UserError where a split's counts do not fit its files' sizes or the header of its .idx."""
    where, index = f"{manifest_path}: splits.{name}", manifest_path.parent / record.idx.file
    size = np.dtype(dtype).itemsize
    if record.tokens * size != record.bin.bytes:
        raise UserError(
            f"{where}.tokens={record.tokens} of dtype={dtype} do not fit the {record.bin.bytes} bytes of "
            f"{record.bin.file}; {AGAIN}"
        )
    documents = record.documents
    if INDEX_HEADER.itemsize + 12 * documents + 8 * (documents + 1) != record.idx.bytes:
        raise UserError(
            f"{where}.documents={documents} do not fit the {record.idx.bytes} bytes of {index}; {AGAIN}"
        )
    header = np.fromfile(index, dtype=INDEX_HEADER, count=1)[0]
    if (header["magic"], header["version"]) != (b"MMIDIDX", 1):
        raise UserError(f"{index} is not a Megatron .idx file of version 1; {AGAIN}")
    if header["dtype"] != DTYPE_CODES[dtype]:
        raise UserError(f"{manifest_path}: dtype={dtype} differs from that of {index}; {AGAIN}")
    if (header["sequences"], header["documents"]) != (documents, documents + 1):
        raise UserError(f"{where}.documents={documents}, but {index} has {header['sequences']}; {AGAIN}")


def check_tokenizer(folder: Path, manifest_path: Path, manifest: DataManifest) -> None:
    """Raise UserError where the manifest's description of the tokenizer does not match its file."""
    tokenizer = Tokenizer.load(folder / manifest.tokenizer.file, manifest.eod_id)
    for name, recorded, actual in (
        ("vocab_size", manifest.vocab_size, tokenizer.vocab_size),
        ("tokenizer.kind", manifest.tokenizer.kind, tokenizer.kind),
    ):
        if recorded != actual:
            raise UserError(f"{manifest_path}: {name}={recorded}, but {tokenizer.path} has {actual}; {AGAIN}")


def check_documents(stream: TokenStream, vocab_size: int, eod_id: int, bos_id: int | None) -> None:
    """Read a split and check that each of its documents ends with eod_id, which occurs nowhere else.

    bos_id: what each document begins with, if anything. Raises UserError.
    """
    record, itemsize = stream.record, np.dtype(stream.dtype).itemsize
    lengths, offsets = np.diff(stream.document_offsets), stream.document_offsets
    start = INDEX_HEADER.itemsize + lengths.size * 4
    pointers = np.fromfile(stream.idx_path, dtype="<i8", offset=start)
    expected = np.concatenate([offsets[:-1] * itemsize, np.arange(lengths.size + 1)])
    if lengths.min() < 1 or offsets[-1] != record.tokens or not np.array_equal(pointers, expected):
        raise UserError(f"{stream.idx_path} does not divide {record.tokens} tokens into documents; {AGAIN}")
    ends = 0
    for ids in _chunks(stream.tokens):
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise UserError(f"{stream.bin_path} holds id {bad}, but vocab_size is {vocab_size}; {AGAIN}")
        ends += int(np.count_nonzero(ids == eod_id))
    if ends != record.documents or not np.all(stream.tokens[offsets[1:] - 1] == eod_id):
        raise UserError(
            f"{stream.bin_path}: id {eod_id} does not end each of its {record.documents} documents, or also "
            f"occurs elsewhere; {AGAIN}"
        )
    if bos_id is not None and not np.all(stream.tokens[offsets[:-1]] == bos_id):
        raise UserError(f"{stream.bin_path} has documents that do not begin with id {bos_id}; {AGAIN}")


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), CHUNK_TOKENS):
        yield tokens[start : start + CHUNK_TOKENS]
