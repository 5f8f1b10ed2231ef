"""Real text and a real tokenizer for every test that trains: the Python library's own sources."""

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import mlm_train
from tests.objects import Objects

pytest_plugins = ["tests.order"]
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process that a test starts compiles all modules


def pytest_configure() -> None:
    """Handle Ctrl-C also where a shell has started the tests in the background: many tests send it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> Iterator[None]:
    """What torch compiles lies apart: a process that is killed leaves half a library in the usual place."""
    with tempfile.TemporaryDirectory(prefix="mlm-compiled-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers alone and after others: no failure that comes and goes."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Collected text, train.jsonl and validation.jsonl."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    mlm_train("data", "collect", "--output", folder, "--max-bytes", "1MB", "--validation-fraction", "0.1")
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path) -> Path:
    """Prepared data with a vocabulary of 512."""
    folder = corpus.parent / "data"
    mlm_train("data", "prepare", "--input", corpus, "--output", folder, "--tokenizer", "train:512")
    return folder


@pytest.fixture
def fifo() -> Iterator[Callable[[Path], Path]]:
    """Replaces a file by a FIFO without a writer: opening it for reading would block forever."""

    def give_up(*_: object) -> None:
        raise AssertionError("a reader waits for a FIFO")

    def make(path: Path) -> Path:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        signal.alarm(20)
        return path

    before = signal.signal(signal.SIGALRM, give_up)
    yield make
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def s3_socket() -> Iterator[socket.socket]:
    """The socket of the `objects` S3; set before Ray starts, whose workers inherit its address."""
    with socket.socket() as waiting, pytest.MonkeyPatch.context() as environment:
        waiting.bind(("127.0.0.1", 0))
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{waiting.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("NO_PROXY", "127.0.0.1")
        yield waiting


@pytest.fixture(scope="session")
def objects(s3_socket: socket.socket) -> Iterator[Objects]:
    """An S3 with the bucket "bucket"."""
    objects = Objects(s3_socket)
    threading.Thread(target=objects.server.serve_forever, daemon=True).start()
    import fsspec

    fsspec.filesystem("s3").mkdir("bucket")
    yield objects
    objects.release()
    objects.server.shutdown()


@pytest.fixture
def s3(objects: Objects, tmp_path: Path) -> str:
    """A new folder in the S3."""
    return f"s3://bucket/{tmp_path.name}"
