"""A run that hangs or loses a rank reports where, ends on every rank, and keeps its checkpoints."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.commands import ROOT, TINY, finished, free_port, ranks_under, scalars, start
from tests.train.misbehave import SLOW_SECONDS

LIMIT = 5.0  # seconds without progress; with less, a loaded test machine would look hung
MISBEHAVE = ("-m", "tests.train.misbehave")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
PP2 = ("parallel.pipeline=2", "model.num_hidden_layers=4")


def arguments_of(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "pretrain", "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={run}", "train.steps=6",
        "train.micro_batch_size=1", "checkpoint.interval=1", f"train.watchdog_timeout={LIMIT}",
        "monitor.peak_tflops=1", *more,
    ]  # fmt: skip


def python(arguments: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def without_agent(arguments: Sequence[str]) -> tuple[list[int], list[str]]:
    """Run two ranks that no launcher ends; their exit codes and outputs."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [python(arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], outputs


def ranks_of(launch: "subprocess.Popen[str]", run: Path) -> dict[int, psutil.Process]:
    """The processes by rank, once a checkpoint is committed."""
    while not (run / "checkpoints" / "latest").is_file():
        assert launch.poll() is None, launch.communicate()[0]
        time.sleep(0.05)
    return {int(rank.environ()["RANK"]): rank for rank in ranks_under(launch.pid)}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No rank process outlives its test."""
    yield
    assert not psutil.wait_procs(ranks_under(), timeout=5)[1]


def test_a_stage_that_never_ends_is_named_and_every_rank_ends_itself(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes, outputs = without_agent([*MISBEHAVE, "sleep-in-forward", "1", *arguments_of(data, run, *PP2)])
    report = "".join(outputs)
    assert codes == [75, 75], report
    assert report.count("watchdog: no progress for 5 s") == 1 and "Traceback" not in report
    assert re.search(r"stuck: +rank 1 \(.*, stage 1\): step 3, forward of micro-batch 2, for \d+ s", report)
    assert "sleep_for_ever, called from mlm_train/model/transformer.py" in report
    waiting = (
        r"waiting: rank 0 for \d+ s, stage 0: step 3, receive gradient of micro-batch 2, in send/recv at"
    )
    assert re.search(waiting, report), report
    (folder,) = (run / "failures").iterdir()
    assert "sleep_for_ever" in (folder / "rank-00001.txt").read_text()
    assert "gloo:broadcast" in (folder / "rank-00000.flight.jsonl").read_text()


def test_a_stuck_rank_under_torchrun_and_then_a_merely_slow_one(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = python([*TORCHRUN, *MISBEHAVE, "sleep-in-data", "1", *arguments_of(data, run)])
    output, _ = launch.communicate(timeout=120)
    assert launch.returncode != 0
    assert re.search(r"stuck: +rank 1 \(.*\): step 3, data, for \d+ s, .*sleep_for_ever", output), output
    waiting = (
        r"waiting: rank 0 for \d+ s, step 3, data, in all_gather_single at mlm_train/parallel/mesh/exchange"
    )
    assert re.search(waiting, output), output
    started = time.monotonic()
    every = "monitor.straggler_interval=2"
    slow = python([*TORCHRUN, *MISBEHAVE, "slow-data", "1", *arguments_of(data, run, every)])
    output, _ = slow.communicate(timeout=120)
    assert slow.returncode == 0 and "at step 2" in output and "no progress for" not in output, output
    assert time.monotonic() - started > 4 * SLOW_SECONDS > LIMIT
    assert re.search(r"slow over the last 2 steps: rank 1 \(.*, stage 0\) .* forward .*, data 1", output), (
        output
    )
    assert list(scalars(run, "speed/slowest_rank").values()) == [1.0, 1.0]
    beat = json.loads((run / "heartbeat.json").read_text())
    assert (beat["state"], beat["step"], beat["host"]) == ("finished", 6, socket.gethostname())


def test_a_stopped_rank_is_named_by_the_others(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = start("launch", "--nproc", 2, *arguments_of(data, run, "train.steps=5000", *PP2)[1:])
    ranks = ranks_of(launch, run)
    ranks[1].send_signal(signal.SIGSTOP)
    while not list(run.glob("failures/*/report.txt")):
        assert launch.poll() is None, launch.communicate()[0]
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGCONT)  # else torchrun's agent waits 30 s for SIGTERM to take effect
    output, _ = launch.communicate(timeout=60)
    assert launch.returncode == 75, output
    assert re.search(r"stuck: +rank 1 \(.*, stage 1\): does not respond \(stopped, ", output), output
    assert "stuck:   rank 0" not in output
    assert not psutil.wait_procs(ranks.values(), timeout=5)[1]


def test_a_killed_rank_ends_the_others_under_torchrun(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = python([*TORCHRUN, "-m", "mlm_train", *arguments_of(data, run, "train.steps=5000")])
    ranks = ranks_of(launch, run)
    ranks[1].kill()
    output, _ = launch.communicate(timeout=60)
    assert launch.returncode != 0 and "Signal 9 (SIGKILL)" in output
    assert "[rank0]: Traceback" not in output, output
    assert not psutil.wait_procs(ranks.values(), timeout=5)[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_failure_is_what_a_user_sees(data: Path, tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    arguments = arguments_of(data, run, *PP2)
    codes, outputs = without_agent([*MISBEHAVE, "raise-in-forward", str(rank), *arguments])
    assert codes == [1, 1], outputs
    failed, other = outputs[rank], outputs[1 - rank]
    assert failed.index(f"[rank{rank}]: Traceback") < failed.index("ValueError: the third stair is missing")
    assert f"on rank {rank} of 2: stage {rank}, step 3, forward of micro-batch 2" in failed
    assert "Traceback" not in other, other
    line = (
        f"mlm-train: [rank {1 - rank}] stopped because rank {rank} failed first: ValueError: the third stair"
    )
    assert line in other, other
    if rank == 1:
        assert "resumed from" in finished(*arguments[:1], *arguments[1:], "parallel.pipeline=1")
