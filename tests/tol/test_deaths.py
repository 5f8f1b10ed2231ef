"""Deaths that end a ToL build: one line reports it, finished work is kept, and the same command resumes.

Also a worker that a killed build has left: it changes nothing. With the command, in real processes.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.state import BuildState
from mlm_train.tol.build.worker import PROCESS_TITLE
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.storage.local import LocalFolder
from tests.commands import ROOT, start
from tests.tol.conftest import export, random_model
from tests.tol.processes import kill_leftovers, worker_processes
from tests.tol.test_faults import progress, same, wait_until

PARTITIONS = 16  # so many that a task is all layers of one
ONE_DONE = 5  # of `progress`
LAST_ROWS = 2**19  # bytes at a partition's end
CODE = """
import sys
import psutil
from mlm_train.errors import UserError
from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.ray_cluster import ray_cluster
from mlm_train.tol.build.weight_store import shared_weights
from mlm_train.tol.format.layout import TableSpec
model, output = sys.argv[1:]
plan = Build(model, output, TableSpec()).plan
with ray_cluster(1):
    (raylet,) = (child for child in psutil.Process().children() if child.name() == "raylet")
    raylet.kill()
    raylet.wait()
    try:
        with shared_weights(model, plan, 1) as weights:
            weights(plan.layers)
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose partitions take a good part of a second, so that a worker is hit while it fills one."""
    model = random_model(vocab_size=24576, hidden_size=64, intermediate_size=16384)
    return export(tmp_path_factory.mktemp("deaths") / "model", model)


@pytest.fixture(scope="module")
def unbroken(source: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "tol"
    Build(source, output, TableSpec(dtype="float32"), partitions=PARTITIONS).run()
    return output


def command(source: Path, output: Path, count: int, *more: str) -> "subprocess.Popen[str]":
    options = ("--dtype", "float32", "--partitions", PARTITIONS, "--workers", count, *more)
    return start("tol", "build", source, "--output", output, *options)


def finished(output: Path) -> dict[str, tuple[int, int]]:
    """Inode and mtime of each committed partition."""
    files = [output / part.file for part in BuildState.load(LocalFolder(output)).done.values()]
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def check_resumes(source: Path, output: Path, unbroken: Path) -> None:
    """The same command finishes, keeps committed partitions, and writes the same bytes."""
    kept = finished(output)
    process = command(source, output, 2)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert 1 <= len(kept) < PARTITIONS
    found = {name: ((output / name).stat().st_ino, (output / name).stat().st_mtime_ns) for name in kept}
    assert found == kept and same(output, unbroken)


def drafts(worker: psutil.Process) -> list[Path]:
    """The drafts that a worker has opened."""
    with contextlib.suppress(psutil.Error):
        return [Path(file.path) for file in worker.open_files() if file.path.endswith(".part")]
    return []


@pytest.mark.long
def test_four_deaths_over_one_partition(source: Path, unbroken: Path, tmp_path: Path) -> None:
    """The second partition kills every worker that fills it: it is retried after all others."""
    output, done, started = tmp_path / "tol", list[int](), time.monotonic()
    process = command(source, output, 1)
    builder = psutil.Process(process.pid)
    while process.poll() is None:
        assert time.monotonic() < started + 300, "the build hangs"
        for victim in worker_processes(builder, "fill"):
            if any(draft.name.startswith(".rows-00001-") for draft in drafts(victim)):
                victim.kill()
                victim.wait(60)
                done.append(len(BuildState.load(LocalFolder(output)).done))
        time.sleep(0.01)
    text, _ = process.communicate()
    *progress_lines, last = text.splitlines()  # one per minute, on a slow machine
    assert process.returncode == 2 and all(line.endswith(" left") for line in progress_lines), text
    assert last.startswith("mlm-train: a worker died 4 times ("), text
    assert last.endswith("run again: finished partitions are kept"), text
    seconds = round(time.monotonic() - started, 1)
    assert done == [1, *[PARTITIONS - 1] * 3] and not list(output.glob(".*.part"))
    check_resumes(source, output, unbroken)
    print(json.dumps({"workers killed over one partition": len(done), "seconds": seconds}))


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGINT, "stopped by the user"),
        pytest.param(
            signal.SIGTERM,
            "stopped by SIGTERM; run the same command again to continue",
            marks=pytest.mark.long,
        ),
    ],
)
def test_asked_to_end(
    source: Path, unbroken: Path, tmp_path: Path, number: signal.Signals, line: str
) -> None:
    """The signal is sent repeatedly, as schedulers and users do."""
    output = tmp_path / "tol"
    process = command(source, output, 2)
    wait_until(lambda: progress(output) >= ONE_DONE, process)
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.2)
    text, _ = process.communicate()
    assert (process.returncode, text) == (128 + number, f"mlm-train: {line}\n")
    assert not list(output.glob(".*.part"))
    check_resumes(source, output, unbroken)


@pytest.mark.parametrize("name", ["raylet", pytest.param("gcs_server", marks=pytest.mark.long)])
def test_a_process_of_ray_is_killed(source: Path, unbroken: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "tol"
    process = command(source, output, 2)
    wait_until(lambda: progress(output) >= ONE_DONE, process)
    builder = psutil.Process(process.pid)
    builder.suspend()  # while it still has much to do
    children = builder.children(recursive=True)
    try:
        assert progress(output) <= ONE_DONE + 2
        (victim,) = (child for child in children if child.name() == name)
        busy = [child for child in children if "".join(child.cmdline()[:1]).startswith(PROCESS_TITLE)]
        assert busy
        victim.kill()
        builder.resume()
        started = time.monotonic()
        text, _ = process.communicate(timeout=120)
        seconds = round(time.monotonic() - started, 1)
        line = f"mlm-train: Ray's own process {name} was killed or ran out of memory; run again: "
        assert process.returncode == 2 and text.startswith(line) and text.count("\n") == 1, text
        assert not list(output.glob(".*.part"))
        assert not psutil.wait_procs(busy, 60)[1]
    finally:
        kill_leftovers(children)
    check_resumes(source, output, unbroken)
    print(json.dumps({"killed": name, "the build ended after seconds": seconds}))


def test_weights_for_a_ray_that_is_gone(source: Path, tmp_path: Path) -> None:
    """Ray itself would silently end a process that puts an object into a store without a raylet."""
    command = [sys.executable, "-c", CODE, str(source), str(tmp_path / "tol")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0 and not ended.stderr, ended
    assert ended.stdout.startswith("Ray's own process raylet was killed") and ended.stdout.count("\n") == 1


def snapshot(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Inode, mtime, size and contents of every file, including hidden ones."""
    files = {path.name: (path.stat(), path.read_bytes()) for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size, data) for name, (stat, data) in files.items()}


