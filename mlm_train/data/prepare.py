"""Turn text into the folder that training reads: tokenizer, `.bin` / `.idx` per split, manifest last."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

from mlm_train.data.documents import SPLITS, Document, Inputs, find_sources, listing
from mlm_train.data.encode import encode_in_order
from mlm_train.data.fraction import text_fraction
from mlm_train.data.manifest import DataManifest, SplitRecord, TokenizerRecord, fingerprint_of
from mlm_train.data.prepared import write_manifest
from mlm_train.data.tokenizer import Tokenizer, tokenizer_file, tokenizer_of
from mlm_train.data.tokenizer_backends import FILE_OF_KIND
from mlm_train.data.tokenizer_trial import try_tokenizer
from mlm_train.data.train_tokenizer import train_sentencepiece
from mlm_train.errors import UserError
from mlm_train.utils.files import new_folder, sha256_of
from mlm_train.utils.records import FileRecord

DEFAULT_VALIDATION_FRACTION = 0.02
BATCH_CHARACTERS = 1 << 18
Progress = Callable[[str, float, int | None], None]
"""Called with the stage, bytes of input processed since the last call, and bytes in total."""


def prepare(
    inputs: Sequence[str],
    output: Path,
    tokenizer: str,
    *,
    text_key: str = "text",
    validation: str | None = None,
    validation_fraction: float | None = None,
    workers: int = 1,
    eod: str | None = None,
    add_bos: bool = False,
    progress: Progress = lambda stage, done, total: None,
    on_left_out: Callable[[dict[str, str]], None] = lambda left_out: None,
) -> DataManifest:
    """Tokenize `inputs` into the folder `output` (layout: prepared.py) and return its manifest.

    inputs: files, folders or Hugging Face dataset names. tokenizer: a .model, a tokenizer.json, a
    folder that holds one, or train:VOCAB. Documents without a split of their own go to validation
    by a hash of their text. add_bos: each document begins with the tokenizer's bos_id. The output is the same
    for any number of workers. on_left_out is called at the end with the files of folders that were left out,
    and why. Raises UserError for bad input, and then leaves nothing behind.
    """
    fraction = _check_fraction(validation, validation_fraction)
    with new_folder(output) as partial:
        to_read = find_sources(inputs, text_key, validation)
        if validation_fraction is not None and all(source.split for source in to_read.sources):
            raise UserError("--validation-fraction has no effect: the input has its own split; leave it out")
        corpus = Corpus(to_read, fraction, progress)
        loaded, bos_id = _add_tokenizer(tokenizer, partial, corpus, eod, add_bos)
        manifest = _write_tokens(partial, corpus, loaded, workers, bos_id)
        write_manifest(partial, manifest)
    on_left_out(to_read.left_out)
    return manifest


def _check_fraction(validation: str | None, fraction: float | None) -> float:
    if fraction is None:
        return DEFAULT_VALIDATION_FRACTION
    if validation is not None:
        raise UserError("--validation and --validation-fraction cannot be combined; leave one out")
    if not 0 < fraction < 1:
        raise UserError(f"--validation-fraction {fraction}: must lie between 0 and 1")
    return fraction


@dataclass
class _Batch:
    """Documents, or chunks of long ones, that are encoded together; `ends`: whether a document ends here."""

    splits: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    size: float = 0.0


@dataclass(frozen=True)
class Corpus:
    """All documents with their splits; can be read several times."""

    inputs: Inputs
    fraction: float
    progress: Progress

    @property
    def size(self) -> int | None:
        """Bytes of the inputs; None where one of them is unknown."""
        sizes = [source.size for source in self.inputs.sources]
        return None if None in sizes else sum(size for size in sizes if size)

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Splits and documents in the order of the sources, without blank documents."""
        for source in self.inputs.sources:
            for document in source.read():
                if not document.text or document.text.isspace():
                    continue
                yield source.split or self._split_of(document.text), document

    def training_texts(self) -> Iterator[str]:
        """Texts of the train split."""
        for split, document in self.documents():
            self.progress("reading for the tokenizer", document.size, self.size)
            if split == "train":
                yield document.text

    def batches(self, chunks_of: Callable[[str], list[str]]) -> Iterator[_Batch]:
        """Documents in batches of about BATCH_CHARACTERS; the cuts depend on the documents alone."""
        batch, characters = _Batch(), 0
        for split, document in self.documents():
            chunks = chunks_of(document.text)
            for number, chunk in enumerate(chunks, start=1):
                batch.splits.append(split)
                batch.texts.append(chunk)
                batch.ends.append(number == len(chunks))
                batch.size += document.size / len(chunks)
                characters += len(chunk)
                if characters >= BATCH_CHARACTERS:
                    yield batch
                    batch, characters = _Batch(), 0
        if batch.texts:
            yield batch

    def _split_of(self, text: str) -> str:
        held_out = text_fraction(text.encode("utf-8"), b"validation") < self.fraction
        return "validation" if held_out else "train"


