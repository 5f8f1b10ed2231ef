import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlm_train.data.documents import find_sources
from mlm_train.errors import UserError

TEXTS = ["first\r\ntext\t😀", "second\u2028text", "third"]


def read(*inputs, text_key="text", validation=None):
    found = find_sources([str(name) for name in inputs], text_key, validation)
    return [(source.split, document.text) for source in found.sources for document in source.read()]


def json_lines(key="text"):
    return "".join(
        json.dumps({key: text, "other": i}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS)
    )


def test_every_kind_of_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines() + "\n  \n", encoding="utf-8", newline="")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8", newline="") as file:
        file.write(json_lines())
    pq.write_table(pa.table({"text": TEXTS, "other": [1, 2, 3]}), tmp_path / "c.parquet", row_group_size=2)
    (tmp_path / "d.txt").write_bytes(TEXTS[0].encode())
    (tmp_path / "unknown_suffix").write_bytes(TEXTS[0].encode())
    expected = [(None, text) for text in TEXTS]
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert read(tmp_path / name) == expected
    assert read(tmp_path / "unknown_suffix") == read(tmp_path / "d.txt") == expected[:1]
    assert read(tmp_path) == expected * 3 + expected[:1] * 2  # sorted by name
    for source in find_sources([str(tmp_path)], "text").sources:
        assert sum(document.size for document in source.read()) <= source.size + 1e-6


def test_folders_are_sorted_by_relative_path(tmp_path):
    for name in ("b/2.txt", "a/9.md", "b/1.py", "c.rst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [text for _, text in read(tmp_path)] == ["a/9.md", "b/1.py", "b/2.txt", "c.rst"]


def test_splits(tmp_path, corpus):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "held.txt").write_text("held")
    one, held = tmp_path / "one.txt", tmp_path / "held.txt"
    assert read(one, validation=str(held)) == [("train", "one"), ("validation", "held")]
    assert {split for split, _ in read(corpus)} == {"train", "validation"}
    of_folder = read(one, validation=str(corpus))  # its validation.jsonl only
    lines = (corpus / "validation.jsonl").read_text(encoding="utf-8").count("\n")
    assert [split for split, _ in of_folder] == ["train"] + ["validation"] * lines
    with pytest.raises(UserError, match="own split; leave it out"):
        read(corpus, validation=str(held))


def test_hugging_face_datasets(tmp_path, monkeypatch):
    (tmp_path / "some.jsonl").write_text(json_lines(), encoding="utf-8")
    load_dataset, asked = datasets.load_dataset, []

    def load_from_disk(name, configuration, split):
        asked.append((name, configuration, split))
        return load_dataset(
            "json",
            data_files={split: str(tmp_path / "some.jsonl")},
            split=split,
            cache_dir=str(tmp_path / "cache"),
        )

    monkeypatch.setattr(datasets, "load_dataset", load_from_disk)
    found = read("org/name:small", validation="org/name")
    assert found == [(split, text) for split in ("train", "validation") for text in TEXTS]
    assert asked == [("org/name", "small", "train"), ("org/name", None, "validation")]
    with pytest.raises(UserError, match=r"no column 'body' \(columns: text, other\); set --text-key"):
        read("org/name", text_key="body")


def test_a_dataset_that_cannot_be_loaded():
    with pytest.raises(UserError, match=r"input no-such/dataset is neither .* check the name") as error:
        read("no-such/dataset")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a.jsonl:2 is not a JSON object"),
        ("a.jsonl", b'\n{"body": "x", "id": 1}\n', r"a.jsonl:2 has no text under 'text' \(keys: body, id\)"),
        ("a.jsonl", b'{"text": 5}\n', r"a.jsonl:1 has no text under 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1 holds half a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"text": "x", "b": ' + b"[" * 990 + b"]" * 990 + b"}", r"a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"c": 1, "a\\nb": 2}', r"a.jsonl:2 has no text"),
        ("a.jsonl.gz", b"not gzip", r"a.jsonl.gz:1 is not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], r"a.jsonl.gz cannot be read"),
        ("a.parquet", b"not parquet", r"a.parquet is not Parquet"),
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 \(byte 3\)"),
    ],
)
def test_bad_files(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_parquet_without_text(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text' \(columns: body\); set --text-key"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet row 2 has no text"):
        read(tmp_path / "a.parquet")


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match=r"missing.jsonl does not exist; give a file"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=r"missing.txt does not exist"):
        read("missing.txt")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no text .*picture\.png"):
        read(tmp_path)
