"""Formats are detected from a file's content, whatever its name; no file is skipped silently."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlm_train.data.documents import find_sources
from mlm_train.data.prepare import prepare
from mlm_train.errors import UserError
from tests.commands import mlm_train, refused

TEXTS = ["first\r\ntext\t😀", "second\u2028text", '{"third": "is no JSON line"}', "fourth"]


def zstandard(data: bytes) -> bytes:
    """Two frames, each after a skippable frame, as parallel compressors write them."""
    codec, skip = pa.Codec("zstd"), bytes([0x50, 0x2A, 0x4D, 0x18, 4, 0, 0, 0]) + b"size"
    half = len(data) // 2
    return b"".join(skip + codec.compress(part, asbytes=True) for part in (data[:half], data[half:]))


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def lines(key: str = "text") -> bytes:
    records = [json.dumps({key: text, "other": [number]}) for number, text in enumerate(TEXTS)]
    return ("\n".join(records) + "\n").encode()


def read(*inputs: Path, text_key: str = "text") -> tuple[list[str], list[str]]:
    """The texts, and the names of what was left out."""
    found = find_sources([str(name) for name in inputs], text_key)
    texts = [document.text for source in found.sources for document in source.read()]
    assert all(sum(document.size for document in s.read()) <= (s.size or 0) + 1e-6 for s in found.sources)
    return texts, sorted(Path(name).name for name in found.left_out)


@pytest.mark.parametrize("packed", COMPRESSED)
def test_json_lines_are_json_lines_whatever_the_name(packed: str, tmp_path: Path) -> None:
    data = COMPRESSED[packed](lines())
    names = [
        f"{stem}{packed}"
        for stem in ("a.jsonl", "b.json", "c.ndjson", "d.JSONL", "e.txt", "f.Json", "part-00000", "g.log")
    ] + [f"upper.JSONL{packed.upper()}", "no-hint", "wrong.jsonl.gz"]
    for name in names:
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == (TEXTS, []), name
    assert read(tmp_path) == (TEXTS * len(names), [])  # in a folder too
    for name in names:
        (tmp_path / name).write_bytes(
            COMPRESSED[packed](b"\xef\xbb\xbf\n \n" + lines().replace(b"\n", b"\r\n"))
        )
    assert read(tmp_path) == (TEXTS * len(names), [])


@pytest.mark.parametrize("packed", COMPRESSED)
def test_one_json_value_is_read_as_hugging_face_reads_it(packed: str, tmp_path: Path) -> None:
    objects = [{"text": text, "other": number} for number, text in enumerate(TEXTS)]
    for number, (value, expected) in enumerate([
        (objects, TEXTS), (TEXTS, TEXTS), (objects[1], TEXTS[1:2]), (objects[:1], TEXTS[:1]), ([], []),
    ]):  # fmt: skip
        for indent in (None, 2):
            for name in (f"{number}-{indent}.json", f"{number}-{indent}.txt", f"{number}-{indent}"):
                path = tmp_path / f"{name}{packed}"
                path.write_bytes(COMPRESSED[packed](json.dumps(value, indent=indent).encode()))
                assert read(path) == (expected, []), name
                path.unlink()


def test_text_is_text(tmp_path: Path) -> None:
    """Also where it begins like JSON, and whatever its name."""
    texts = {
        "code.py": "{'a': 1}\n", "README": "[link](there)\n", "notes.TXT": "{not json}\n{at all}\n",
        "page.html": "<p>", "LICENSE": "all rights", "long.log": "line\n" * 30_000, "nul.txt": "one \0 here",
    }  # fmt: skip
    for number, (packed, compress) in enumerate(COMPRESSED.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in texts.items():
            (folder / f"{name}{packed}").write_bytes(compress(text.encode()))
            assert read(folder / f"{name}{packed}") == ([text], [])
        assert read(folder) == ([texts[name] for name in sorted(texts)], [])


def not_text(folder: Path) -> list[Path]:
    """Files that are neither text nor in a known format."""
    noise = random.Random(0).randbytes(1000)
    table = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), table)
    contents = {
        "picture.png": b"\x89PNG\r\n\x1a\n" + noise, "noise": noise, "noise.gz": gzip.compress(noise),
        "archive.tar": b"name" + bytes(508) + b"text", "late.bin": b"text " * 20_000 + b"\xff",
        "table.csv": b"text,id\nhello,1\n", "table.TSV.gz": gzip.compress(b"text\tid\n"),
        "packed-table": gzip.compress(table.getvalue()), "utf16.log": "text".encode("utf-16"),
        "twice.gz": gzip.compress(gzip.compress(b"text")), "nothing": b"",
    }  # fmt: skip
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in contents]


def test_what_is_no_text_is_refused_or_listed(model: Path, tmp_path: Path) -> None:
    files = not_text(tmp_path)
    for path in files:
        with pytest.raises(UserError, match=path.name) as error:
            read(path)
        assert "\n" not in str(error.value)
    (tmp_path / "package.json").write_text('{"name": "no document",\n "version": 1}')
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hook.txt").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "link").symlink_to(tmp_path.parent)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "text.txt").write_text("text")
    others = ["package.json", ".git", ".hidden.txt", "link", "broken.txt", "fifo.jsonl"]
    assert read(tmp_path) == (["text"], sorted([path.name for path in files] + others))
    (tmp_path / "text.txt").unlink()
    (tmp_path / "archive.tar").unlink()
    with pytest.raises(UserError, match=r"none of the 0 documents .*fifo\.jsonl"):
        prepare([str(tmp_path)], tmp_path.parent / f"{tmp_path.name}-out", str(model))


def test_the_command_lists_what_it_left_out(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "more.JSONL.zst").write_bytes(zstandard((corpus / "train.jsonl").read_bytes()))
    files = not_text(folder)
    mlm_train(
        "data", "prepare", "--input", folder, "--output", tmp_path / "out", "--tokenizer", model,
        "--validation-fraction", 0.3, "--workers", 1,
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert f"left out: {len(files)} files" in shown and str(folder / "archive.tar") in shown
    assert f"{len(files) - 10} more" in shown
    line = refused("data", "prepare", "--input", files[0], "--output", tmp_path / "bad", "--tokenizer", model)
    assert str(files[0]) in line


def test_damage_names_file_and_line(tmp_path: Path) -> None:
    good = b'{"text": "good"}\n'
    deep = b'{"text": "x", "unread": ' + b"[" * 990 + b"]" * 990 + b"}\n"
    for name in ("a.jsonl", "a.json", "a.ndjson", "a.txt", "a"):
        for bad in (deep, b'{"text": \n', b'{"text": "\xff"}\n', b'{"text": "\\ud800"}\n', b'{"body": 1}\n'):
            for packed, compress in COMPRESSED.items():
                path = tmp_path / f"{name}{packed}"
                path.write_bytes(compress(good * 3 + bad))
                with pytest.raises(UserError) as error:
                    read(path)
                # Invalid UTF-8 in a file that is not named JSON is not text.
                where = "" if b"\xff" in bad and name in ("a.txt", "a", "a.json") else ":4"
                assert f"{path}{where}" in str(error.value) and "\n" not in str(error.value)
                path.unlink()
    for packed, compress in [*COMPRESSED.items()][1:]:
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(compress(good * 500)[:-12])
        with pytest.raises(UserError, match=path.name):
            read(path)
        path.unlink()
    for number, value in enumerate(([{"text": "x"}, {"body": "y"}], [{"text": "x"}, 5], ["x", None])):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=r"\.json item 2"):
            read(path)
        with pytest.raises(UserError, match=r"\.json item 2"):
            read(tmp_path)  # not left out: it has text
        path.unlink()
    path = tmp_path / "half.jsonl"  # half a surrogate pair in an unused field is not an error
    path.write_bytes(b'{"text": "x", "title": "\\ud800"}\n')
    assert read(path) == (["x"], [])


@pytest.mark.parametrize(
    "name", ["train.JSONL", "train.json", "train.jsonl.zst", "Train.ndjson.gz", "train.parquet"]
)
def test_a_split_of_its_own_in_every_format(name: str, tmp_path: Path) -> None:
    """Otherwise validation texts would be trained on."""
    table = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), table)
    data = table.getvalue() if name.endswith("parquet") else lines()
    compress = COMPRESSED[Path(name).suffix if Path(name).suffix in COMPRESSED else ""]
    for split in ("train", "validation"):
        (tmp_path / name.lower().replace("train", split)).write_bytes(compress(data))
    (tmp_path / "test.jsonl").write_bytes(lines())
    found = find_sources([str(tmp_path)], "text")
    splits = [(source.split, document.text) for source in found.sources for document in source.read()]
    assert splits == [(split, text) for split in ("train", "validation") for text in TEXTS]
    assert [*found.left_out] == [str(tmp_path / "test.jsonl")]
    (tmp_path / "train.other.jsonl").write_bytes(lines())
    with pytest.raises(UserError, match=r"train\.other\.jsonl"):
        find_sources([str(tmp_path)], "text")
