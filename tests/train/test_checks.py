"""full, sizes, none: how runs and `data inspect` verify data and checkpoints before use."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlm_train.parallel import runtime
from tests.checkpoint.test_hf_manifest import flip
from tests.commands import TINY, mlm_train, refused


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """Destroy process groups that a run in this process left."""
    yield
    runtime.stop()


def test_data(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    words = ("pretrain", "configs/micro.yaml", *TINY, f"data.path={folder}", "train.steps=2")
    inspect = ("data", "inspect", folder, "--sequence-length", 32, "--verify")
    flip(folder / "train.bin", 0)
    for last in ((), ("full",)):
        assert str(folder / "train.bin") in refused(*inspect, *last)
    for check in ("sizes", "none"):
        mlm_train(*inspect, check)
    line = refused(*words, f"train.output={tmp_path / 'full'}", "data.verify=full")
    assert str(folder / "train.bin") in line
    runtime.stop()
    mlm_train(*words, f"train.output={tmp_path / 'sizes'}")
    runtime.stop()
    (folder / "validation.bin").write_bytes((folder / "validation.bin").read_bytes() + b"more")
    for command in (inspect[:-1], (*inspect, "sizes"), (*words, f"train.output={tmp_path / 'short'}")):
        assert str(folder / "validation.bin") in refused(*command)
    mlm_train(*inspect, "none")
    mlm_train(*words, f"train.output={tmp_path / 'none'}", "data.verify=none")
    assert "data.verify" in refused(*words, f"train.output={tmp_path / 'x'}", "data.verify=some")


def test_checkpoints(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("pretrain", "configs/micro.yaml", *TINY, f"data.path={data}", "checkpoint.fall_back=false")
    words = (*words, "schedule.total_steps=9")
    mlm_train(*words, f"train.output={run}", "train.steps=2")
    runtime.stop()
    (shard,) = run.glob("checkpoints/step-00000002/*.safetensors")
    flip(shard)
    here = (*words, f"train.output={run}", "train.steps=3")
    other = (*words, f"train.output={tmp_path / 'other'}", "train.steps=2", f"checkpoint.warm_start={run}")
    export = ("export", run, "--output", tmp_path / "export")
    for command in (here, (*other, "checkpoint.verify=full"), export, (*export, "--verify", "full")):
        assert str(shard) in refused(*command)
        runtime.stop()
    mlm_train(*export, "--verify", "sizes")
    shutil.rmtree(tmp_path / "other")
    mlm_train(*other, "checkpoint.verify=sizes")
    runtime.stop()
    mlm_train(*here, "checkpoint.verify=none")
