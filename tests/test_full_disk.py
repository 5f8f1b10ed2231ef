"""Every writer on a full disk: one line that asks to free space and names the user's path."""

import contextlib
import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlm_train.cli import main
from mlm_train.tol.build.ray_cluster import ray_cluster
from tests.commands import TINY, mlm_train

MEGABYTES = 48
SHARES = (0.0, 0.4, 0.8)  # of what it needs, which is free
SMALL = (0.0,)  # where it is less than a few pages, or takes long


class Disk:
    """A small tmpfs with an adjustable amount of free space."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ballast = folder, folder / "ballast"

    def free(self) -> int:
        usage = os.statvfs(self.folder)
        return usage.f_bavail * usage.f_frsize

    def leave(self, count: int) -> None:
        """Fill the disk up to `leave` free bytes."""
        self.ballast.unlink(missing_ok=True)
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free() - count)

    def empty(self) -> None:
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: that takes root")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with ray_cluster(workers=2):
        yield


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "run"
    mlm_train("pretrain", "configs/micro.yaml", *training(data, folder))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    mlm_train("export", run, "--output", run.parent / "export")
    return run.parent / "export"


@pytest.fixture(scope="module")
def table(exported: Path, ray: None) -> Path:
    mlm_train("tol", "build", exported, "--output", exported.parent / "tol", "--dtype", "float32")
    return exported.parent / "tol"


@pytest.fixture(scope="module")
def tokens(run: Path) -> Path:
    save_file({"tokens": torch.randint(0, 500, (8, 64))}, run.parent / "tokens.safetensors")
    return run.parent / "tokens.safetensors"


def ended(*words: object) -> list[str]:
    """Output of a command, with its progress first, that must end with exit code 2 and a line."""
    errors = io.StringIO()
    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(errors):
        main([str(word) for word in words])
    lines = errors.getvalue().splitlines()
    assert end.value.code == 2 and lines[-1].startswith("mlm-train: "), lines
    return lines


def training(data: Path, output: Path) -> list[str]:
    more = ("train.steps=3", "checkpoint.interval=1", "monitor.peak_tflops=1", "memory.mode=unique")
    return [*TINY, *more, f"data.path={data}", f"train.output={output}"]


Words = Callable[[pytest.FixtureRequest], list[object]]


def of(*words: object) -> Words:
    """A command; a fixture's name in braces stands for its value."""

    def value(request: pytest.FixtureRequest, word: object) -> object:
        named = str(word).startswith("{")
        return request.getfixturevalue(str(word).strip("{}")) if named else word

    return lambda request: [value(request, word) for word in words]


CUT = ("--dtype", "int8", "--group-size", 8)
STUDY = ("--model", "{exported}", "--data", "{data}", "--budget", "400KB", "--samples", 1)
WRITERS: dict[str, tuple[Words, str]] = {  # and the option that names the output
    "collect": (of("data", "collect", "--max-bytes", "1MB", "--validation-fraction", 0.1), "--output"),
    "synthetic": (of("data", "synthetic", "--documents", 50), "--output"),
    "tokenizer": (of("data", "prepare", "--input", "{corpus}", "--tokenizer", "train:512"), "--output"),
    "prepare": (of("data", "prepare", "--input", "{corpus}", "--tokenizer", "{data}"), "--output"),
    "export": (of("export", "{run}"), "--output"),
    "import": (of("import", "{exported}"), "--output"),
    "logits": (of("evaluate", "--model", "{exported}", "--tokens", "{tokens}"), "--dump-logits"),
    "build": (of("tol", "build", "{exported}", *CUT), "--output"),
    "low rank": (of("tol", "build", "{exported}", *CUT, "--rank", 8), "--output"),
    "compress": (of("tol", "compress", "{table}", *CUT), "--output"),
    "allocate": (of("tol", "allocate", "{table}", *STUDY), "--output"),
    "fetch": (of("tol", "fetch"), ""),
    "plot": (of("tol", "inspect", "{table}"), "--plot"),
    "bench": (of("bench", "loss", "--vocabulary", 500, "--hidden", 8, "--tokens", 64, "--runs", 1), "--json"),
}


LONG = ("build", "low rank", "bench")  # tests/tol/test_faults.py fills a disk during a build; as "plot"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in WRITERS]
)
def test_a_full_disk(name: str, disk: Disk, request: pytest.FixtureRequest) -> None:
    words, option = WRITERS[name]
    output = disk.folder / ("out" if option in ("--output", "") else "out.safetensors")
    if name == "fetch":
        command = ["tol", "fetch", f"file://{request.getfixturevalue('table')}", output]
    else:
        command = [*words(request), option, output]
    before = disk.free()
    mlm_train(*command)
    needed = before - disk.free()
    shares = SMALL if option != "--output" or command[0] == "tol" else SHARES
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    for share in shares:
        disk.leave(int(share * needed) // 4096 * 4096)
        line = ended(*command)[-1]
        assert "free space" in line and str(output) in line, line
        assert not any(word in line for word in (".writing", ".partial-", ".part ", ".part:")), line
        left = [path.name for path in disk.folder.rglob("*") if path.is_file() and path != disk.ballast]
        assert not [path for path in left if path.endswith((".part", ".writing"))], left
        disk.empty()
    mlm_train(*command)


def test_training_on_a_full_disk(data: Path, disk: Disk) -> None:
    """The disk is full at its first file, before a checkpoint, within its tensors, at its manifest."""
    words = ["pretrain", "configs/micro.yaml", *training(data, disk.folder / "run")]
    before = disk.free()
    mlm_train(*words)
    saved = disk.folder / "run" / "checkpoints" / "step-00000003"
    size = sum(path.stat().st_size for path in saved.iterdir())
    around = before - disk.free() - 2 * size  # two are kept
    shutil.rmtree(disk.folder / "run")
    for left in (0, around, around + size - 20_000, around + size - 8192, around + size):
        disk.leave(left // 4096 * 4096)
        lines = [line for line in ended(*words) if "NOT saved" in line or line.startswith("mlm-train: ")]
        for line in lines:
            assert "free space" in line and str(disk.folder / "run") in line and ".partial" not in line, line
        disk.empty()
        shutil.rmtree(disk.folder / "run", ignore_errors=True)
    mlm_train(*words)
