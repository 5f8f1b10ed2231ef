"""Checkpoints at a URL beside the run's folder: S3 over HTTP (moto), and file://."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlm_train.checkpoint.load import open_checkpoint
from mlm_train.checkpoint.manifest import MANIFEST
from mlm_train.checkpoint.store import CheckpointStore
from mlm_train.errors import UserError
from mlm_train.parallel import runtime
from mlm_train.utils import url_folder
from mlm_train.utils.url_folder import UrlFolder
from tests.commands import TINY, mlm_train, refused, start, wait_for
from tests.objects import Objects
from tests.ranks import run_on_ranks

CONFIG = "configs/micro.yaml"
MODEL = {"kind": "memory", "vocab_size": 97, "intermediate_size": 45, "hidden_size": 40}
FSDP = {"mode": "unique", "parallel": {"engine": "fsdp"}}
ENVIRONMENT = (
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_DEFAULT_REGION",
    "NO_PROXY",
)


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """A run that fails in this process must not disturb the next."""
    yield
    runtime.stop()


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, objects: Objects, tmp_path: Path) -> str:
    """A new folder at a URL."""
    return f"s3://bucket/{tmp_path.name}" if request.param == "s3" else f"file://{tmp_path}/store/run"


def words(data: Path, run: Path, url: str, steps: int, *more: str) -> list[str]:
    return [
        "pretrain", CONFIG, *TINY, f"data.path={data}", f"train.output={run}", f"train.steps={steps}",
        "schedule.total_steps=9", "checkpoint.interval=1", "memory.mode=unique", "monitor.peak_tflops=1",
        f"checkpoint.url={url}", *more,
    ]  # fmt: skip


def log(run: Path) -> str:
    return (run / "train.log").read_text()


def names(url: str, *inside: str) -> list[str]:
    return UrlFolder("/".join((url, *inside))).names()


def put(url: str, name: str, file: str, data: bytes) -> None:
    UrlFolder(f"{url}/{name}").write(file, data)


def flip(url: str, name: str) -> str:
    """Flip a bit of a checkpoint's file. Returns its URL."""
    folder = UrlFolder(f"{url}/{name}")
    (file, *_) = (file for file in folder.names() if file.endswith(".safetensors"))
    data = bytearray(folder.read(file) or b"")
    data[len(data) // 2] ^= 1
    folder.write(file, bytes(data))
    return folder.at(file)


def test_a_run_goes_on_elsewhere(
    url: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store has what the folder has, and another folder continues from it, as if there were one run."""
    run, other, whole = (tmp_path / name for name in ("run", "other", "whole"))
    keep = ("checkpoint.keep_latest_k=1", "checkpoint.keep_interval=2")
    mlm_train(*words(data, run, url, 3, *keep))
    kept = ["step-00000002", "step-00000003"]
    assert names(url) == sorted(path.name for path in (run / "checkpoints").glob("step-*")) == kept
    for name in kept:
        local = run / "checkpoints" / name
        assert names(url, name) == sorted(path.name for path in local.iterdir())
        assert all(
            UrlFolder(f"{url}/{name}").read(path.name) == path.read_bytes() for path in local.iterdir()
        )
    assert f"step-00000003 uploaded to {url} in " in log(run)

    capsys.readouterr()
    mlm_train("checkpoint", "list", url)
    assert capsys.readouterr().out.count("1 ranks, TP1 PP1 fsdp") == 2
    mlm_train("checkpoint", "verify", url)
    assert capsys.readouterr().out.count(": whole, ") == 2
    mlm_train("checkpoint", "fetch", f"{url}/step-00000002", tmp_path / "copy")
    mlm_train("checkpoint", "fetch", url, tmp_path / "copy")
    copies = {path.name: open_checkpoint(path) for path in (tmp_path / "copy" / "checkpoints").glob("step-*")}
    assert copies == {name: open_checkpoint(run / "checkpoints" / name) for name in kept}

    mlm_train(*words(data, other, url, 5, *keep))
    assert f"step-00000003 fetched from {url} in " in log(other) and "step-00000003 at step 3" in log(other)
    assert names(url) == ["step-00000002", "step-00000004", "step-00000005"]
    mlm_train(*words(data, whole, f"{url}-2", 5, *keep))
    last = [open_checkpoint(path / "checkpoints" / "step-00000005").files for path in (other, whole)]
    assert last[0] == last[1]
    before = log(run)
    mlm_train(*words(data, run, url, 5, *keep))  # its own folder is older: it fetches, and has nothing to do
    assert open_checkpoint(run / "checkpoints" / "step-00000005").files == last[0]
    assert log(run) == before


def test_damage_at_the_url(data: Path, tmp_path: Path) -> None:
    """An older checkpoint is used, or none: a run never starts over by itself."""
    url = f"file://{tmp_path}/store/run"
    mlm_train(*words(data, tmp_path / "run", url, 2))
    shown = flip(url, "step-00000002")
    assert f"{shown} is damaged: its checksum differs; remove {url}/step-00000002" in refused(
        "checkpoint", "verify", url
    )
    assert f"{shown} is damaged: its checksum differs" in refused(
        "checkpoint", "fetch", url, tmp_path / "copy"
    )
    assert not list((tmp_path / "copy").rglob("*.safetensors"))
    line = refused(*words(data, tmp_path / "strict", url, 3, "checkpoint.fall_back=false"))
    assert f"{shown} is damaged: its checksum differs; remove {url}/step-00000002 to use an older one" in line
    runtime.stop()
    mlm_train(*words(data, tmp_path / "other", url, 2))
    assert f"step-00000002 at {url} is damaged ({shown} is damaged: its checksum differs): an older" in log(
        tmp_path / "other"
    )
    assert "checkpoints/step-00000001 at step 1" in log(tmp_path / "other")
    mlm_train("checkpoint", "verify", f"{url}/step-00000002")  # written again
    for name in names(url):
        put(url, name, MANIFEST, b"{")
    line = refused(*words(data, tmp_path / "third", url, 2))
    assert f"all checkpoints at {url} are damaged" in line
    runtime.stop()
    # A damaged file of the folder is replaced by the store's.
    mlm_train(*words(data, tmp_path / "run2", f"{url}-2", 2))
    file = next((tmp_path / "run2" / "checkpoints" / "step-00000002").glob("*.safetensors"))
    file.write_bytes(bytes(file.stat().st_size))
    mlm_train(*words(data, tmp_path / "run2", f"{url}-2", 3))
    assert "step-00000002 fetched from" in log(tmp_path / "run2")
    assert "kept as damaged-step-00000002" in log(tmp_path / "run2")
    # All of the folder's are damaged, and so is the store's newest: its older one is used.
    for folder in (tmp_path / "run2" / "checkpoints").glob("step-*"):
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(bytes(file.stat().st_size) if folder.name.endswith("3") else b"")
    flip(f"{url}-2", "step-00000003")
    mlm_train(*words(data, tmp_path / "run2", f"{url}-2", 4))
    assert "kept as damaged-step-00000003; looking for one at file://" in log(tmp_path / "run2")
    assert "checkpoints/step-00000002 at step 2" in log(tmp_path / "run2")
    # Nothing is left anywhere: the run does not start over.
    shutil.rmtree(tmp_path / "store/run-2")
    for file in (tmp_path / "run2" / "checkpoints").glob("step-*/*.safetensors"):
        file.write_bytes(b"")
    line = refused(*words(data, tmp_path / "run2", f"{url}-2", 5))
    assert "all checkpoints in" in line and "are damaged" in line


def test_what_is_refused(data: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    mlm_train(*words(data, tmp_path / "run", url, 1))
    for new, said in (
        ("checkpoint.resume=false", f"checkpoint.url={url} holds checkpoints and checkpoint.resume=false"),
        ("train.seed=7", f"checkpoint {url}/step-00000001 was written with 1234"),
        ("model.intermediate_size=32", f"{url}/step-00000001 holds another model: model.intermediate_size"),
        ("checkpoint.url=folder", "checkpoint.url='folder': is not a URL: give s3://"),
        ("checkpoint.url=there://is/none", "there://is/none: there is no there://; give s3://"),
        ("checkpoint.url=s3://", "s3://: name a folder in it"),
        (
            f"checkpoint.warm_start={url}",
            f"{url} is a URL; give a folder. `mlm-train checkpoint fetch {url} F",
        ),
    ):
        assert said in refused(*words(data, tmp_path / "other", url, 2, new))
        assert not list((tmp_path / "other").rglob("*.safetensors"))
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        runtime.stop()
    assert "is a URL; give a folder. `mlm-train checkpoint fetch" in refused(
        "export", url, "--output", tmp_path / "export"
    )
    assert "a run prunes its own URL" in refused("checkpoint", "prune", url)
    assert "holds no checkpoint" in refused("checkpoint", "list", f"{url}/nothing")
    assert "is not a complete mlm-checkpoint folder" in refused(
        "checkpoint", "verify", f"{url}/step-00000009"
    )
    assert "is not a URL; copy a folder" in refused("checkpoint", "fetch", tmp_path, tmp_path / "copy")
    assert "another checkpoint.url, or remove" in (
        _said_by_another_run(data, tmp_path, url, str(tmp_path / "late"))
    )


def _said_by_another_run(data: Path, tmp_path: Path, url: str, run: str) -> str:
    """The log of a run that began before another one wrote to its URL."""
    mlm_train(*words(data, Path(run), f"{url}-late", 1))
    for step in (2, 3):  # a step that it has not reached
        shutil.copytree(tmp_path / "store" / "step-00000001", tmp_path / "store-late" / f"step-0000000{step}")
    (tmp_path / "store-late" / "step-00000003" / MANIFEST).write_text("{")
    store = CheckpointStore(f"{url}-late")
    assert store.committed()[-1] == "step-00000003"
    mlm_train(*words(data, Path(run), f"{url}-late", 2, "checkpoint.verify=none"))
    return log(Path(run))


def test_a_store_that_denies_or_hangs(
    data: Path, tmp_path: Path, objects: Objects, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on to its end; the next run brings the store up to date."""
    run = tmp_path / "run"
    with objects.denying("step-00000001"):
        mlm_train(*words(data, run, s3, 1))
    assert f"NOT uploaded: {s3}/step-00000001/" in log(run) and "Access Denied; check the address" in log(run)
    monkeypatch.setattr(url_folder, "PATIENCE", 2.0)
    objects.hold("PUT", "step-00000002/manifest.json")
    mlm_train(*words(data, run, s3, 2))
    assert f"NOT uploaded: {s3}/step-00000002 has not answered for 2 s: check the address" in log(run)
    assert CheckpointStore(s3).committed() == []
    objects.hold("GET", "bucket")  # at the start, and then for ever
    before = log(run)
    mlm_train(*words(data, run, s3, 3))
    said = log(run).removeprefix(before)
    assert f"{s3} has not answered for 2 s" in said and "the newest checkpoint of the run's folder is" in said
    line = refused(*words(data, tmp_path / "new", s3, 3))
    assert (
        f"{s3} has not answered for 2 s: check the address and the network, or leave checkpoint.url" in line
    )
    runtime.stop()
    objects.release()
    monkeypatch.setattr(url_folder, "PATIENCE", 60.0)
    mlm_train(*words(data, run, s3, 4))
    assert "step-00000004 uploaded to" in log(run)
    assert CheckpointStore(s3).committed()[-1] == "step-00000004"
    assert "test" not in log(run).replace(str(tmp_path), "").replace(s3, "")  # the secret key


def test_killed_while_it_uploads(data: Path, tmp_path: Path, objects: Objects, s3: str) -> None:
    """What the store has is whole; the next run, elsewhere, continues from it and clears what was left."""
    run = tmp_path / "run"
    mlm_train(*words(data, run, s3, 1))
    objects.hold("PUT", "step-00000002/shard")
    training: subprocess.Popen[str] = start(*words(data, run, s3, 900))
    assert objects.waiting.wait(100), training.poll()
    wait_for("step-00000004 committed", run, training)
    assert "NOT uploaded: " in log(run) and "still gets an earlier checkpoint" in log(run)
    os.kill(training.pid, signal.SIGKILL)
    training.communicate()
    objects.release()
    store = CheckpointStore(s3)
    assert store.committed() == ["step-00000001"]
    mlm_train("checkpoint", "verify", s3)
    mlm_train(*words(data, tmp_path / "other", s3, 3))
    assert "checkpoints/step-00000001 at step 1" in log(tmp_path / "other")
    assert store.folders() == store.committed() == ["step-00000002", "step-00000003"]


def test_ranks_upload_and_fetch_together(tmp_path: Path, objects: Objects, s3: str) -> None:
    """Each rank its own file, once; in another layout too. One that hangs keeps none of the others."""
    shared = {"model": MODEL, "environment": {name: os.environ[name] for name in ENVIRONMENT}}
    saved = run_on_ranks(
        "tests.checkpoint.url_cases:save",
        2, folder=str(tmp_path / "run"), url=s3, layout=FSDP, patience=60, steps=2, **shared,
    )  # fmt: skip
    assert [[name for name in files if "shard" in name] for files in saved["files"]] == [
        [f"step-0000000{step}/shard-0000{rank}.safetensors" for step in (1, 2)] for rank in (0, 1)
    ]
    zero = {"mode": "unique", "parallel": {"zero_stage": 1}}
    found = run_on_ranks(
        "tests.checkpoint.url_cases:resume", 3, folder=str(tmp_path / "new"), url=s3, layout=zero, **shared
    )
    assert found["differ"] == [] and sum(found["read"]) == found["bytes"]
    assert found["lines"][0].startswith(f"step-00000002 fetched from {s3} in ")

    objects.hold("PUT", "shard-00001")
    saved = run_on_ranks(
        "tests.checkpoint.url_cases:save",
        2, folder=str(tmp_path / "slow"), url=f"{s3}-2", layout=FSDP, patience=3, steps=1, **shared,
    )  # fmt: skip
    objects.release()
    (line,) = saved["said"]
    assert line.startswith(f"NOT uploaded: {s3}-2/step-00000001/shard-00001.safetensors has not answered")
    assert CheckpointStore(f"{s3}-2").committed() == []
    assert open_checkpoint(tmp_path / "slow" / "checkpoints" / "step-00000001")


def test_no_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_folder, "PATIENCE", 0.05)
    forever = threading.Event()
    with pytest.raises(UserError, match="x://y has not answered for 0 s"):
        url_folder.answered("x://y", forever.wait)
    forever.set()
    with pytest.raises(ZeroDivisionError):
        url_folder.answered("x://y", lambda: 1 // 0)
