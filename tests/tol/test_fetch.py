"""`tol fetch`, damage of tables at a URL, and addresses that cannot be used."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlm_train.errors import UserError
from mlm_train.tol.build.builder import Build
from mlm_train.tol.format.index import FETCHED, INDEX
from mlm_train.tol.format.index_file import index_at
from mlm_train.tol.storage.resolve import storage_at
from mlm_train.tol.storage.urls import refuse_url
from mlm_train.tol.tools.fetch import fetch_tol
from mlm_train.tol.tools.verify import verify_tol
from mlm_train.utils.url_folder import store_errors
from tests.commands import refused, start
from tests.objects import Objects
from tests.tol.stores import PARTITIONS, build, flip
from tests.tol.test_faults import same

pytestmark = pytest.mark.usefixtures("short_settle")


def test_a_flipped_byte(url: str, url_model: Path, url_reference: Path, ray: None, tmp_path: Path) -> None:
    """Found by verify and by fetch, which keeps intact files; repaired at the URL and in the copy."""
    build(url_model, url).run()
    flip(url, (bad := index_at(storage_at(url)).partitions[17]).file)
    assert [str(damage).partition(":")[0] for damage in verify_tol(url).damages] == [bad.file]
    line = refused("tol", "fetch", url, tmp_path / "fetched")
    assert line.startswith(f"mlm-train: {url}/{bad.file} is damaged") and "--repair" in line
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "fetched").iterdir()}
    assert INDEX not in inodes and FETCHED in inodes and bad.file not in inodes and len(inodes) == 19
    again = Build.like_index(url, url_model, None).repair()
    assert [part.file for part in again] == [bad.file]
    fetch_tol(url, tmp_path / "fetched")
    assert same(tmp_path / "fetched", url_reference)
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "fetched").iterdir()}
    assert all(kept[name] == inode for name, inode in inodes.items() if name in kept)
    flip(f"file://{tmp_path}/fetched", bad.file)
    fetch_tol(url, tmp_path / "fetched")
    assert same(tmp_path / "fetched", url_reference)


def test_a_killed_fetch_is_resumed(
    s3: str, url_model: Path, url_reference: Path, ray: None, objects: Objects, tmp_path: Path
) -> None:
    build(url_model, s3).run()
    folder = tmp_path / "fetched"
    objects.hold("GET", "rows-00021")
    process = start("tol", "fetch", s3, folder)
    assert objects.waiting.wait(100)
    process.kill()
    process.wait()
    objects.release()
    inodes = {path.name: path.stat().st_ino for path in folder.glob("rows-*")}
    assert len(inodes) == 21 and not (folder / INDEX).exists() and list(folder.glob(".*.part"))
    assert "21 rows" not in refused("tol", "verify", folder)
    process = start("tol", "fetch", s3, folder)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert output.startswith(f"{folder}: 2003 rows in {PARTITIONS} partitions, ")
    assert output.endswith(f"copied from {s3}\n")
    assert {name: (folder / name).stat().st_ino for name in inodes} == inodes
    assert same(folder, url_reference)


def test_fetch_refuses(tables: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad sources and targets; the source may be a folder, too."""
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
        "memory://tol": "give a URL that means the same storage on all nodes",
    }
    for url, message in cases.items():
        line = refused("tol", "build", exported, "--output", url)
        assert line.startswith(f"mlm-train: {url}") and message in line, line
    output = ("--output", "s3://bucket/new")
    for arguments in (
        ("tol", "inspect", "s3://bucket/tol"),
        ("tol", "compress", "s3://bucket/tol", "--dtype", "int8", *output),
        ("generate", "--model", exported, "--prompt-ids", "1", "--tol", "s3://bucket/tol"),
    ):
        assert "is a URL; copy the table first: mlm-train tol fetch s3://bucket/" in refused(*arguments)
    assert "tol fetch" in refused("tol", "verify", "s3://bucket/tol", "--model", exported)
    assert "--sample compares rows" in refused("tol", "verify", "s3://bucket/tol", "--sample", 3)
    assert "does not exist" in refused("tol", "verify", "s3://bucket/tol")
    with pytest.raises(UserError, match=r"sftp://me@host/tol is a URL"):
        refuse_url("sftp://me:secret@host/tol")
    (folder := tmp_path / "odd:" / "tol").mkdir(parents=True)
    refuse_url(folder)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "s3://b/t: No space left on device; free space or choose"),
        (PermissionError("Access Denied"), "s3://b/t: Access Denied; check the address, the network and"),
        (PermissionError(13, "Permission denied"), "s3://b/t: Permission denied; check the permissions"),
    ],
)
def test_advice_fits_the_error(error: OSError, message: str) -> None:
    with pytest.raises(UserError) as raised, store_errors("s3://b/t"):
        raise error
    assert str(raised.value).startswith(message)


def test_urls_as_they_were_given() -> None:
    for given, shown in (
        ("file:///tmp/u1", "file:///tmp/u1"),
        (Path("file:///tmp/u1"), "file:///tmp/u1"),
        (Path("s3://bucket/u1"), "s3://bucket/u1"),
    ):
        with pytest.raises(UserError, match=rf"^{shown} is a URL; .* mlm-train tol fetch {shown} FOLDER$"):
            refuse_url(given)
    line = refused("tol", "fetch", "s3://bucket/tol", "file:///tmp/u1")
    assert line == "mlm-train: file:///tmp/u1 is a URL; name a folder: a copy is read from there"