def _add_tokenizer(
    choice: str, folder: Path, corpus: Corpus, eod: str | None, add_bos: bool
) -> tuple[Tokenizer, int | None]:
    """Train the tokenizer or copy it into the folder. Returns it, loaded from there, and the bos_id."""
    if choice.startswith("train:"):
        size = choice.removeprefix("train:")
        if not size.isdecimal():
            raise UserError(f"--tokenizer {choice}: give a vocabulary size, such as train:8192")
        if add_bos:
            raise UserError(f"--add-bos: --tokenizer {choice} has no begin-of-text token; leave it out")
        path = folder / FILE_OF_KIND["sentencepiece"]
        path.write_bytes(train_sentencepiece(corpus.training_texts(), int(size), corpus.size))
        trained = Tokenizer.load(path, eod)
        trained.check_eod()
        return trained, None
    file = tokenizer_file(Path(choice)) if os.path.isdir(choice) else Path(choice)
    if file is not None and file.is_file():
        try_tokenizer(file)
    given = tokenizer_of(choice, eod) if os.path.isdir(choice) else Tokenizer.load(choice, eod)
    given.check_eod()
    bos_id = given.require_bos_id() if add_bos else None  # of the original: files beside it may declare it
    path = folder / FILE_OF_KIND[given.kind]
    shutil.copyfile(given.path, path)
    return Tokenizer.load(path, given.eod_id), bos_id


class _SplitWriter:
    """Writes one split's .bin and .idx with megatron-core's builder, and counts."""

    def __init__(
        self,
        folder: Path,
        name: str,
        storage: ModuleType,
        dtype: type[np.number],
        eod_id: int,
        bos_id: int | None,
    ) -> None:
        self._bin, self._idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self._builder = storage.IndexedDatasetBuilder(str(self._bin), dtype=dtype)
        self._bos = [] if bos_id is None else [np.array([bos_id])]
        self._eod = np.array([eod_id])
        self._chunks: list[np.ndarray] = []  # of the document that has not ended yet
        self.documents = self.tokens = self.characters = self.text_bytes = 0

    def add(self, text: str, ids: np.ndarray, ends: bool) -> None:
        """Append a chunk of a document; with `ends`, the end-of-document id and a boundary too.

        Raises UserError where the text itself produces that id, which would split the document.
        """
        if self._eod in ids:
            raise UserError(
                f"the text of a document ({text[:40]!r}...) produces the end-of-document id {self._eod[0]}; "
                "name another token with --eod, or use another tokenizer"
            )
        self._chunks.append(ids)
        self.characters += len(text)
        self.text_bytes += len(text.encode("utf-8"))
        if ends:
            document = np.concatenate([*self._bos, *self._chunks, self._eod])
            self._chunks = []
            self._builder.add_document(document, [len(document)])
            self.documents += 1
            self.tokens += len(document)

    def finish(self) -> SplitRecord:
        self._builder.finalize(str(self._idx))
        return SplitRecord(
            documents=self.documents,
            tokens=self.tokens,
            characters=self.characters,
            text_bytes=self.text_bytes,
            bin=_record_of(self._bin),
            idx=_record_of(self._idx),
        )


def _record_of(path: Path) -> FileRecord:
    return FileRecord(file=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def _write_tokens(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, workers: int, bos_id: int | None
) -> DataManifest:
    eod_id = tokenizer.eod_id
    storage = _megatron_storage()
    dtype = storage.DType.optimal_dtype(tokenizer.vocab_size)
    writers = {name: _SplitWriter(folder, name, storage, dtype, eod_id, bos_id) for name in SPLITS}
    for batch, encoded in encode_in_order(corpus.batches(tokenizer.chunks), tokenizer, workers):
        for split, text, ids, ends in zip(batch.splits, batch.texts, encoded, batch.ends, strict=True):
            writers[split].add(text, ids, ends)
        corpus.progress("tokenizing", batch.size, corpus.size)
    documents = sum(writer.documents for writer in writers.values())
    for name, writer in writers.items():
        if not writer.documents:
            files = f" ({listing(corpus.inputs.left_out)})" if corpus.inputs.left_out else ""
            raise UserError(
                f"none of the {documents} documents falls into the {name} split{files}; "
                "give more text, another --validation-fraction, or --validation PATH"
            )
    splits = {name: writer.finish() for name, writer in writers.items()}
    record = TokenizerRecord(file=tokenizer.path.name, sha256=tokenizer.sha256, kind=tokenizer.kind)
    return DataManifest(
        vocab_size=tokenizer.vocab_size,
        eod_id=eod_id,
        bos_id=bos_id,
        dtype=dtype.__name__,
        tokenizer=record,
        splits=splits,
        fingerprint=fingerprint_of(record, eod_id, splits),
    )


def _megatron_storage() -> ModuleType:
    """megatron-core's indexed dataset, imported without its warnings about GPU libraries not needed here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
