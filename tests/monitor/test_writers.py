"""Metrics of a run, read back with TensorBoard's reader, as JSON lines, and from Weights & Biases offline."""

import json
import math
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlm_train.config import Config, load_config
from mlm_train.errors import UserError
from mlm_train.monitor.writers import MetricsWriter, Writers
from mlm_train.monitor.writers.jsonl import NAME, read_metrics
from tests.commands import TINY, mlm_train, refused, scalars, start

# Not among the other packages: megatron-core imports it wherever it is found, in every process of a run.
WANDB = Path(sys.prefix, "wandb")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights & Biases can be imported, here and in the processes that are started."""
    if not WANDB.is_dir():
        pytest.skip("needs wandb: make .venv/dev.stamp")
    monkeypatch.setattr("sys.path", [*sys.path, str(WANDB)])
    monkeypatch.setenv("PYTHONPATH", str(WANDB), prepend=os.pathsep)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def config_of(output: Path, *writers: str) -> Config:
    words = ["data.path=none", f"train.output={output}", f"monitor.writers=[{', '.join(writers)}]"]
    return load_config("configs/micro.yaml", words)


def opened(output: Path, writer: str, first_step: int) -> MetricsWriter:
    """Open a writer as a launch on one process does."""
    writers = Writers()
    writers.open(config_of(output, writer), first_step)
    return writers


def jsonl(run: Path, tag: str) -> dict[int, float | None]:
    return read_metrics(run)[tag]


@pytest.mark.parametrize(("writer", "read"), [("tensorboard", scalars), ("jsonl", jsonl)])
def test_a_step_that_is_done_again_is_read_once(
    writer: str, read: Callable[[Path, str], dict[int, float]], tmp_path: Path
) -> None:
    """The next launch repeats steps after a crash; the same launch does after a loss spike."""
    first = opened(tmp_path, writer, 1)
    for step in (1, 2, 3, 4):
        first.scalars({"train/loss": 10.0 - step}, step)
    first.scalars({"validation/loss": 8.0}, 4)
    first.close()
    again = opened(tmp_path, writer, 3)
    again.scalars({"train/loss": 5.5}, 3)
    again.scalars({"train/loss": 5.0}, 4)
    again.purge(4)
    again.scalars({"train/loss": 4.5, "train/lr": 0.5}, 4)
    again.close()
    assert read(tmp_path, "train/loss") == {1: 9.0, 2: 8.0, 3: 5.5, 4: 4.5}
    assert read(tmp_path, "train/lr") == {4: 0.5}


def test_json_lines_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    writer = opened(tmp_path, "jsonl", 1)
    writer.scalars({"train/loss": math.nan, "train/perplexity": math.inf, "train/lr": 0.5}, 1)
    writer.close()
    begin, line = (json.loads(text) for text in (tmp_path / NAME).read_text().splitlines())
    assert begin.keys() == {"purge_step", "time"} and begin["purge_step"] == 1
    assert line.pop("time") >= begin["time"]
    assert line == {"step": 1, "train/loss": None, "train/perplexity": None, "train/lr": 0.5}


def test_a_line_that_a_kill_has_torn_is_passed_over(tmp_path: Path) -> None:
    writer = opened(tmp_path, "jsonl", 1)
    writer.scalars({"train/loss": 9.0}, 1)
    writer.close()
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes() + b'{"step": 2, "time": 1, "train/lo')
    writer = opened(tmp_path, "jsonl", 2)
    writer.scalars({"train/loss": 8.0}, 2)
    writer.close()
    assert read_metrics(tmp_path) == {"train/loss": {1: 9.0, 2: 8.0}}


def test_a_run_and_its_resumption_in_two_writers_at_once(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "pretrain", "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={run}",
        "memory.mode=unique", "monitor.peak_tflops=1", "monitor.writers=[jsonl, tensorboard]",
        "schedule.total_steps=9", "train.eval_interval=2",
    ]  # fmt: skip
    mlm_train(*words, "train.steps=2")
    mlm_train(*words, "train.steps=4")
    found = read_metrics(run)
    assert sorted(found["train/loss"]) == [1, 2, 3, 4] and sorted(found["validation/loss"]) == [2, 4]
    for tag, values in found.items():
        assert scalars(run, tag) == pytest.approx(values, rel=1e-6), tag


def test_none_at_all(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (*TINY, f"data.path={data}", f"train.output={run}", "train.steps=2", "monitor.peak_tflops=1")
    mlm_train("pretrain", "configs/micro.yaml", *words, "monitor.writers=[]", "memory.mode=unique")
    assert {path.name for path in run.iterdir()} & {"tensorboard", NAME, "wandb"} == set()


def test_wandb_offline(wandb: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "mine"
    run.mkdir()
    writer = opened(run, "wandb", 1)
    for step in (1, 2, 3):
        writer.scalars({"train/loss": 10.0 - step}, step)
    writer.scalars({"validation/loss": 8.0}, 3)
    writer.purge(3)
    writer.scalars({"train/loss": 6.5}, 3)
    writer.close()
    first, second = sorted(
        map(wandb_run, run.glob("wandb/offline-run-*/*.wandb")), key=lambda record: record["name"]
    )
    assert first["name"] == "mine from step 1" and second["name"] == "mine from step 3"
    assert {first["group"], second["group"]} == {"mine"} and first["project"] == "mlm_train"
    assert first["steps"] == {
        1: {"train/loss": 9.0}, 2: {"train/loss": 8.0}, 3: {"train/loss": 7.0, "validation/loss": 8.0},
    }  # fmt: skip
    assert second["steps"] == {3: {"train/loss": 6.5}}
    assert first["vocab_size"] == config_of(run).model.vocab_size


def wandb_run(path: Path) -> dict:
    """What W&B recorded offline, once it is complete: W&B's service may still write after `finish`."""
    deadline = time.monotonic() + 60
    while "exit" not in (found := wandb_values(path)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def wandb_values(path: Path) -> dict:
    """The records so far, decoded by W&B's own protocol."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict = {"steps": {}}
    for data in wandb_records(path):
        record = Record.FromString(data)
        if record.HasField("run"):
            run = record.run
            found |= {"name": run.display_name, "group": run.run_group, "project": run.project}
            for item in run.config.update:
                if item.key == "model":
                    found["vocab_size"] = json.loads(item.value_json)["vocab_size"]
        if record.HasField("exit"):
            found["exit"] = record.exit.exit_code
        if record.HasField("history"):
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            step = int(items.get("_step", record.history.step.num))
            found["steps"][step] = {key: value for key, value in items.items() if not key.startswith("_")}
    return found


def wandb_records(path: Path) -> Iterator[bytes]:
    """LevelDB log records after a header of 7 bytes: CRC, length, kind (1 full, 2 first, 4 last)."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # a block's end
            at += 2**15 - at % 2**15
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):  # still being written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.skipif(find_spec("wandb") is not None, reason="the package is here")
def test_wandb_without_the_package(data: Path, tmp_path: Path) -> None:
    line = "monitor.writers: wandb needs the wandb package: pip install 'mlm-train[wandb]'"
    words = (*TINY, f"data.path={data}", f"train.output={tmp_path / 'run'}", "monitor.writers=[wandb]")
    assert line in refused("pretrain", "configs/micro.yaml", *words)
    assert not (tmp_path / "run").exists()


def test_a_folder_named_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B creates a folder named wandb in the working directory."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "wandb", raising=False)
        with pytest.raises(UserError, match=r"pip install 'mlm-train\[wandb\]'"):
            opened(tmp_path, "wandb", 1)


def test_wandb_without_an_account_is_one_line(wandb: None, data: Path, tmp_path: Path) -> None:
    words = (*TINY, f"data.path={data}", f"train.output={tmp_path / 'run'}", "monitor.writers=[wandb]")
    process = start("pretrain", "configs/micro.yaml", *words, WANDB_MODE="online", WANDB_API_KEY="short")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert re.fullmatch(r"mlm-train: monitor.writers: wandb: .*; run `wandb login`, .*\n", output), output