def stop_one(cluster: psutil.Process, process: "subprocess.Popen[str]") -> tuple[psutil.Process, Path]:
    """Stop a worker that has opened a draft and written none of it; return both."""
    found: list[tuple[psutil.Process, Path]] = []

    def stop() -> bool:
        for worker in worker_processes(cluster, "fill"):
            worker.suspend()
            wait_until(lambda: worker.status() == psutil.STATUS_STOPPED, process)  # noqa: B023
            opened = drafts(worker)
            if opened and not any(opened[0].read_bytes()[-LAST_ROWS:]):
                found.append((worker, opened[0]))
                return True
            worker.resume()
        return False

    wait_until(stop, process)
    return found[0]


@pytest.mark.long
def test_an_orphan_wakes_after_the_next_build(
    source: Path, unbroken: Path, tmp_path: Path, cluster: "subprocess.Popen[str]"
) -> None:
    """All of its Ray was paused with it, like a machine, within a partition; it then writes the rest."""
    assert cluster.stdout is not None
    output, address = tmp_path / "tol", cluster.stdout.readline().strip()
    process = command(source, output, 2, "--ray-address", address)
    wait_until(lambda: progress(output) >= ONE_DONE, process)
    orphan, draft = stop_one(psutil.Process(cluster.pid), process)
    others = [child for child in psutil.Process(cluster.pid).children(recursive=True) if child != orphan]
    for other in others:
        other.suspend()  # or they would kill the orphan as soon as its builder is gone
    try:
        process.kill()
        process.wait()
        check_resumes(source, output, unbroken)
        assert orphan.status() == psutil.STATUS_STOPPED and not draft.exists()
        before, written, started = snapshot(output), orphan.io_counters().write_chars, time.monotonic()
        orphan.resume()
        while orphan.cmdline()[:1] == [f"{PROCESS_TITLE}.fill"]:
            assert time.monotonic() < started + 120, "it does not continue"
            time.sleep(0.01)
        seconds, written = time.monotonic() - started, orphan.io_counters().write_chars - written
        orphan.kill()
        assert written >= LAST_ROWS and snapshot(output) == before
        print(json.dumps({"bytes written by an orphan": written, "seconds": round(seconds, 1)}))
    finally:
        for other in others:
            with contextlib.suppress(psutil.Error):
                other.resume()
