"""A ToL build whose processes, nodes, disk and files fail: nothing that was committed is lost or wrong."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlm_train.errors import UserError
from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.scheduler import PartitionScheduler
from mlm_train.tol.build.state import BuildState
from mlm_train.tol.build.worker_pool import WorkerDied, WorkerPool
from mlm_train.tol.format.index import BASIS, INDEX, STATE
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.format.partition import Draft
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.utils.progress import ByteProgress
from tests.commands import ROOT, start
from tests.tol.conftest import end, export, random_model

ROWS, PARTITIONS, CHUNK = 12007, 16, 16
LOW_RANK = {"dtype": "int8", "group_size": 8, "budget": ROWS * 60}
GROUPS = {"dtype": "float32"}
CODE = """
import json, sys
from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.state import Storage
model, output, storage, options, run = json.loads(sys.argv[1])
Build(model, output, Storage(**storage), **options).run(**run)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary large enough for a build that lasts some seconds."""
    return export(tmp_path_factory.mktemp("faults") / "model", random_model(vocab_size=ROWS))


def options_of(spec: dict[str, Any]) -> dict[str, int]:
    """A layer each is a task, and a partition is read again; or a task is all of a partition, in order."""
    groups = {"group_bytes": 1} if spec == GROUPS else {}
    return {"partitions": PARTITIONS, "chunk_rows": CHUNK, **groups}


def build_of(model: Path, output: Path, spec: dict[str, Any]) -> Build:
    return Build(model, output, TableSpec(**spec), **options_of(spec))


def builder(model: Path, output: Path, spec: dict[str, Any], **run: object) -> "subprocess.Popen[str]":
    """The same in a process of its own."""
    words = json.dumps([str(model), str(output), spec, options_of(spec), run])
    command = [sys.executable, "-c", CODE, words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def unbroken(source: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What every broken build must come to."""
    root = tmp_path_factory.mktemp("unbroken")
    for name, spec in (("low_rank", LOW_RANK), ("groups", GROUPS)):
        begun = time.monotonic()
        build_of(source, root / name, spec).run()
        print(json.dumps({"unbroken": name, "seconds": round(time.monotonic() - begun, 1)}))
    return {name: root / name for name in ("low_rank", "groups")}


def contents(folder: Path) -> dict[str, object]:
    """Every file; the index without its time, and without the digest that covers it."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    if INDEX in files:
        index = json.loads((folder / INDEX).read_text())
        index["source"].pop("created")
        index.pop("digest")
        files[INDEX] = index
    return files


def same(folder: Path, other: Path) -> bool:
    mine, others = contents(folder), contents(other)
    assert sorted(mine) == sorted(others)
    return all(mine[name] == others[name] for name in mine)


def wait_until(holds: Callable[[], object], process: "subprocess.Popen[str]", seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "nothing happened"
        assert process.poll() is None, f"it ended first: {process.communicate()[1]}"
        time.sleep(0.002)


def progress(folder: Path) -> int:
    """0 once there is a state, 1 to 3 with so many spectra, 4 with a layout, and 1 more a partition."""
    if not (folder / STATE).exists():
        return -1
    state = BuildState.load(LocalFolder(folder))
    return len(state.spectra) + 4 * (state.layout is not None) + len(state.done)


def workers(process: psutil.Process, task: str) -> list[psutil.Process]:
    """Processes of a build that do this now."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[:1] == [f"ray::BuildWorker.{task}"]:
                found.append(child)
    return found


