import json
import os

import pytest

from mlm_train.data.collect import collect, standard_library
from mlm_train.errors import UserError


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for number in range(60):
        path = folder / f"package{number % 7}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"x = {number}\r\n\ty = '😀'\n".encode())
    (folder / "copy.txt").write_bytes((folder / "package0" / "file0.py").read_bytes())
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "blank.md").write_text(" \n\t\n")
    (folder / "picture.png").write_bytes(b"not text")
    for hidden in ("site-packages", ".git", "__pycache__"):
        (folder / hidden).mkdir()
        (folder / hidden / "other.py").write_text("not collected")
    return folder


def lines(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]


def test_counts_and_contents(source, tmp_path):
    report = collect(tmp_path / "out", [source], validation_fraction=0.2)
    assert report == json.loads((tmp_path / "out" / "collection.json").read_text())
    assert (report["documents"], report["duplicates"]) == (60, 1)
    assert report["skipped"] == {"not_utf8": 1, "empty": 1, "unreadable": 0}
    train, validation = lines(tmp_path / "out", "train"), lines(tmp_path / "out", "validation")
    assert len(train) == report["splits"]["train"]["documents"]
    assert len(train) + len(validation) == 60
    assert 2 <= len(validation) <= 30
    for record in train + validation:
        assert record["text"].encode() == (source / record["path"]).read_bytes()
    assert report["bytes"] == sum(len(record["text"].encode()) for record in train + validation)
    assert sum(count["documents"] for count in report["extensions"].values()) == 60


def test_independent_of_the_order_of_files(source, tmp_path, monkeypatch):
    collect(tmp_path / "one", [source], validation_fraction=0.2)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top: ((p, d, f[::-1]) for p, d, f in walk(top)))
    collect(tmp_path / "two", [source], validation_fraction=0.2)
    for name in ("train.jsonl", "validation.jsonl", "collection.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_cap_takes_documents_from_everywhere(source, tmp_path):
    whole = collect(tmp_path / "whole", [source], validation_fraction=0.3)
    half = collect(tmp_path / "half", [source], whole["bytes"] // 2, validation_fraction=0.3)
    assert whole["bytes"] * 0.45 < half["bytes"] <= whole["bytes"] // 2
    assert half["beyond_max_bytes"] == 60 - half["documents"]
    chosen = lines(tmp_path / "half", "train") + lines(tmp_path / "half", "validation")
    assert {record["path"].split("/")[0] for record in chosen} == {f"package{i}" for i in range(7)}
    held_out = {record["path"] for record in lines(tmp_path / "half", "validation")}
    assert held_out <= {record["path"] for record in lines(tmp_path / "whole", "validation")}


def test_default_is_the_base_installation(tmp_path):
    assert (standard_library() / "os.py").is_file()
    report = collect(tmp_path / "out", max_bytes=1_000_000, validation_fraction=0.1)
    assert report["bytes"] > 900_000
    paths = [record["path"] for record in lines(tmp_path / "out", "train")]
    assert not any("site-packages" in path for path in paths)


def test_bad_input(source, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"no text .* in .*nothing; change --source"):
        collect(tmp_path / "out", [tmp_path / "nothing"])
    with pytest.raises(UserError, match="absent is not a folder"):
        collect(tmp_path / "out", [tmp_path / "absent"])
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        collect(tmp_path / "out", [source], validation_fraction=1.0)
    with pytest.raises(UserError, match="none of the 60 documents falls into the validation split"):
        collect(tmp_path / "out", [source], validation_fraction=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nothing", "source"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with pytest.raises(UserError, match="exists already and nothing is overwritten"):
        collect(tmp_path / "out", [source])
    assert (tmp_path / "out" / "precious").read_text() == "kept"
