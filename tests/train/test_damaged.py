"""Damaged checkpoints: the newest intact one is used, and nothing is lost or overwritten."""

import json
import re
import shutil
from pathlib import Path

import pytest

from mlm_train.checkpoint.manifest import write_manifest
from mlm_train.config import load_config
from mlm_train.data.blend import Blend
from mlm_train.parallel import runtime
from mlm_train.train.preflight import find_checkpoint
from mlm_train.utils.records import SEAL
from tests.commands import mlm_train, refused, scalars, start
from tests.train.short_runs import CONFIG, copy_of, pretrain, snapshot

pytestmark = pytest.mark.usefixtures("no_groups_left")


def damaged(run: Path, how: str) -> str:
    """Damage the newest checkpoint's largest file and return its name."""
    folder = run / "checkpoints" / "step-00000002"
    victim = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    contents = bytearray(victim.read_bytes())
    if how == "flipped":
        contents[len(contents) // 2] ^= 1
        victim.write_bytes(contents)
    elif how == "truncated":
        victim.write_bytes(contents[: len(contents) // 2])
    else:
        victim.unlink()
    return victim.name


@pytest.mark.parametrize(
    ("how", "words"),
    [("flipped", "checksum differs"), ("truncated", "bytes instead of"), ("deleted", "is missing")],
)
def test_damaged_checkpoint(trained: Path, data: Path, tmp_path: Path, how: str, words: str) -> None:
    run = copy_of(trained, tmp_path)
    name = damaged(run, how)
    before = snapshot(run)
    strict = pretrain(data, run, "train.steps=4", "checkpoint.fall_back=false")
    for command in (strict, ["export", run, "--output", tmp_path / "export"]):
        line = refused(*command)
        assert words in line and name in line and "delete" in line and "step-00000002" in line
        runtime.stop()
    assert not (tmp_path / "export").exists()
    assert {key: snapshot(run)[key] for key in before if key.startswith("checkpoints/step")} == {
        key: contents for key, contents in before.items() if key.startswith("checkpoints/step")
    }
    mlm_train(*pretrain(data, run, "train.steps=4"))
    log = (run / "train.log").read_text()
    (line,) = re.findall(
        r" checkpoint step-00000002 is damaged \((.*)\): kept as damaged-step-00000002; .*", log
    )
    assert words in line and name in line and "checkpoints/step-00000001 at step 1" in log
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"damaged-step-00000002", "latest", "step-00000001", "step-00000004"}
    assert scalars(run, "train/loss").keys() == {1, 2, 3, 4}


@pytest.mark.parametrize("seal", [True, False], ids=["digit", "no checksum"])
def test_a_changed_manifest_is_damage(trained: Path, data: Path, tmp_path: Path, seal: bool) -> None:
    """One changed digit would move the position in the data."""
    run = copy_of(trained, tmp_path)
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    if seal:
        manifest["progress"]["samples"] += 1
    else:
        del manifest[SEAL]
    path.write_text(json.dumps(manifest))
    assert "manifest.json is damaged: its checksum differs" in refused("checkpoint", "verify", run)
    config = load_config(CONFIG, pretrain(data, run, "train.steps=4")[2:])
    newest = find_checkpoint(config, Blend.open(config.data))
    assert newest is not None and newest.folder.name == "step-00000001" and len(newest.damaged) == 1


def test_a_manifest_that_is_gone_is_damage_where_nothing_may_fall_back(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    manifest = run / "checkpoints" / "step-00000002" / "manifest.json"
    for target in (None, "nothing-there", "manifest.json"):  # gone, or a link to nothing or to itself
        manifest.unlink(missing_ok=True)
        if target is not None:
            manifest.symlink_to(target)
        assert "step-00000002" in refused(*pretrain(data, run, "train.steps=4", "checkpoint.fall_back=false"))
        runtime.stop()


def test_where_all_checkpoints_are_damaged_nothing_starts_over(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    checkpoints = run / "checkpoints"
    damaged(run, "flipped")  # which only the contents show: found by the process that holds the lock
    (checkpoints / "step-00000001" / "manifest.json").write_text("{")
    before = snapshot(run)
    line = refused(*pretrain(data, run, "train.steps=4"))
    assert (
        "are damaged" in line and "checksum differs" in line and "another train.output to start over" in line
    )
    assert snapshot(run) == before
    runtime.stop()
    shutil.rmtree(checkpoints / "step-00000001")
    (checkpoints / "step-00000002").rename(checkpoints / "damaged-step-00000002")
    assert "are damaged: restore an intact one" in refused(*pretrain(data, run, "train.steps=4"))


@pytest.mark.parametrize(
    ("how", "words"), [("flipped", "checksum differs"), ("truncated", "bytes instead of")]
)
def test_ranks_that_find_damage_end_the_launch_with_one_line(
    trained: Path, data: Path, tmp_path: Path, how: str, words: str
) -> None:
    """By its content, which all ranks compare together, or by its size, which rank 0 sees before."""
    run = copy_of(trained, tmp_path)
    damaged(run, how)
    strict = pretrain(data, run, "train.steps=4", "checkpoint.fall_back=false")[1:]
    launch = start("launch", "--nproc", 2, *strict)
    output, _ = launch.communicate(timeout=120)
    assert launch.returncode == 2, output
    lines = [line for line in output.splitlines() if line.startswith("mlm-train: ")]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in output


def test_manifest_that_points_outside_is_refused(trained: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["file"] = "../step-00000001/manifest.json"
    del manifest[SEAL]
    write_manifest(path.parent, manifest)
    assert "not a file of that folder" in refused(*pretrain(data, run, "train.steps=4"))
