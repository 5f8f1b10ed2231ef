"""Building tables at a URL: S3 over HTTP (moto), and file://, where files are visible while incomplete."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlm_train.errors import UserError
from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.state import BuildState
from mlm_train.tol.format.index import BASIS, INDEX, STATE
from mlm_train.tol.format.index_file import index_at
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.storage.lease import OWNER
from mlm_train.tol.storage.resolve import storage_at
from mlm_train.tol.tools.fetch import fetch_tol
from mlm_train.tol.tools.verify import verify_tol
from tests.commands import ROOT, refused, start
from tests.objects import Objects
from tests.tol.conftest import export, random_model
from tests.tol.processes import kill_leftovers, worker_processes
from tests.tol.stores import OPTIONS, build, done, kill, names, put, wait_until
from tests.tol.test_compress import MIXED
from tests.tol.test_faults import same

SMALL: dict[str, Any] = {"partitions": 5, "chunk_rows": 50}
SPECS = {
    "plain": TableSpec(),
    "int4": TableSpec(dtype="int4", group_size=8),
    "mixed": TableSpec(schemes=MIXED),  # low rank, bits, groups
}
pytestmark = pytest.mark.usefixtures("short_settle")


@pytest.fixture(scope="module")
def folders(exported: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The table of each of SPECS in a folder, and the mixed one compressed from the int4 one."""
    root = tmp_path_factory.mktemp("folders")
    for name, spec in SPECS.items():
        build(exported, root / name, spec, group_bytes=1, **SMALL).run()
    Build(None, root / "again", SPECS["mixed"], table=root / "int4", **SMALL).run()
    return {name: root / name for name in (*SPECS, "again")}


@pytest.mark.parametrize("name", SPECS)
def test_the_bytes_of_a_folder(
    name: str, url: str, exported: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Built from weights and from a table; verified there, fetched, and verified against the weights."""
    build(exported, url, SPECS[name], **SMALL).run()
    index = index_at(storage_at(url))
    files = [part.file for part in index.partitions] + ([BASIS] if index.basis else [])
    assert names(url) == sorted([INDEX, *files])
    assert not verify_tol(url).damages
    fetch_tol(url, tmp_path / "fetched")
    assert same(tmp_path / "fetched", folders[name])
    assert not verify_tol(tmp_path / "fetched", exported).damages
    if name == "int4":
        Build(None, f"{url}-2", SPECS["mixed"], table=folders["int4"], **SMALL).run()
        fetch_tol(f"{url}-2", tmp_path / "fetched2")
        assert same(tmp_path / "fetched2", folders["again"])


@pytest.mark.parametrize("url", ["s3", pytest.param("file", marks=pytest.mark.long)], indirect=True)
def test_a_killed_builder_is_resumed(
    url: str, url_model: Path, url_reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it fills partitions; its successor rebuilds no committed one."""
    monkeypatch.setenv("MLM_TOL_FRESH_SECONDS", "2")
    first = start("tol", "build", url_model, "--output", url, *OPTIONS)
    wait_until(lambda: done(url) >= 3, first)
    kill(first)
    storage = storage_at(url)
    state = BuildState.load(storage)
    assert state is not None and OWNER in names(url) and INDEX not in names(url)
    put(url, f".{STATE}.writing", b"half")
    # Zeros of the same size would change if the partition were rebuilt: committed files are checked by size.
    kept = next(iter(state.done.values())).file
    data = storage.read(kept) or b""
    put(url, kept, bytes(len(data)))
    output = ""
    time.sleep(2)
    for _ in range(5):  # rejected while the first one's lease is fresh
        last = start("tol", "build", url_model, "--output", url, *OPTIONS)
        output, _ = last.communicate(timeout=100)
        if last.returncode == 0:
            break
        assert "is being built by process" in output and output.count("\n") == 1, output
        time.sleep(1)
    assert f"{url}: taken over from process {first.pid} on " in output
    assert storage.read(kept) == bytes(len(data))
    put(url, kept, data)
    fetch_tol(url, tmp_path / "fetched")
    assert same(tmp_path / "fetched", url_reference) and OWNER not in names(url)
    assert not [name for name in names(url) if name.startswith(".") and not name.endswith(".writing")]


def test_killed_workers(
    s3: str, url_model: Path, url_reference: Path, objects: Objects, tmp_path: Path
) -> None:
    """Killed while the upload of a partition is held up, which arrives later."""
    objects.hold("PUT", "rows-00007")
    building = threading.Thread(target=build(url_model, s3).run)
    building.start()
    assert objects.waiting.wait(100)
    for victim in worker_processes(psutil.Process(), "fill"):
        victim.kill()
    time.sleep(0.5)
    objects.release()
    building.join(100)
    fetch_tol(s3, tmp_path / "fetched")
    assert same(tmp_path / "fetched", url_reference) and OWNER not in names(s3)


def test_a_store_that_denies_access(
    s3: str, url_model: Path, url_reference: Path, objects: Objects, tmp_path: Path
) -> None:
    """To a worker, and to the builder: one line, and the next build resumes."""
    for name in (STATE, BASIS, "rows-00007"):  # in the order in which they are written
        with objects.denying(name):
            line = refused("tol", "build", url_model, "--output", s3, *OPTIONS)
        assert line.startswith(f"mlm-train: {s3}/{name}") and "Access Denied; check the address" in line
        assert OWNER not in names(s3)
    last = start("tol", "build", url_model, "--output", s3, *OPTIONS)
    assert last.communicate(timeout=100) and last.returncode == 0
    fetch_tol(s3, tmp_path / "fetched")
    assert same(tmp_path / "fetched", url_reference)


def test_two_builders(
    s3: str, url_model: Path, url_reference: Path, objects: Objects, tmp_path: Path
) -> None:
    objects.hold("PUT", "rows-00007")
    first = start("tol", "build", url_model, "--output", s3, *OPTIONS)
    assert objects.waiting.wait(100)
    second = start("tol", "build", url_model, "--output", s3, *OPTIONS)
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 2 and first.poll() is None
    line = f"mlm-train: {s3} is being built by process {first.pid} on {socket.gethostname()}; wait for it"
    assert output.startswith(f"{line} (or 60 s if it is gone)") and output.count("\n") == 1, output
    objects.release()
    output, _ = first.communicate(timeout=100)
    assert first.returncode == 0, output
    fetch_tol(s3, tmp_path / "fetched")
    assert same(tmp_path / "fetched", url_reference)


HOLD = """
import sys, time
from mlm_train.errors import UserError
from mlm_train.tol.storage.resolve import storage_at
storage = storage_at(sys.argv[1])
storage.names()
print("ready", flush=True)
sys.stdin.readline()
try:
    with storage.locked("being built"):
        time.sleep(3)
        storage.write("mine", b"1")
except UserError as error:
    sys.exit(str(error))
"""


def test_three_start_at_once(s3: str) -> None:
    """Exactly one of them gets the lease."""
    command = [sys.executable, "-c", HOLD, s3]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1, 1], errors
    assert all("taken over by" in line or "is being built by" in line for line in errors if line), errors
    assert names(s3) == ["mine"]


