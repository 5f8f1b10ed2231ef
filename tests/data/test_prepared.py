import json
import shutil

import numpy as np
import pytest

from mlm_train.data.manifest import DataManifest, SplitRecord, fingerprint_of
from mlm_train.data.prepared import PreparedData
from mlm_train.data.token_stream import INDEX_HEADER
from mlm_train.errors import UserError
from mlm_train.utils.files import sha256_of, write_json
from mlm_train.utils.records import SEAL, seal_of


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


def rewrite(folder, change, sealed=True, version=None):
    """Change manifest fields, given as dotted paths; with a new checksum, or without one as in version 1."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    seal = tree.pop(SEAL)
    assert seal == seal_of(tree)
    if version is not None:
        tree["version"] = version
    for name, value in change.items():
        *parents, last = name.split(".")
        inner = tree
        for parent in parents:
            inner = inner[parent]
        inner[last] = value(inner[last]) if callable(value) else value
    write_json(path, tree | ({SEAL: seal_of(tree)} if sealed else {}))


def before_seals(folder, change=None):
    rewrite(folder, change or {}, sealed=False, version=1)


CHANGED = {  # field -> a value that is wrong
    "splits.train.tokens": [lambda n: n // 10, lambda n: n * 10, 0, -1, 2**63],
    "splits.validation.documents": [3, lambda n: n - 1, 0, 2**62],
    "vocab_size": [4096, 699, 2**40, 0],
    "eod_id": [5, 700, -1],
    "dtype": ["int32"],
    "splits.train.bin.bytes": [lambda n: n - 2],
    "splits.train.idx.bytes": [lambda n: n + 20],
    "tokenizer.kind": ["huggingface"],
}


@pytest.mark.parametrize("field", [*CHANGED, "splits.train.text_bytes", "splits.train.characters"])
def test_a_changed_number_is_damage(folder, field):
    path = folder / "manifest.json"
    whole = path.read_text()
    for value in CHANGED.get(field, [17]):
        tree = json.loads(whole)
        seal = tree[SEAL]
        rewrite(folder, {field: value})
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(tree | {SEAL: seal}))
        refused(folder, r"manifest\.json")
        path.write_text(json.dumps({name: each for name, each in tree.items() if name != SEAL}))
        refused(folder, r"manifest\.json")
        path.write_text(whole)


@pytest.mark.parametrize("field", CHANGED)
def test_numbers_fit_the_files_whatever_the_seal(folder, field):
    """Manifests without a checksum are read, and wrong numbers are found even under a correct checksum."""
    path = folder / "manifest.json"
    whole = path.read_text()
    before_seals(folder)
    old = PreparedData.open(folder)
    old.verify()
    assert old.fingerprint == json.loads(whole)["fingerprint"]
    for value in CHANGED[field]:
        path.write_text(whole)
        before_seals(folder, {field: value})
        refused(folder, "fingerprint|eod_id" if field == "eod_id" else field.split(".")[-1])
        path.write_text(whole)
        rewrite(folder, {field: value})
        with pytest.raises(UserError, match=r"manifest\.json|train\.(bin|idx)") as error:
            PreparedData.open(folder).verify()
        assert "\n" not in str(error.value)


def test_verify_reads_the_index_and_the_ids(prepared, folder):
    """Wrong contents under correct checksums and sizes."""
    stream = prepared.split("train")
    tokens, offsets = stream.tokens.copy(), stream.document_offsets
    index = (folder / "train.idx").read_bytes()
    lengths = INDEX_HEADER.itemsize
    pointers = lengths + 4 * stream.record.documents

    def with_ids(place, value):
        ids = tokens.copy()
        ids[place] = value
        return ids.tobytes()

    cases = [
        ("train.bin", with_ids(5, 60_000)),  # an id that the tokenizer has not
        ("train.bin", with_ids(offsets[1] - 1, 4)),  # a document that does not end
        ("train.bin", with_ids(offsets[1] + 1, prepared.eod_id)),  # one that ends twice
        ("train.idx", index[:lengths] + b"\1\0\0\0" + index[lengths + 4 :]),
        ("train.idx", index[:pointers] + b"\1" + index[pointers + 1 :]),
        ("train.idx", index[:-8] + bytes(8)),
    ]
    for name, data in cases:
        before = (folder / name).read_bytes(), (folder / "manifest.json").read_text()
        (folder / name).write_bytes(data)
        rewrite(folder, {f"splits.train.{name[-3:]}.sha256": sha256_of(folder / name)})
        manifest = DataManifest.model_validate(
            {key: value for key, value in json.loads(before[1]).items() if key != SEAL}
        )
        tree = json.loads((folder / "manifest.json").read_text())
        splits = {key: SplitRecord.model_validate(value) for key, value in tree["splits"].items()}
        rewrite(folder, {"fingerprint": fingerprint_of(manifest.tokenizer, manifest.eod_id, splits)})
        data = PreparedData.open(folder)
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
            data.verify()
        assert "\n" not in str(error.value)
        (folder / name).write_bytes(before[0])
        (folder / "manifest.json").write_text(before[1])
    PreparedData.open(folder).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "manifest.json: format"),
        ({"version": 3}, "manifest.json: version"),
        ({"vocab_size": "many"}, "manifest.json: vocab_size"),
        ({"eod_id": 5}, "its fingerprint does not match"),
        ({"splits": [1]}, "manifest.json: splits"),
        ({"splits": {}}, "manifest.json"),
    ],
)
def test_bad_manifest(folder, change, message):
    rewrite(folder, change)
    refused(folder, message)


def test_no_manifest_at_all(folder, tmp_path):
    (folder / "manifest.json").write_text("{")
    refused(folder, r"manifest\.json")
    (folder / "manifest.json").write_text("[1]")
    refused(folder, r"manifest\.json")
    refused(tmp_path / "absent", "holds no prepared data")
