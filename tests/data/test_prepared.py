import json
import shutil

import numpy as np
import pytest

from mlm_train.data.prepared import INDEX_HEADER, PreparedData
from mlm_train.errors import UserError


@pytest.fixture
def folder(prepared: PreparedData, tmp_path):
    return shutil.copytree(prepared.path, tmp_path / "copy")


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        PreparedData.open(folder)
    assert "\n" not in str(error.value)


def test_streams(prepared: PreparedData):
    stream = prepared.split("train")
    record = prepared.manifest.splits["train"]
    assert len(stream) == len(stream.tokens) == record.tokens
    offsets = stream.document_offsets
    assert (offsets[0], offsets[-1], len(offsets)) == (0, len(stream), record.documents + 1)
    assert np.all(stream.tokens[offsets[1:] - 1] == prepared.eod_id)
    assert not stream.tokens.flags.writeable
    with pytest.raises(UserError, match="no split 'test', only train, validation"):
        prepared.split("test")


def test_index_header_is_megatrons(prepared: PreparedData):
    header = np.fromfile(prepared.path / "train.idx", dtype=INDEX_HEADER, count=1)[0]
    assert (header["magic"], header["version"]) == (b"MMIDIDX", 1)
    assert header["sequences"] == prepared.manifest.splits["train"].documents


def test_fingerprint_follows_the_contents(prepared: PreparedData, folder):
    assert PreparedData.open(folder).fingerprint == prepared.fingerprint
    PreparedData.open(folder).verify()


def test_truncated_bin(folder):
    path = folder / "train.bin"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 2)
    refused(folder, rf"train.bin has {size - 2} bytes instead of {size}; run `mlm-train data prepare` again")


@pytest.mark.parametrize("name", ["train.idx", "validation.bin", "tokenizer.model", "manifest.json"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name}.* is missing")


def test_changed_tokenizer(folder):
    with (folder / "tokenizer.model").open("ab") as file:
        file.write(b"x")
    refused(folder, "tokenizer.model was changed")


def test_changed_token_is_found_by_verify(folder):
    with (folder / "validation.bin").open("r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(UserError, match=r"validation.bin was changed"):
        PreparedData.open(folder).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "manifest.json: format"),
        ({"version": 2}, "manifest.json: version"),
        ({"vocab_size": "many"}, "manifest.json: vocab_size"),
        ({"eod_id": 5}, "its fingerprint does not match"),
    ],
)
def test_bad_manifest(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(folder, message)


def test_no_manifest_at_all(folder, tmp_path):
    (folder / "manifest.json").write_text("{")
    refused(folder, "manifest.json cannot be read")
    refused(tmp_path / "absent", "holds no prepared data")
