"""Every pair of commands that write a folder, concurrently on one: one completes it, the other reports."""

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import TINY, finished, mlm_train, start

CUT = ("--dtype", "int8", "--group-size", "8")
# A command -> how its folder is read, whole.
READERS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "collect": lambda folder: ("data", "prepare", "--input", folder, "--tokenizer", "train:512", "--output"),
    "prepare": lambda folder: ("data", "inspect", folder, "--verify", "full"),
    "export": lambda folder: ("export", "verify", folder),
    "import": lambda folder: ("export", "verify", folder),
    "build": lambda folder: ("tol", "verify", folder),
    "compress": lambda folder: ("tol", "verify", folder),
    "fetch": lambda folder: ("tol", "verify", folder),
    "pretrain": lambda folder: ("checkpoint", "verify", folder),
}


@pytest.fixture(scope="module")
def commands(corpus: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Name -> arguments, without the output path."""
    folder = tmp_path_factory.mktemp("sources")
    run, exported, table = folder / "run", folder / "export", folder / "tol"
    training = ["pretrain", "configs/micro.yaml", *TINY, "train.steps=3", f"data.path={data}"]
    mlm_train(*training, f"train.output={run}")
    mlm_train("export", run, "--output", exported)
    mlm_train("tol", "build", exported, "--output", table, "--dtype", "float32")
    return {
        "collect": ["data", "collect", "--max-bytes", "1MB", "--validation-fraction", "0.1", "--output"],
        "prepare": ["data", "prepare", "--input", corpus, "--tokenizer", data, "--output"],
        "export": ["export", run, "--output"],
        "import": ["import", exported, "--output"],
        "build": ["tol", "build", exported, *CUT, "--output"],
        "compress": ["tol", "compress", table, *CUT, "--output"],
        "fetch": ["tol", "fetch", f"file://{table}"],
        "pretrain": training,
    }


def _started(words: list[object], output: Path) -> "subprocess.Popen[str]":
    return start(*words, f"train.output={output}" if words[0] == "pretrain" else output)


def _read(name: str, folder: Path) -> None:
    words = READERS[name](folder)
    finished(*words, *([folder.with_name("read")] if words[-1] == "--output" else []))


@pytest.mark.long
@pytest.mark.parametrize("pair", itertools.combinations_with_replacement(READERS, 2), ids=" and ".join)
def test_two_at_once(pair: tuple[str, str], commands: dict[str, list[object]], tmp_path: Path) -> None:
    output = tmp_path / "output"
    both = [_started(commands[name], output) for name in pair]
    said = [process.communicate(timeout=300)[0] for process in both]
    codes = [process.returncode for process in both]
    print(pair, codes, [words[-300:] for words in said])
    assert not any("Traceback" in words for words in said), said
    # A command that comes after its like has ended finds all done.
    assert sorted(codes) == [0, 2] or (codes == [0, 0] and pair[0] == pair[1]), (codes, said)
    if 2 in codes:
        line = said[codes.index(2)].strip().splitlines()[-1]
        assert line.startswith("mlm-train: ") and "output" in line, said
    _read(pair[codes.index(0)], output)
    shutil.rmtree(tmp_path / "read", ignore_errors=True)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
