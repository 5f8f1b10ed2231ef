"""Tables at a URL: a real S3 over HTTP (moto), and file://, where a file is seen before it is whole."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlm_train.errors import UserError
from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.state import BuildState
from mlm_train.tol.format.index import BASIS, FETCHED, INDEX, STATE
from mlm_train.tol.format.index_file import index_at
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.storage import lease
from mlm_train.tol.storage.lease import OWNER
from mlm_train.tol.storage.object_store import reaching
from mlm_train.tol.storage.resolve import storage_at
from mlm_train.tol.storage.urls import refuse_url
from mlm_train.tol.tools.fetch import fetch_tol
from mlm_train.tol.tools.verify import verify_tol
from tests.commands import ROOT, refused, start
from tests.tol.conftest import end, export, random_model
from tests.tol.stores import Objects, done, flip, kill, names, put, wait_until
from tests.tol.test_compress import MIXED
from tests.tol.test_faults import same, workers

PARTITIONS = 24
SMALL: dict[str, Any] = {"partitions": 5, "chunk_rows": 50}
LOW_RANK = TableSpec(dtype="int8", group_size=8, rank=16)
OPTIONS = ("--dtype", "int8", "--group-size", "8", "--rank", "16", "--partitions", PARTITIONS)
STORAGES = {
    "plain": TableSpec(),
    "int4": TableSpec(dtype="int4", group_size=8),
    "mixed": TableSpec(schemes=MIXED),  # low rank, bits, groups
}


@pytest.fixture(scope="module")
def objects(s3_socket: socket.socket) -> Iterator[Objects]:
    objects = Objects(s3_socket)
    thread = threading.Thread(target=objects.server.serve_forever, daemon=True)
    thread.start()
    import fsspec

    fsspec.filesystem("s3").mkdir("bucket")
    yield objects
    objects.release()
    objects.server.shutdown()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where no two builders begin at once."""
    monkeypatch.setattr(lease, "SETTLE", 0.05)


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, objects: Objects, tmp_path: Path) -> str:
    """A new place."""
    return f"s3://bucket/{tmp_path.name}" if request.param == "s3" else f"file://{tmp_path}/store/tol"


@pytest.fixture
def s3(objects: Objects, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("url") / "model", random_model(vocab_size=2003))


