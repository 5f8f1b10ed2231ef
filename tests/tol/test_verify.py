"""Verification: intact tables pass, every damage is named."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlm_train.cli import main
from mlm_train.errors import UserError
from mlm_train.tol.format.index import INDEX
from mlm_train.tol.format.index_file import parse_index, read_index
from mlm_train.tol.tools.verify import verify_tol
from tests.tol.conftest import export, random_model


@pytest.fixture
def table(tables: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(tables["bfloat16"], tmp_path / "tol")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_intact(tables: dict[str, Path], exported: Path, dtype: str) -> None:
    report = verify_tol(tables[dtype], exported)
    assert not report.damages and report.recomputed == 601
    assert report.max_rel_error < {"bfloat16": 2e-3 * 2, "float16": 5e-4, "float32": 2e-6}[dtype]
    assert verify_tol(tables[dtype], exported, sample=20).recomputed == 20
    assert verify_tol(tables[dtype]).recomputed == 0


def flip(folder: Path, row: int, layer: int, column: int, bit: int) -> str:
    """Flip a bit in the high byte of a bfloat16 value; return the partition's file name."""
    for partition in read_index(folder).partitions:
        start, stop = partition.rows
        if start <= row < stop:
            file = folder / partition.file
            data = bytearray(file.read_bytes())
            number = ((row - start) * 3 + layer) * 32 + column
            data[len(data) - (stop - start) * 3 * 32 * 2 + 2 * number + 1] ^= bit
            file.write_bytes(data)
            return partition.file
    raise AssertionError


def test_flipped_byte_is_named(table: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = flip(table, 300, 1, 7, 0x80)
    spans = {(d.file, d.start, d.stop) for d in verify_tol(table).damages}
    assert spans == {(name, 250, 350)}
    spans = {(d.file, d.start, d.stop) for d in verify_tol(table, exported).damages}
    assert spans == {(name, 250, 350), (name, 300, 301)}
    with pytest.raises(SystemExit) as exit_:
        main(["tol", "verify", str(table), "--model", str(exported)])
    assert exit_.value.code == 2
    assert f"{name}: rows [300, 301): values are not FFN-M's" in capsys.readouterr().err


def test_missing_short_or_non_finite_files(table: Path) -> None:
    files = [table / partition.file for partition in read_index(table).partitions]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    header = files[2].read_bytes()
    files[2].write_bytes(b"\0" * 8 + header[8:])
    for row in (400, 401, 403):
        data = bytearray(files[4].read_bytes())
        at = 4096 + (row - 350) * 3 * 32 * 2
        data[at : at + 2] = b"\x80\x7f"
        files[4].write_bytes(data)
    damages = [str(damage) for damage in verify_tol(table).damages]
    assert len(damages) == 6
    expected = (
        "rows [0, 50): the file is missing",
        "bytes, not",
        "header",
        "SHA-256",
        "rows [400, 402): non-finite values",
        "rows [403, 404): non-finite values",
    )
    for damage, text in zip(damages, expected, strict=True):
        assert text in damage


def rewrite(table: Path, **fields: Any) -> None:
    tree = json.loads((table / INDEX).read_text())
    (table / INDEX).write_text(json.dumps(tree | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "zip"}, "format"),
        ({"version": 2}, "version"),
        ({"dtype": "int8"}, "dtype"),
        ({"layers": [0, 3]}, "layers must be"),
        ({"vocab_size": 700}, r"rows \[601, 700\) are in no partition"),
        ({"partitions": []}, "are in no partition"),
        ({"surprise": 1}, "surprise"),
        ({"errors": [0.1]}, "1 errors are given for 3 layers"),
        ({"hidden_size": 31}, "its digest differs"),
        ({"layers": [0, 1, 2], "num_layers": 4}, "its digest differs"),
        ({"digest": 5}, "its digest differs"),
    ],
)
def test_bad_index(table: Path, fields: dict[str, Any], message: str) -> None:
    rewrite(table, **fields)
    with pytest.raises(UserError, match=message) as caught:
        verify_tol(table)
    assert "\n" not in str(caught.value)


def test_any_flipped_bit_of_the_index_is_found(table: Path) -> None:
    original = (table / INDEX).read_bytes()
    assert parse_index(original, "index") == read_index(table)
    for position in range(len(original)):
        data = bytearray(original)
        data[position] ^= 1 << random.randrange(8)
        with pytest.raises(UserError, match="index"):
            parse_index(bytes(data), "index")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"codes": 39}, "beyond the row"),
        ({"scales": 10**30}, "beyond the row"),
        ({"threads": 0}, "threads"),
        ({"chunk_rows": -1}, "chunk_rows"),
        ({"bytes": -1}, "bytes"),
        ({"bytes": 1e30}, "bytes"),
    ],
)
def test_impossible_numbers_in_an_index(fields: dict[str, Any], message: str) -> None:
    """In an index without a digest, as written by hand."""
    encoding = {"dtype": "int8", "group_size": 16, "symmetric": True, "scales": 0, "codes": 4}
    partition = {"file": "rows", "rows": [0, 9], "bytes": 1, "sha256": ""}
    source = {"checkpoint": "", "created": "", "tool_version": ""}
    index = {"format": "mlm-tol", "version": 1, "vocab_size": 9, "num_layers": 1, "hidden_size": 32}
    index |= {"dtype": "int8", "group_size": 16, "layers": [0], "encodings": [encoding]}
    index |= {"partitions": [partition], "source": source}
    parse_index(json.dumps(index).encode(), "index")
    for part in (encoding, partition, source):
        known = {"threads", "chunk_rows"} if part is source else set(part)
        part |= {name: value for name, value in fields.items() if name in known}
    with pytest.raises(UserError, match=message):
        parse_index(json.dumps(index).encode(), "index")


@pytest.mark.parametrize("name", ["../rows", "/etc/passwd", "a/b", "..", "", "a\nb", "a\x1b[2Jb"])
def test_paths_stay_inside(table: Path, name: str) -> None:
    tree = json.loads((table / INDEX).read_text())
    tree["partitions"][0]["file"] = name
    rewrite(table, partitions=tree["partitions"])
    with pytest.raises(UserError, match="plain file name"):
        verify_tol(table)


def test_bad_arguments(table: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model"):
        verify_tol(table, sample=3)
    with pytest.raises(UserError, match=r"tol\.index\.json does not exist"):
        verify_tol(tmp_path / "nothing")
    for note, command in (("tol.build.json", "the command that started it"), ("tol.fetch.json", "tol fetch")):
        (tmp_path / note).mkdir()
        (tmp_path / note / note).touch()
        with pytest.raises(UserError, match=f"is unfinished: resume it by running .*{command}"):
            verify_tol(tmp_path / note)
    with pytest.raises(UserError, match="another model"):
        verify_tol(table, export(tmp_path / "other", random_model(intermediate_size=30)))
    with pytest.raises(UserError, match="hidden_size=32 and the model 16"):
        verify_tol(table, export(tmp_path / "thin", random_model(hidden_size=16)))