def test_a_sleeping_owner_loses_its_lease(
    s3: str,
    url_model: Path,
    url_reference: Path,
    objects: Objects,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another builder takes over and finishes; the first one wakes, reports it, and changes nothing."""
    monkeypatch.setenv("MLM_TOL_FRESH_SECONDS", "2")
    objects.hold("PUT", "rows-00007")
    first = start("tol", "build", url_model, "--output", s3, *OPTIONS)
    assert objects.waiting.wait(100)
    first.send_signal(signal.SIGSTOP)
    objects.release()
    time.sleep(2)
    second = start("tol", "build", url_model, "--output", s3, *OPTIONS)
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 0 and "taken over from" in output, output
    fetch_tol(s3, tmp_path / "fetched")
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGCONT)
    output, _ = first.communicate(timeout=100)
    kill_leftovers(children)
    assert first.returncode == 2
    line = f"mlm-train: {s3} was taken over by another process, which has ended; this process exits"
    assert output.startswith(line) and output.count("\n") == 1, output
    assert same(tmp_path / "fetched", url_reference)
    assert fetch_tol(s3, tmp_path / "fetched") and INDEX in names(s3) and STATE not in names(s3)


def test_unfinished_builds(url: str, exported: Path, ray: None, tmp_path: Path) -> None:
    """Committed files are checked by size; another plan, a damaged state and other files are rejected."""
    building = build(exported, url, TableSpec(), partitions=6)
    index, storage = building.run(), building.storage
    with pytest.raises(UserError, match="exists already and nothing is overwritten"):
        building.run()
    storage.remove(INDEX)
    state = BuildState(plan=building.plan, done=dict(enumerate(index.partitions)))
    state.sums = {number: [(0.0, 0.0)] * 3 for number in state.done}
    state.save(storage)
    with pytest.raises(UserError, match=r"unfinished build with partitions=6, not partitions=5"):
        build(exported, url, TableSpec(), partitions=5).run()
    other = export(tmp_path / "other", random_model(intermediate_size=30))
    with pytest.raises(UserError, match="unfinished build of another model"):
        build(other, url, TableSpec(), partitions=6).run()
    text = (storage.read(STATE) or b"").decode()
    changed = text.replace('"threads": 1', '"threads": 2')
    assert changed != text
    put(url, STATE, changed.encode())
    with pytest.raises(UserError, match=rf"{url}/{STATE} is damaged; remove {url} and build again"):
        building.run()
    put(url, STATE, text.encode())
    put(url, index.partitions[3].file, b"cut")
    storage.remove(index.partitions[5].file)
    assert building.run().partitions == index.partitions
    assert not verify_tol(url).damages and OWNER not in names(url)


def test_a_folder_by_two_names(url_model: Path, tmp_path: Path) -> None:
    """A path and its file:// URL share one lock."""
    names = (str(tmp_path / "tol"), f"file://{tmp_path}/tol")
    for first, second in (names, names[::-1]):
        with storage_at(first).locked("being built"):
            line = refused("tol", "build", url_model, "--output", second)
            assert line.endswith("tol is being built by another process; wait for it or name another")


def test_an_unreadable_lease_is_nobodys(s3: str, url_model: Path, ray: None) -> None:
    put(s3, OWNER, json.dumps({"id": "x"}).encode())
    build(url_model, s3, TableSpec(), partitions=2).run()
    assert OWNER not in names(s3)
