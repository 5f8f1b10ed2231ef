"""The YAML reader of files and overrides: plain values, bounded size, one-line errors."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlm_train.config import dump_config, load_config
from mlm_train.config.yaml_text import DEEPEST, LONGEST, yaml_text, yaml_value
from tests.commands import ROOT, refused

MICRO = ROOT / "configs/micro.yaml"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 8)
)
HOSTILE = (
    "2020-13-45", "!!bool x", "9" * 5000, '!!int ""', "&a [*a]", "&a 1", "*a", "! x",
    "!!python/name:os.system",
    "[" * 5000, "{a: " * 200 + "1" + "}" * 200, "- " * 200 + "1", "[1,", '"\\ud800"', '"\\U00110000"',
    '"a\\0b"',
    "{a: 1, a: 2}", "? [1, 2]\n: 3", "\x07", "--- 1\n--- 2", "%TAG ! tag:x,2000:\n--- !y 1",
    "x" * (LONGEST + 1),
    "0x" + "f" * 5000, "<<: {a: 1}\n<<: {b: 1}", "1" * 400 + "." + "1" * 400, "@", "`", "%", "\t- x",
    "{", "'",
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0220", 220), ("-7", -7), ("+7", 7), ("0o17", 15), ("0x1F", 31), ("1e-4", 1e-4), ("1.5E+3", 1500.0),
        (".5", 0.5), ("5.", 5.0), ("-.inf", float("-inf")), ("true", True), ("False", False), ("yes", "yes"),
        ("off", "off"), ("", None), ("null", None), ("~", None), ("1:30", "1:30"), ("1_000", "1_000"),
        ("2020-12-31", "2020-12-31"), ("=", "="), ("<<", "<<"), ("0b1", "0b1"), ("nan", "nan"),
        ("'12'", "12"),
        ("[1, a, 1e3]", [1, "a", 1000.0]), ("{a: {b: 1}}", {"a": {"b": 1}}), ("1e5000", float("inf")),
        ("é\U0001f600", "é\U0001f600"), ("|\n a\n b\n", "a\nb\n"),
    ],
)  # fmt: skip
def test_values_are_those_of_the_core_schema(text: str, value: object) -> None:
    parsed = yaml_value(text)
    assert parsed == value and type(parsed) is type(value)
    if isinstance(value, str):
        assert yaml_value(yaml_text({"a": value}))["a"] == value


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_one_line_as_an_override_and_in_a_file(text: str, tmp_path: Path) -> None:
    start = time.monotonic()
    for value in (text, f"[{text}]"):
        line = refused("pretrain", MICRO, f"train.steps={value}", "--dry-run")
        assert "train.steps" in line and len(line) < 1000
    file = tmp_path / "hostile.yaml"
    file.write_text(f"train:\n  steps: {text}\n", encoding="utf-8", errors="surrogatepass")
    line = refused("pretrain", file, "--dry-run")
    assert str(file) in line or "train.steps" in line or "missing" in line
    assert time.monotonic() - start < 20  # the first one imports torch


def test_files_that_are_no_yaml_of_ours(tmp_path: Path, fifo: Callable[[Path], Path]) -> None:
    file = tmp_path / "a.yaml"
    for data in (BOMB.encode(), b"\xff\xfe\x00", b"a: 1\na: 2\n", b"# x\n" * LONGEST, b"\x00", b""):
        file.write_bytes(data)
        assert str(file) in refused("pretrain", file, "--dry-run")
    for path in (fifo(tmp_path / "fifo.yaml"), tmp_path, Path("/dev/zero")):
        assert str(path) in refused("pretrain", path, "--dry-run")


def test_depth_is_bounded_where_it_says() -> None:
    assert yaml_value("[" * DEEPEST + "]" * DEEPEST)
    with pytest.raises(ValueError, match=str(DEEPEST)):
        yaml_value("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))


@pytest.mark.parametrize(
    "override",
    [
        "=1", "train=1", "train..steps=1", ".".join("a" * 5000) + "=1", "a\nb=1", "train.steps=a\nb",
        "train.\n=1",
        "train.output='a\n\n\n  b\n'", f"train.steps={10**400}", "train.steps=9223372036854775808",
        "train.steps={}",
        "optimizer.lr=1e400",
        "train.steps=true", "train.global_batch_size=9223372036854775800",
        "model.hidden_size=16777216", "optimizer.lr=false", "parallel.zero_stage=true",
        f"optimizer.lr={10**60}", "model.hidden_size=4611686018427387904",
        "model.num_hidden_layers=1000000000", "model.vocab_size=1e30", "train={steps: {a: [1, 2, {b: c}]}}",
        "model.memory_scale={a: 1}", "data.blend={a: 1}", "train.seed=[[[[]]]]", "1=2", "model.1=2", "~=1",
        "train.output=\ud800", "train.output='a\\0b'", "train.\x1b[31m=1",
    ],
)  # fmt: skip
def test_overrides_that_cannot_be(override: str, tmp_path: Path) -> None:
    """Every error is one printable line, also where a value contains a newline."""
    words = ["pretrain", MICRO, f"data.path={tmp_path / 'none'}", override]
    line = refused(*words)
    assert line.isprintable() and len(line) < 1000


def test_what_is_dumped_reads_back(tmp_path: Path) -> None:
    names: dict[str, Any] = {
        "a": "1e-4",
        "b": "0o17",
        "c": "yes",
        "d": "0220",
        "e": "~",
        "f": 1e-5,
        "g": "2020-12-31",
    }
    names |= {
        "g": "2020-12-31",
        "h": "a\nb",
        "i": "\x85\u2028é",
        "j": "#",
        "k": 2**62,
        "l": [0.1, True, None],
        "m": "1:30",
    }
    assert yaml_value(yaml_text(names)) == names
    config = load_config(MICRO, ["train.output='1e-4'", "data.path='007'"])
    file = tmp_path / "dumped.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
