"""A ToL build whose processes, nodes, disk or files fail: committed work is neither lost nor wrong."""

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
from tests.tol.conftest import export, random_model
from tests.tol.processes import kill_leftovers, worker_processes

ROWS, PARTITIONS, CHUNK = 12007, 16, 16
LOW_RANK = {"dtype": "int8", "group_size": 8, "budget": ROWS * 60}
GROUPS = {"dtype": "float32"}
CODE = """
import json, sys
from mlm_train.tol.build.builder import Build
from mlm_train.tol.format.layout import TableSpec
model, output, spec, options, run = json.loads(sys.argv[1])
Build(model, output, TableSpec(**spec), **options).run(**run)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary is large enough for a build of some seconds."""
    return export(tmp_path_factory.mktemp("faults") / "model", random_model(vocab_size=ROWS))


def options_of(spec: dict[str, Any]) -> dict[str, int]:
    """Options for tasks of one layer, or of all layers of a partition."""
    groups = {"group_bytes": 1} if spec == GROUPS else {}
    return {"partitions": PARTITIONS, "chunk_rows": CHUNK, **groups}


def build_of(model: Path, output: Path, spec: dict[str, Any]) -> Build:
    return Build(model, output, TableSpec(**spec), **options_of(spec))


def builder(model: Path, output: Path, spec: dict[str, Any], **run: object) -> "subprocess.Popen[str]":
    """Run build_of in a process of its own."""
    arguments = json.dumps([str(model), str(output), spec, options_of(spec), run])
    command = [sys.executable, "-c", CODE, arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def unbroken(source: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tables that every broken build must equal."""
    root = tmp_path_factory.mktemp("unbroken")
    for name, spec in (("low_rank", LOW_RANK), ("groups", GROUPS)):
        started = time.monotonic()
        build_of(source, root / name, spec).run()
        print(json.dumps({"unbroken": name, "seconds": round(time.monotonic() - started, 1)}))
    return {name: root / name for name in ("low_rank", "groups")}


def contents(folder: Path) -> dict[str, object]:
    """Every file; the index without its time and its digest."""
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
    """0 once there is a state, 1 to 3 with so many spectra, 4 with a layout, and 1 more per partition."""
    if not (folder / STATE).exists():
        return -1
    state = BuildState.load(LocalFolder(folder))
    return len(state.spectra) + 4 * (state.layout is not None) + len(state.done)


@pytest.mark.long
def test_every_worker_is_killed_in_turn(source: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    """Three while they compute spectra and six while they fill partitions, replacements among them."""
    output = tmp_path / "tol"
    build = threading.Thread(target=build_of(source, output, LOW_RANK).run)
    started = time.monotonic()
    build.start()
    killed: list[int] = []
    drafts: set[str] = set()
    for task, count in (("spectrum", 3), ("fill", 9), ("", 9)):
        while build.is_alive() and (len(killed) < count or not task):
            assert time.monotonic() < started + 200, "the build hangs"
            drafts |= {path.name for path in output.glob(".rows-*.part")}
            for victim in worker_processes(psutil.Process(), task):
                if victim.pid not in killed and len(killed) < count:
                    victim.kill()
                    killed.append(victim.pid)
            time.sleep(0.02)
    assert len(killed) == 9
    assert same(output, unbroken["low_rank"])
    seconds, restarted = round(time.monotonic() - started, 1), len(drafts) - PARTITIONS
    print(json.dumps({"workers killed": 9, "partitions restarted": restarted, "seconds": seconds}))


@pytest.mark.long
def test_the_builder_is_killed_at_random_moments(
    source: Path, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    """Before and while it computes spectra, about when it commits the layout, and while it fills partitions.

    Ray's processes of each killed builder live on into the next build.
    """
    output, left, restarted, started = tmp_path / "tol", [], 0, time.monotonic()
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
        kill_leftovers(left)
        left = children
        state = BuildState.load(LocalFolder(output))
        inodes = {part.file: (output / part.file).stat().st_ino for part in state.done.values()}
        assert kept.items() <= inodes.items()
        restarted += len(list(output.glob(".rows-*.part")))
        kept = inodes
    last = builder(source, output, LOW_RANK)
    assert last.wait() == 0, last.communicate()[1]
    kill_leftovers(left)
    assert kept.items() <= {path.name: path.stat().st_ino for path in output.iterdir()}.items()
    assert same(output, unbroken["low_rank"])
    seconds = round(time.monotonic() - started, 1)
    figures = {"builder killed": len(moments), "partitions restarted": restarted, "seconds": seconds}
    print(json.dumps(figures))


@pytest.mark.long  # tests/tol/test_nodes.py has two nodes, tests/slurm/test_tol.py loses one
@pytest.mark.parametrize("name", ["low_rank", "groups"])
def test_two_nodes(
    source: Path, unbroken: dict[str, Path], tmp_path: Path, cluster: "subprocess.Popen[str]", name: str
) -> None:
    """More workers than CPUs; then a node is removed during a build, with its worker."""
    assert cluster.stdin is not None and cluster.stdout is not None
    spec = {"low_rank": LOW_RANK, "groups": GROUPS}[name]
    run = {"workers": 5, "ray_address": cluster.stdout.readline().strip()}
    whole = builder(source, tmp_path / "whole", spec, **run)
    assert whole.wait(120) == 0, whole.communicate()[1]
    assert same(tmp_path / "whole", unbroken[name])
    started = time.monotonic()
    process = builder(source, tmp_path / "tol", spec, **run)
    wait_until(lambda: progress(tmp_path / "tol") >= 5, process)
    cluster.stdin.write("remove\n")
    cluster.stdin.flush()
    assert cluster.stdout.readline() == "removed\n"
    assert process.poll() is None, "the build ended before its node was removed"
    assert process.wait(120) == 0, process.communicate()[1]
    assert same(tmp_path / "tol", unbroken[name])
    print(json.dumps({"node removed": name, "seconds": round(time.monotonic() - started, 1)}))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: that takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Use up all free space."""
    with contextlib.suppress(OSError), (disk / "other").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_the_disk_fills(source: Path, ray: None, tmp_path: Path, small_disk: Path) -> None:
    """Before the first spectrum, and after some partitions; the same command finishes once there is space."""
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
    text, _ = second.communicate(timeout=60)
    assert first.poll() is None and second.returncode == 2
    line = f"mlm-train: {output} is being built by another process; wait for it or name another\n"
    assert text == line
    assert first.wait(120) == 0, first.communicate()[1]
    assert same(output, unbroken["groups"])


def test_a_discarded_draft(source: Path, tmp_path: Path) -> None:
    """A late worker does not create it again, and its error ends no build."""
    build = build_of(source, tmp_path, GROUPS)
    layout = Layout.of(build.plan.spec, 3, 32)
    scheduler = PartitionScheduler(LocalFolder(tmp_path), build.plan, layout.shape, [0], build.groups(1, 2))
    first, second = scheduler.next(()), scheduler.next(())
    assert first is not None and second is not None and first.draft == second.draft
    assert scheduler.on_result(first, WorkerDied("killed")) is None
    with pytest.raises(FileNotFoundError) as late:
        Draft(tmp_path / second.draft, layout.shape, 10)
    assert scheduler.on_result(second, late.value) is None
    third = scheduler.next(())
    assert third is not None and [tmp_path / third.draft] == list(tmp_path.iterdir())
    with pytest.raises(OSError, match="full"):
        scheduler.on_result(third, OSError("full"))


def test_workers_that_never_start(source: Path, ray: None, tmp_path: Path) -> None:
    """Their constructor fails: torch rejects threads=0."""
    job = build_of(source, tmp_path, GROUPS).job
    pool = WorkerPool(replace(job, plan=job.plan.model_copy(update={"threads": 0})), 2, 0)
    with pytest.raises(UserError, match="workers die as they start"):
        while True:
            pool.finished()
    pool.shutdown()


def test_waiting_workers_are_reported_once(
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
        pool.shutdown()
    text = capsys.readouterr().err
    assert re.fullmatch(r"[123] of 3 workers have not started: .*free in Ray: \d of 2 CPUs.*\n", text), text


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


def test_damage_before_a_build_is_resumed(source: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    """Damaged files are rebuilt, with all that depends on them; a damaged state is rejected."""
    output = tmp_path / "tol"
    for moment, damages in ((1, ("spectrum", "plan")), (8, ("state", "rows", "basis"))):
        process = builder(source, output, LOW_RANK)
        wait_until(lambda: progress(output) >= moment, process)  # noqa: B023
        left = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        kill_leftovers(left)
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
                rebuilt = [name for name in kept if (folder / name).stat().st_ino != kept[name]]
                assert len(rebuilt) == {"spectrum": 0, "rows": 2, "basis": len(kept)}[damage]


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