def test_every_worker_is_killed_in_turn(source: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    """Three while they make spectra and six while they fill partitions, replacements among them."""
    output = tmp_path / "tol"
    build = threading.Thread(target=build_of(source, output, LOW_RANK).run)
    begun = time.monotonic()
    build.start()
    killed: list[int] = []
    drafts: set[str] = set()
    for task, count in (("spectrum", 3), ("fill", 9), ("", 9)):
        while build.is_alive() and (len(killed) < count or not task):
            assert time.monotonic() < begun + 200, "the build hangs"
            drafts |= {path.name for path in output.glob(".rows-*.part")}
            for victim in workers(psutil.Process(), task):
                if victim.pid not in killed and len(killed) < count:
                    victim.kill()
                    killed.append(victim.pid)
            time.sleep(0.02)
    assert len(killed) == 9
    assert same(output, unbroken["low_rank"])
    seconds, again = round(time.monotonic() - begun, 1), len(drafts) - PARTITIONS
    print(json.dumps({"workers killed": 9, "partitions begun again": again, "seconds": seconds}))


def test_the_builder_is_killed_at_random_moments(
    source: Path, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    """Before and while it makes spectra, about when it commits the layout, and while it fills partitions.

    Ray's processes of each killed builder live on into the next build.
    """
    output, left, redone, begun = tmp_path / "tol", [], 0, time.monotonic()
    seed = random.randrange(2**32)
    print("seed", seed)
    draws = random.Random(seed)
    moments = (0, 0, 1, 2, 3, 4, 5, 10)
    kept: dict[str, int] = {}
    for moment in moments:
        process = builder(source, output, LOW_RANK)
        wait_until(lambda: progress(output) >= moment, process)  # noqa: B023
        time.sleep(draws.uniform(0, 3 if moment == 0 else 0.1))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (output / INDEX).exists()
        end(left)
        left = children
        state = BuildState.load(LocalFolder(output))
        inodes = {part.file: (output / part.file).stat().st_ino for part in state.done.values()}
        assert kept.items() <= inodes.items()
        redone += len(list(output.glob(".rows-*.part")))
        kept = inodes
    last = builder(source, output, LOW_RANK)
    assert last.wait() == 0, last.communicate()[1]
    end(left)
    assert kept.items() <= {path.name: path.stat().st_ino for path in output.iterdir()}.items()
    assert same(output, unbroken["low_rank"])
    seconds = round(time.monotonic() - begun, 1)
    print(json.dumps({"builder killed": len(moments), "partitions begun again": redone, "seconds": seconds}))


@pytest.mark.parametrize("name", ["low_rank", "groups"])
def test_two_nodes(
    source: Path, unbroken: dict[str, Path], tmp_path: Path, cluster: "subprocess.Popen[str]", name: str
) -> None:
    """More workers than CPUs; then a node is removed in mid-build, with the worker that it has."""
    assert cluster.stdin is not None and cluster.stdout is not None
    spec = {"low_rank": LOW_RANK, "groups": GROUPS}[name]
    run = {"workers": 5, "ray_address": cluster.stdout.readline().strip()}
    whole = builder(source, tmp_path / "whole", spec, **run)
    assert whole.wait(120) == 0, whole.communicate()[1]
    assert same(tmp_path / "whole", unbroken[name])
    begun = time.monotonic()
    process = builder(source, tmp_path / "tol", spec, **run)
    wait_until(lambda: progress(tmp_path / "tol") >= 5, process)
    cluster.stdin.write("remove\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline() == "removed\n"
    assert process.poll() is None, "the build ended before its node was removed"
    assert process.wait(120) == 0, process.communicate()[1]
    assert same(tmp_path / "tol", unbroken[name])
    print(json.dumps({"node removed": name, "seconds": round(time.monotonic() - begun, 1)}))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: that takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Take all space that is left."""
    with contextlib.suppress(OSError), (disk / "other").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_the_disk_fills(source: Path, ray: None, tmp_path: Path, small_disk: Path) -> None:
    """Before the first spectrum, and after some partitions; the same command ends once there is space."""
    output, last = small_disk / "tol", ""
    options = ("--dtype", "int8", "--group-size", "8", "--rank", "16", "--partitions", "300")
    for moment in (0, 10):
        process = start("tol", "build", source, "--output", output, *options)
        wait_until(lambda: progress(output) >= moment, process)  # noqa: B023
        fill(small_disk)
        last, _ = process.communicate(timeout=120)
        assert process.returncode == 2, last
        line = f"mlm-train: {output} cannot be written: No space left on device; free space or choose"
        assert last.startswith(line) and last.count("\n") == 1, last
        assert progress(output) >= moment and not list(output.glob(".*.part"))
        (small_disk / "other").unlink()
    done = BuildState.load(LocalFolder(output)).done.values()
    kept = {part.file: (output / part.file).stat().st_ino for part in done}
    files = contents(output)
    for folder in (output, tmp_path / "unbroken"):
        process = start("tol", "build", source, "--output", folder, *options)
        assert process.communicate(timeout=120) and process.returncode == 0
    whole = contents(output)
    assert 1 <= len(kept) < 300 and all(file.endswith(".safetensors") for file in kept)
    assert {name: (output / name).stat().st_ino for name in kept} == kept
    assert all(whole[name] == files[name] for name in files if name.startswith("rows-"))
    assert same(output, tmp_path / "unbroken")


def test_two_builders(source: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "tol"
    first = builder(source, output, GROUPS)
    wait_until(lambda: progress(output) >= 0, first)
    second = start("tol", "build", source, "--output", output)
    said, _ = second.communicate(timeout=60)
    assert first.poll() is None and second.returncode == 2
    line = f"mlm-train: {output} is being built by another process; wait for it or name another\n"
    assert said == line
    assert first.wait(120) == 0, first.communicate()[1]
    assert same(output, unbroken["groups"])


def test_a_draft_that_was_thrown_away(source: Path, tmp_path: Path) -> None:
    """A late worker makes no file of it, and its error ends no build."""
    build = build_of(source, tmp_path, GROUPS)
    layout = Layout.of(build.plan.spec, 3, 32)
    scheduler = PartitionScheduler(LocalFolder(tmp_path), build.plan, layout.shape, [0], build.groups(1, 2))
    first, second = scheduler.next(()), scheduler.next(())
    assert first is not None and second is not None and first.draft == second.draft
    assert scheduler.ended(first, WorkerDied("killed")) is None
    with pytest.raises(FileNotFoundError) as late:
        Draft(tmp_path / second.draft, layout.shape, 10)
    assert scheduler.ended(second, late.value) is None
    third = scheduler.next(())
    assert third is not None and [tmp_path / third.draft] == list(tmp_path.iterdir())
    with pytest.raises(OSError, match="full"):
        scheduler.ended(third, OSError("full"))


def test_workers_that_never_start(source: Path, ray: None, tmp_path: Path) -> None:
    """Their constructor fails: threads=0 is what torch refuses."""
    job = build_of(source, tmp_path, GROUPS).job
    pool = WorkerPool(replace(job, plan=job.plan.model_copy(update={"threads": 0})), 2, 0)
    with pytest.raises(UserError, match="workers die as they start"):
        while True:
            pool.finished()
    pool.dismiss()


def test_workers_without_a_place_are_told_once(
    source: Path,
    ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mlm_train.tol.build.worker_pool.PATIENCE", 0.0)
    pool = WorkerPool(build_of(source, tmp_path, GROUPS).job, 3, 1)
    try:
        while len(pool.idle) < 2:
            pool.finished()
        pool.finished()
    finally:
        pool.dismiss()
    told = capsys.readouterr().err
    assert re.fullmatch(r"[123] of 3 workers have not started: .*free in Ray: \d of 2 CPUs.*\n", told), told


def test_a_log_has_lines_with_the_remaining_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((100.0, 130.0, 161.0, 170.0, 222.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with ByteProgress("rows", 10_000_000_000) as progress:
        for done in (4_000_000_000, 4_100_000_000, 5_000_000_000, 5_100_000_000, 7_050_000_000):
            progress.show(done)
    assert capsys.readouterr().err.splitlines() == [
        "rows: 5.00 GB of 10.00 GB, 16.39 MB/s, 0:05:05 left",
        "rows: 7.05 GB of 10.00 GB, 25.00 MB/s, 0:01:58 left",
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_damage_before_a_build_goes_on(source: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    """Files that are damaged are made again, with all that depends on them; a damaged state is refused."""
    output = tmp_path / "tol"
    for moment, damages in ((1, ("spectrum", "plan")), (8, ("state", "rows", "basis"))):
        process = builder(source, output, LOW_RANK)
        wait_until(lambda: progress(output) >= moment, process)  # noqa: B023
        left = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        end(left)
        state = BuildState.load(LocalFolder(output))
        for damage in damages:
            folder = shutil.copytree(output, tmp_path / damage)
            DAMAGES[damage](folder, state)
            if damage == "state":
                with pytest.raises(UserError, match=r"damaged; remove .* and build again"):
                    build_of(source, folder, LOW_RANK).run()
            elif damage == "plan":
                build_of(source, folder, GROUPS).run()
                assert same(folder, unbroken["groups"])
            else:
                kept = {part.file: (folder / part.file).stat().st_ino for part in state.done.values()}
                build_of(source, folder, LOW_RANK).run()
                assert same(folder, unbroken["low_rank"])
                again = [name for name in kept if (folder / name).stat().st_ino != kept[name]]
                assert len(again) == {"spectrum": 0, "rows": 2, "basis": len(kept)}[damage]


def _cut_and_flip(folder: Path, state: BuildState) -> None:
    one, other, *_ = (folder / part.file for part in state.done.values())
    flip(one)
    other.write_bytes(other.read_bytes()[:-1])


def _change_a_digit(folder: Path, state: BuildState) -> None:
    text = (folder / STATE).read_text()
    rank = f'"rank": {next(scheme.rank for scheme in state.layout.schemes if scheme.rank)}'
    assert rank in text
    (folder / STATE).write_text(text.replace(rank, rank[:-1] + str((int(rank[-1]) + 1) % 10), 1))


DAMAGES: dict[str, Callable[[Path, BuildState], None]] = {
    "spectrum": lambda folder, state: flip(folder / next(iter(state.spectra.values())).file),
    "plan": lambda folder, state: None,  # another one
    "state": _change_a_digit,
    "rows": _cut_and_flip,
    "basis": lambda folder, state: flip(folder / BASIS),
}
