"""Prompts of a file."""

from pathlib import Path

import pytest

from mlm_train.errors import UserError
from mlm_train.inference.prompts import read_prompts


def test_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes('\ufeffone two \r\n\n  {"prompt": 1}\n'.encode())
    assert read_prompts(file) == [
        ("one two ", f"{file}, line 1"),
        ('  {"prompt": 1}', f"{file}, line 3"),
    ]


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\nb", "other": 1}\n\n{"prompt": [1, 2]}\n')
    assert [prompt for prompt, _ in read_prompts(file)] == ["a\nb", [1, 2]]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", b"\n \n", "has no prompts"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\nb', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}', "line 1 has no field"),
        ("a.jsonl", b'{"prompt": [1, true]}', "line 1 has no field"),
        ("a.jsonl", b'["prompt"]', "line 1 has no field"),
        ("a.txt", None, "No such file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, contents: bytes | None, message: str) -> None:
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)