@pytest.fixture(scope="module")
def unbroken(source: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every build of LOW_RANK must come to, in a folder, by several groups of layers."""
    folder = tmp_path_factory.mktemp("unbroken") / "tol"
    Build(source, folder, LOW_RANK, partitions=PARTITIONS, group_bytes=1).run()
    return folder


def build(source: Path, output: str | Path, spec: TableSpec = LOW_RANK, **options: Any) -> Build:
    return Build(source, output, spec, **{"partitions": PARTITIONS} | options)


@pytest.fixture(scope="module")
def folders(exported: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each of STORAGES must come to, in a folder; and the mixed one from the table in int4."""
    root = tmp_path_factory.mktemp("folders")
    for name, spec in STORAGES.items():
        build(exported, root / name, spec, group_bytes=1, **SMALL).run()
    Build(None, root / "again", STORAGES["mixed"], table=root / "int4", **SMALL).run()
    return {name: root / name for name in (*STORAGES, "again")}


@pytest.mark.parametrize("name", STORAGES)
def test_the_bytes_of_a_folder(
    name: str, url: str, exported: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """From weights and from a table; verified there, fetched, and verified from the weights."""
    build(exported, url, STORAGES[name], **SMALL).run()
    index = index_at(storage_at(url))
    files = [part.file for part in index.partitions] + ([BASIS] if index.basis else [])
    assert names(url) == sorted([INDEX, *files])
    assert not verify_tol(url).damages
    fetch_tol(url, tmp_path / "fetched")
    assert same(tmp_path / "fetched", folders[name])
    assert not verify_tol(tmp_path / "fetched", exported).damages
    if name == "int4":
        Build(None, f"{url}-2", STORAGES["mixed"], table=folders["int4"], **SMALL).run()
        fetch_tol(f"{url}-2", tmp_path / "fetched2")
        assert same(tmp_path / "fetched2", folders["again"])


def test_a_killed_builder_goes_on(
    url: str, source: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it fills partitions, once; its successor makes no committed one again."""
    monkeypatch.setenv("MLM_TOL_FRESH_SECONDS", "2")
    first = start("tol", "build", source, "--output", url, *OPTIONS)
    wait_until(lambda: done(url) >= 3, first)
    kill(first)
    storage = storage_at(url)
    state = BuildState.load(storage)
    assert state is not None and OWNER in names(url) and INDEX not in names(url)
    put(url, f".{STATE}.writing", b"half")
    # Would change if it were made again: what was committed is looked at by its size.
    kept = next(iter(state.done.values())).file
    whole = storage.read(kept) or b""
    put(url, kept, bytes(len(whole)))
    said = ""
    time.sleep(2)
    for _ in range(5):  # refused as long as the first one's mark is fresh
        last = start("tol", "build", source, "--output", url, *OPTIONS)
        said, _ = last.communicate(timeout=100)
        if last.returncode == 0:
            break
        assert "is being built by process" in said and said.count("\n") == 1, said
        time.sleep(1)
    assert f"{url}: taken over from process {first.pid} on " in said
    assert storage.read(kept) == bytes(len(whole))
    put(url, kept, whole)
    fetch_tol(url, tmp_path / "fetched")
    assert same(tmp_path / "fetched", unbroken) and OWNER not in names(url)
    assert not [name for name in names(url) if name.startswith(".") and not name.endswith(".writing")]


def test_killed_workers(s3: str, source: Path, unbroken: Path, objects: Objects, tmp_path: Path) -> None:
    """While a partition is on its way, and comes there late; and with the spectra."""
    objects.keep("PUT", "rows-00007")
    one = threading.Thread(target=build(source, s3).run)
    one.start()
    assert objects.waiting.wait(100)
    for victim in workers(psutil.Process(), "fill"):
        victim.kill()
    time.sleep(0.5)
    objects.release()
    one.join(100)
    fetch_tol(s3, tmp_path / "fetched")
    assert same(tmp_path / "fetched", unbroken) and OWNER not in names(s3)


def test_a_store_that_refuses(
    s3: str, source: Path, unbroken: Path, objects: Objects, tmp_path: Path
) -> None:
    """A worker's write, and the builder's; one line, and the next build goes on."""
    for name in (STATE, BASIS, "rows-00007"):  # in the order in which they are written
        with objects.denying(name):
            said = refused("tol", "build", source, "--output", s3, *OPTIONS)
        assert said.startswith(f"mlm-train: {s3}/{name}") and "Access Denied; check the address" in said
        assert OWNER not in names(s3)
    last = start("tol", "build", source, "--output", s3, *OPTIONS)
    assert last.communicate(timeout=100) and last.returncode == 0
    fetch_tol(s3, tmp_path / "fetched")
    assert same(tmp_path / "fetched", unbroken)


def test_two_builders(s3: str, source: Path, unbroken: Path, objects: Objects, tmp_path: Path) -> None:
    objects.keep("PUT", "rows-00007")
    first = start("tol", "build", source, "--output", s3, *OPTIONS)
    assert objects.waiting.wait(100)
    second = start("tol", "build", source, "--output", s3, *OPTIONS)
    said, _ = second.communicate(timeout=100)
    assert second.returncode == 2 and first.poll() is None
    line = f"mlm-train: {s3} is being built by process {first.pid} on {socket.gethostname()}; wait for it"
    assert said.startswith(f"{line}, or 60 s where it is gone") and said.count("\n") == 1, said
    objects.release()
    said, _ = first.communicate(timeout=100)
    assert first.returncode == 0, said
    fetch_tol(s3, tmp_path / "fetched")
    assert same(tmp_path / "fetched", unbroken)


HOLD = """
import sys, time
from mlm_train.errors import UserError
from mlm_train.tol.storage.base import place_of
place = place_of(sys.argv[1])
place.names()
print("ready", flush=True)
sys.stdin.readline()
try:
    with place.held("being built"):
        time.sleep(3)
        place.write("mine", b"1")
except UserError as error:
    sys.exit(str(error))
"""


def test_three_begin_at_once(s3: str) -> None:
    """One of them gets the place, whichever looked first."""
    command = [sys.executable, "-c", HOLD, s3]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1, 1], said
    assert all("taken over by" in line or "is being built by" in line for line in said if line), said
    assert names(s3) == ["mine"]


def test_an_owner_that_sleeps_loses_it(
    s3: str, source: Path, unbroken: Path, objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another builder takes over and ends the work; the first one wakes, says so, and changes nothing."""
    monkeypatch.setenv("MLM_TOL_FRESH_SECONDS", "2")
    objects.keep("PUT", "rows-00007")
    first = start("tol", "build", source, "--output", s3, *OPTIONS)
    assert objects.waiting.wait(100)
    first.send_signal(signal.SIGSTOP)
    objects.release()
    time.sleep(2)
    second = start("tol", "build", source, "--output", s3, *OPTIONS)
    said, _ = second.communicate(timeout=100)
    assert second.returncode == 0 and "taken over from" in said, said
    fetch_tol(s3, tmp_path / "fetched")
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGCONT)
    said, _ = first.communicate(timeout=100)
    end(children)
    assert first.returncode == 2
    line = f"mlm-train: {s3} was taken over by another process, which has ended; this process ends"
    assert said.startswith(line) and said.count("\n") == 1, said
    assert same(tmp_path / "fetched", unbroken)
    assert fetch_tol(s3, tmp_path / "fetched") and INDEX in names(s3) and STATE not in names(s3)


def test_unfinished_builds(url: str, exported: Path, ray: None, tmp_path: Path) -> None:
    """What was committed is kept by its size; another plan, a damaged state and other files are refused."""
    one = build(exported, url, TableSpec(), partitions=6)
    index, storage = one.run(), one.storage
    with pytest.raises(UserError, match="exists already and nothing is overwritten"):
        one.run()
    storage.remove(INDEX)
    state = BuildState(plan=one.plan, done=dict(enumerate(index.partitions)))
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
        one.run()
    put(url, STATE, text.encode())
    put(url, index.partitions[3].file, b"cut")
    storage.remove(index.partitions[5].file)
    assert one.run().partitions == index.partitions
    assert not verify_tol(url).damages and OWNER not in names(url)


def test_a_flipped_byte(url: str, source: Path, unbroken: Path, ray: None, tmp_path: Path) -> None:
    """Found by verify and by fetch, which keeps what is whole; repaired at the URL; fetched damage mended."""
    build(source, url).run()
    flip(url, (bad := index_at(storage_at(url)).partitions[17]).file)
    assert [str(damage).partition(":")[0] for damage in verify_tol(url).damages] == [bad.file]
    said = refused("tol", "fetch", url, tmp_path / "fetched")
    assert said.startswith(f"mlm-train: {url}/{bad.file} is damaged") and "--repair" in said
    there = {path.name: path.stat().st_ino for path in (tmp_path / "fetched").iterdir()}
    assert INDEX not in there and FETCHED in there and bad.file not in there and len(there) == 19
    again = Build.like_index(url, source, None).repair()
    assert [part.file for part in again] == [bad.file]
    fetch_tol(url, tmp_path / "fetched")
    assert same(tmp_path / "fetched", unbroken)
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "fetched").iterdir()}
    assert all(kept[name] == inode for name, inode in there.items() if name in kept)
    flip(f"file://{tmp_path}/fetched", bad.file)
    fetch_tol(url, tmp_path / "fetched")
    assert same(tmp_path / "fetched", unbroken)


