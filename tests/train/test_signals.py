"""A run stopped by a signal checkpoints after its step, on all ranks alike, and resumes as if unbroken."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlm_train.errors import START_AGAIN
from mlm_train.utils.signals import ECHO_SECONDS
from tests.commands import ROOT, TINY, finished, free_port, ranks_under, same_losses, start, wait_for
from tests.ranks import train_on_ranks

STEPS = 60


def words(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={run}", f"train.steps={STEPS}",
        "checkpoint.interval=0", "memory.mode=unique", "monitor.peak_tflops=1", "model.num_hidden_layers=4",
        *more,
    ]  # fmt: skip


PP2 = ("parallel.pipeline=2", "train.micro_batch_size=1")


def stopped_at(run: Path, name: str) -> int:
    """The step after which the run logged its stop; its newest checkpoint is of that step."""
    line = next(
        line for line in reversed((run / "train.log").read_text().splitlines()) if "stopped by" in line
    )
    assert f"stopped by {name} after step " in line
    step = int(line.partition("after step ")[2].partition(";")[0])
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"
    return step


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train_on_ranks(1, *words(data, run))
    return run


def test_one_process_ends_after_its_step_and_goes_on(unbroken: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("pretrain", *words(data, run))
    wait_for("step 3/", run, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == START_AGAIN and "Traceback" not in output, output
    step = stopped_at(run, "SIGUSR1")
    assert 3 <= step < STEPS
    assert f"at step {step}" in finished("pretrain", *words(data, run))
    same_losses(run, unbroken, tolerance=0.0)


def test_ranks_agree_on_the_last_step(unbroken: Path, data: Path, tmp_path: Path) -> None:
    """The signal comes from the agent, then to rank 1 alone."""
    run = tmp_path / "run"
    launch = start("launch", "--nproc", 2, *words(data, run, *PP2))
    wait_for("step 3/", run, launch)
    launch.send_signal(signal.SIGUSR1)
    output, _ = launch.communicate(timeout=60)
    assert launch.returncode == START_AGAIN and "failed first" not in output, output
    first = stopped_at(run, "SIGUSR1")
    launch = start("launch", "--nproc", 2, *words(data, run, *PP2))
    wait_for(f"step {first + 2}/", run, launch)
    ranks = {rank.environ()["RANK"]: rank for rank in ranks_under(launch.pid)}
    ranks["1"].send_signal(signal.SIGTERM)
    output, _ = launch.communicate(timeout=60)
    assert launch.returncode == 128 + signal.SIGTERM and "Traceback" not in output, output
    second = stopped_at(run, "SIGTERM")
    assert first < second < STEPS
    # The agent is killed: the ranks save, exit, and release the folder.
    launch = start("launch", "--nproc", 2, *words(data, run, *PP2))
    wait_for(f"step {second + 2}/", run, launch)
    launch.kill()
    launch.communicate(timeout=60)  # until nobody holds the pipe any more
    third = stopped_at(run, "SIGTERM")
    assert second < third < STEPS
    assert f"at step {third}" in finished("launch", "--nproc", 2, *words(data, run, *PP2))
    same_losses(run, unbroken, tolerance=2e-3)  # another layout: rounding grows over the steps


def test_a_signal_while_the_run_is_set_up_ends_it_after_its_first_step(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("pretrain", *words(data, run))
    wait_for("", run, process)  # the log is there: the folder is claimed, no model is built
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == START_AGAIN and "stopped by SIGUSR1 after step 1;" in output, output
    assert (run / "checkpoints" / "step-00000001").is_dir()


def test_a_second_sigterm_ends_at_once(data: Path, tmp_path: Path) -> None:
    """In a step that never ends: the first SIGTERM waits for it."""
    run = tmp_path / "run"
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {"RANK": "0", "WORLD_SIZE": "1"} | meeting
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.misbehave", "sleep-in-data", "0", "pretrain", *words(data, run)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for("step 2/", run, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the same once more: a scheduler's and the agent's
    time.sleep(ECHO_SECONDS + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    assert not (run / "checkpoints" / "latest").exists()


def test_sigterm_before_the_first_step_ends_at_once(data: Path, tmp_path: Path) -> None:
    launch = start("launch", "--nproc", 1, *words(data, tmp_path / "run"))
    while not ranks_under(launch.pid):
        assert launch.poll() is None, launch.communicate()[0]
        time.sleep(0.05)
    launch.send_signal(signal.SIGTERM)
    output, _ = launch.communicate(timeout=30)
    assert launch.returncode == 128 + signal.SIGTERM and "mlm-train: ended by SIGTERM" in output, output
