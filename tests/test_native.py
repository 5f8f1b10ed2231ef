"""Compiling a C++ source at first use: once, whole, and never fatal."""

import ctypes
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlm_train.utils import native

SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "some.cpp"
    file.write_text(SOURCE)
    native.compiled_library.cache_clear()
    yield file
    native.compiled_library.cache_clear()


def libraries(source: Path) -> list[Path]:
    return sorted((source.parent / "cache").rglob("*.so"))


def test_compiled_once_per_source_and_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = native.compiled_library(source)
    assert isinstance(library, ctypes.CDLL) and library.answer() == 42
    (first,) = libraries(source)
    made = first.stat().st_mtime_ns
    native.compiled_library.cache_clear()
    assert native.compiled_library(source) is not None
    assert libraries(source) == [first] and first.stat().st_mtime_ns == made
    source.write_text(SOURCE.replace("42", "43"))
    native.compiled_library.cache_clear()
    changed = native.compiled_library(source)
    assert changed is not None and changed.answer() == 43
    monkeypatch.setenv("CXX", "g++ -DUNUSED")
    native.compiled_library.cache_clear()
    assert native.compiled_library(source) is not None
    assert len(libraries(source)) == 3


def test_not_fatal(source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for compiler, reason in (
        ("no-such-compiler", "there is no no-such-compiler"),
        ("false", "exit status 1"),
    ):
        monkeypatch.setenv("CXX", compiler)
        native.compiled_library.cache_clear()
        assert native.compiled_library(source) is None
        assert reason in caplog.messages[-1] and source.name in caplog.messages[-1]
    monkeypatch.delenv("CXX")
    source.write_text("no C++")
    native.compiled_library.cache_clear()
    assert native.compiled_library(source) is None
    assert not libraries(source)
    source.write_text(SOURCE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    native.compiled_library.cache_clear()
    assert native.compiled_library(source) is None
    assert len(caplog.messages) == 4


@pytest.mark.parametrize("compiler", ["", " ", "'c++", "sh -c 'echo >&2; exit 1'"])
def test_odd_values_of_cxx(source: Path, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one is none; what cannot be a command, or fails and says nothing, is not fatal."""
    monkeypatch.setenv("CXX", compiler)
    assert (native.compiled_library(source) is None) == bool(compiler.strip())


def test_no_home(source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As in a container whose user is but a number."""

    def nobody(_: int) -> None:
        raise KeyError

    caplog.set_level(logging.INFO)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert native.compiled_library(source) is None
    assert "home" in caplog.messages[-1]


def test_the_reason_is_the_first_error(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source.write_text('#include "no-such-file"')  # the compiler's last line is "compilation terminated."
    assert native.compiled_library(source) is None
    assert "no-such-file" in caplog.messages[-1].rpartition(":")[0]


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_a_damaged_library_is_compiled_again(source: Path, part: float) -> None:
    """The half of a library can be loaded, and kills the process."""
    library = native.library_file(source, ["c++"])
    native._compile(["c++"], source, library)
    whole = library.read_bytes()
    library.write_bytes(whole[: int(part * len(whole))])
    compiled = native.compiled_library(source)
    assert compiled is not None and compiled.answer() == 42
    assert len(library.read_bytes()) == len(whole)


def test_processes_at_once(source: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mlm_train.utils.native import compiled_library as c; "
        "sys.exit(c(Path(sys.argv[1])).answer() - 42)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(source)]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(libraries(source)) == 1