def test_a_killed_fetch_goes_on(
    s3: str, source: Path, unbroken: Path, ray: None, objects: Objects, tmp_path: Path
) -> None:
    build(source, s3).run()
    folder = tmp_path / "fetched"
    objects.keep("GET", "rows-00021")
    process = start("tol", "fetch", s3, folder)
    assert objects.waiting.wait(100)
    process.kill()
    process.wait()
    objects.release()
    there = {path.name: path.stat().st_ino for path in folder.glob("rows-*")}
    assert len(there) == 21 and not (folder / INDEX).exists() and list(folder.glob(".*.part"))
    assert "21 rows" not in refused("tol", "verify", folder)
    process = start("tol", "fetch", s3, folder)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and said.startswith(f"{folder}: 2003 rows in {PARTITIONS} partitions, ")
    assert said.endswith(f"as at {s3}\n")
    assert {name: (folder / name).stat().st_ino for name in there} == there
    assert same(folder, unbroken)


def test_fetch_refuses(tables: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder too."""
    table = tables["float16"]
    fetch_tol(table, tmp_path / "copy")
    assert same(tmp_path / "copy", table)
    with pytest.raises(UserError, match="holds another table than"):
        fetch_tol(tables["bfloat16"], tmp_path / "copy")
    with pytest.raises(UserError, match="to itself"):
        fetch_tol(table, table)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(UserError, match="nothing is overwritten"):
        fetch_tol(table, tmp_path / "used")
    with pytest.raises(UserError, match=r"tol\.index\.json does not exist"):
        fetch_tol(tmp_path / "none", tmp_path / "new")
    with pytest.raises(UserError, match="is a URL; copy the table first"):
        fetch_tol(table, "s3://bucket/x")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"144\.06 kB and has 100 bytes free"):
        fetch_tol(table, tmp_path / "full")


def test_bad_addresses(objects: Objects, exported: Path, tables: dict[str, Path], tmp_path: Path) -> None:
    missing = next(scheme for scheme, module in {"gs": "gcsfs", "abfs": "adlfs", "sftp": "paramiko"}.items()
                   if find_spec(module) is None)  # fmt: skip
    (tmp_path / "file").touch()
    cases = {
        f"{missing}://bucket/tol": "needs the package",
        "nowhere://bucket/tol": "there is no nowhere://; give s3://",
        "s3://": "name a folder in it",
        "file://": "name a folder in it",
        "simplecache::s3://bucket/tol": "not a chain",
        "s3://no-such-bucket/tol": "bucket does not exist",
        f"file://{tmp_path}/file/tol": "Not a directory",
        "memory://tol": "give a URL that means one place on all nodes",
    }
    for url, message in cases.items():
        said = refused("tol", "build", exported, "--output", url)
        assert said.startswith(f"mlm-train: {url}") and message in said, said
    output = ("--output", "s3://bucket/new")
    for words in (
        ("tol", "inspect", "s3://bucket/tol"),
        ("tol", "compress", "s3://bucket/tol", "--dtype", "int8", *output),
        ("generate", "--model", exported, "--prompt-ids", "1", "--tol", "s3://bucket/tol"),
    ):
        assert "is a URL; copy the table first: mlm-train tol fetch s3://bucket/" in refused(*words)
    assert "tol fetch" in refused("tol", "verify", "s3://bucket/tol", "--model", exported)
    assert "--sample compares rows" in refused("tol", "verify", "s3://bucket/tol", "--sample", 3)
    assert "does not exist" in refused("tol", "verify", "s3://bucket/tol")
    with pytest.raises(UserError, match=r"sftp://me@host/tol is a URL"):
        refuse_url("sftp://me:secret@host/tol")
    (folder := tmp_path / "odd:" / "tol").mkdir(parents=True)
    refuse_url(folder)


def test_a_folder_by_two_names(source: Path, tmp_path: Path) -> None:
    """One lock, whichever name came first."""
    names = (str(tmp_path / "tol"), f"file://{tmp_path}/tol")
    for first, second in (names, names[::-1]):
        with storage_at(first).held("being built"):
            said = refused("tol", "build", source, "--output", second)
            assert said.endswith("tol is being built by another process; wait for it or name another")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "s3://b/t: No space left on device; free space or choose"),
        (PermissionError("Access Denied"), "s3://b/t: Access Denied; check the address, the network and"),
        (PermissionError(13, "Permission denied"), "s3://b/t: Permission denied; check the permissions"),
    ],
)
def test_advice_fits_the_error(error: OSError, message: str) -> None:
    with pytest.raises(UserError) as told, reaching("s3://b/t"):
        raise error
    assert str(told.value).startswith(message)


def test_urls_as_they_were_given() -> None:
    for given, shown in (
        ("file:///tmp/u1", "file:///tmp/u1"),
        (Path("file:///tmp/u1"), "file:///tmp/u1"),
        (Path("s3://bucket/u1"), "s3://bucket/u1"),
    ):
        with pytest.raises(UserError, match=rf"^{shown} is a URL; .* mlm-train tol fetch {shown} FOLDER$"):
            refuse_url(given)
    said = refused("tol", "fetch", "s3://bucket/tol", "file:///tmp/u1")
    assert said == "mlm-train: file:///tmp/u1 is a URL; name a folder: a copy is read from there"


def test_a_garbled_mark_is_nobodys(s3: str, source: Path, ray: None) -> None:
    put(s3, OWNER, json.dumps({"id": "x"}).encode())
    build(source, s3, TableSpec(), partitions=2).run()
    assert OWNER not in names(s3)
