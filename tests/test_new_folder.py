"""Folders written under a temporary name: leftovers of killed writers go, drafts of live ones stay."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlm_train.checkpoint.hf.importing import import_folder
from mlm_train.data.collect import collect, standard_library
from mlm_train.data.prepare import prepare
from mlm_train.errors import UserError
from mlm_train.utils.files import new_folder
from tests.checkpoint.test_hf_folder import random_model, write
from tests.commands import refused

# A writer like `import`: a draft folder within another draft. It reports when both have content.
WRITER = """
import sys, time
from pathlib import Path
from mlm_train.utils.files import new_folder
with new_folder(Path(sys.argv[1])) as draft, new_folder(draft) as inner:
    (inner / "big").write_bytes(bytes(100))
    print("writing", flush=True)
    time.sleep(300)
"""


@contextlib.contextmanager
def writer(output: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process in the middle of writing `output`."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def killed(output: Path) -> None:
    """Create the leftovers of a killed writer of `output`."""
    with writer(output) as process:
        os.kill(process.pid, signal.SIGKILL)
    assert len(leftovers(output.parent)) >= 2 and not output.exists()


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if ".partial-" in path.name or path.name.endswith(".lock")}


def test_every_writer_removes_what_a_killed_one_left(corpus: Path, data: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "out [1]*"  # a name that looks like a pattern
    write(model, random_model())
    sources = [standard_library() / "json"]
    writers: dict[str, Callable[[], object]] = {
        "collect": lambda: collect(output, sources, validation_fraction=0.3),
        "prepare": lambda: prepare([str(corpus)], output, str(data)),
        "train a tokenizer": lambda: prepare([str(corpus)], output, "train:512"),
        "export": lambda: write(output, random_model()),
        "import": lambda: import_folder(model, output),
    }
    for name, write_it in writers.items():
        killed(output)
        write_it()
        assert output.is_dir() and leftovers(tmp_path) == set(), name
        output.rename(tmp_path / name)
    killed(output)
    assert "absent" in refused("data", "collect", "--source", tmp_path / "absent", "--output", output)
    with pytest.raises(UserError), new_folder(output):
        raise UserError("bad input")
    assert leftovers(tmp_path) == set()


def test_nothing_of_anybody_else_is_removed(tmp_path: Path) -> None:
    others = [
        "out.partial-mine",
        "out.partial-0123456789",
        "out2.partial-01234567",
        "my-out.partial-01234567",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    output = tmp_path / "out"
    with writer(output):
        theirs = leftovers(tmp_path)
        assert len(theirs) == len(others) + 4  # a draft and a lock of each of the two
        line = refused("data", "collect", "--source", standard_library() / "json", "--output", output)
        assert str(output) in line
        assert leftovers(tmp_path) == theirs
        with new_folder(tmp_path / "another"):
            assert leftovers(tmp_path) > theirs
        assert leftovers(tmp_path) == theirs
    with new_folder(output) as draft:
        (draft / "file").touch()
    assert leftovers(tmp_path) == set(others) and (output / "file").is_file()


def test_where_the_file_system_has_no_locks_nobody_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / "out.partial-01234567").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert leftovers(tmp_path) == {"out.partial-01234567"}


def test_a_folder_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=str(tmp_path / "file" / "out")),
        new_folder(tmp_path / "file" / "out"),
    ):
        pass
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "kept").touch()
    with pytest.raises(UserError, match="used"), new_folder(tmp_path / "used"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "used"]
