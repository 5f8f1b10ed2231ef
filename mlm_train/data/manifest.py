"""manifest.json of prepared data."""

import hashlib
import json
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mlm_train.utils.records import FileRecord, Record

UNSEALED = 1  # version of manifests without their own checksum


class TokenizerRecord(Record):
    """The copy of the tokenizer in the folder."""

    file: str
    sha256: str
    kind: Literal["sentencepiece", "huggingface"]


class SplitRecord(Record):
    """One split. tokens includes end-of-document ids; text_bytes counts UTF-8 bytes."""

    documents: PositiveInt
    tokens: PositiveInt
    characters: PositiveInt
    text_bytes: PositiveInt
    bin: FileRecord
    idx: FileRecord


class DataManifest(Record):
    """The contents of manifest.json, without its own checksum. fingerprint: see fingerprint_of."""

    format: Literal["mlm-data"] = "mlm-data"
    version: Literal[1, 2] = 2
    vocab_size: PositiveInt
    eod_id: NonNegativeInt
    bos_id: NonNegativeInt | None = None  # what every document begins with
    dtype: Literal["uint16", "int32"]
    documents_are: Literal["one .idx sequence each, ended by eod_id"] = (
        "one .idx sequence each, ended by eod_id"
    )
    tokenizer: TokenizerRecord
    splits: dict[str, SplitRecord] = Field(min_length=1)
    fingerprint: str


def fingerprint_of(tokenizer: TokenizerRecord, eod_id: int, splits: dict[str, SplitRecord]) -> str:
    """SHA-256 over everything that decides a sample: format, tokenizer, and the files' hashes."""
    parts = {
        "format": "mlm-data",
        "version": 1,
        "tokenizer": tokenizer.sha256,
        "eod_id": eod_id,
        "splits": {name: [split.bin.sha256, split.idx.sha256] for name, split in splits.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


AGAIN = "run `mlm-train data prepare` again into a new folder, or copy the folder again"
