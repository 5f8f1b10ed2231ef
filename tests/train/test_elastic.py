"""Agents restart failed ranks, on as many machines as are left."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from mlm_train.errors import START_AGAIN
from tests.commands import (
    TINY,
    finished,
    free_port,
    listening,
    ranks_under,
    recovery,
    refused,
    same_losses,
    start,
    wait_for,
)
from tests.ranks import train_on_ranks

STEPS = 150


def words(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={run}", f"train.steps={STEPS}",
        "checkpoint.interval=5", "memory.mode=unique", "monitor.peak_tflops=1",
        "train.micro_batch_size=1", *more,
    ]  # fmt: skip


def hosting(*command: object) -> subprocess.Popen[str]:
    """Start the agent that hosts the rendezvous, and wait until it listens."""
    agent = start(*command)
    while not listening(psutil.Process(agent.pid)):
        time.sleep(0.05)
    return agent


def is_asked_to_end(process: psutil.Process) -> bool:
    """Whether SIGTERM is pending for a suspended process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = int(status.partition("ShdPnd:\t")[2].partition("\n")[0], 16)
    return bool(pending & 1 << signal.SIGTERM - 1)


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train_on_ranks(1, *words(data, run))
    return run


def test_killed_ranks_start_again_and_a_warned_run_does_not(
    unbroken: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launch = start("launch", "--nproc", 2, "--max-restarts", 1, *words(data, run, "parallel.pipeline=2"))
    wait_for("step-00000005 committed", run, launch)
    ranks_under(launch.pid)[-1].kill()
    while "| loss " not in run.joinpath("train.log").read_text().partition("resumed from")[2]:
        assert launch.poll() is None, launch.communicate()[0]
        time.sleep(0.02)
    launch.send_signal(signal.SIGUSR1)
    output, _ = launch.communicate(timeout=120)
    assert launch.returncode == START_AGAIN, output
    assert (
        output.count("restarting the ranks of this node from the newest checkpoint: restart 1 of at most 1")
        == 1
    ), output
    finished("launch", "--nproc", 2, *words(data, run))
    same_losses(run, unbroken, tolerance=1e-4)


def test_a_machine_leaves_and_comes_back(unbroken: Path, data: Path, tmp_path: Path) -> None:
    """Two agents with one rank each: the second one is killed with its rank, and started again."""
    run = tmp_path / "run"
    meet = f"127.0.0.1:{free_port()}"
    command = ("launch", "--nproc", 1, "--nodes", "1:2", "--max-restarts", 3, "--rendezvous", meet)
    first = hosting(*command, *words(data, run))
    second = start(*command, *words(data, run))
    wait_for("step-00000005 committed", run, first, second)
    assert "| 2 processes on" in run.joinpath("train.log").read_text()
    for rank in ranks_under(second.pid):
        rank.suspend()  # it must not outlive its agent and exit cleanly
        os.kill(second.pid, signal.SIGKILL)
        rank.kill()
    second.communicate()
    wait_for("| 1 processes on", run, first)
    (alone,) = ranks_under(first.pid)
    alone.suspend()  # or it would finish before the other one joins
    second = start(*command, *words(data, run))
    while not is_asked_to_end(alone):
        assert second.poll() is None, second.communicate()[0]
        time.sleep(0.05)
    alone.resume()
    outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    log = run.joinpath("train.log").read_text()
    assert log.count("| 2 processes on") == 2
    assert "stopped by SIGTERM after step" in log, "healthy ranks save before they restart"
    same_losses(run, unbroken, tolerance=1e-4)


@pytest.mark.long
def test_a_lost_machine_is_replaced_by_one_that_did_not_fit(
    unbroken: Path, data: Path, tmp_path: Path
) -> None:
    """Three agents, of which a batch of eight takes two."""
    run = tmp_path / "run"
    meet = f"127.0.0.1:{free_port()}"
    command = ("launch", "--nproc", 1, "--nodes", "1:4", "--max-restarts", 1, "--rendezvous", meet)
    first = hosting(*command, *words(data, run))
    others = [start(*command, *words(data, run)) for _ in range(2)]
    wait_for("step-00000005 committed", run, first, *others)
    assert "| 2 processes on" in run.joinpath("train.log").read_text()
    (used,) = (agent for agent in others if ranks_under(agent.pid))
    (waits,) = (agent for agent in others if agent is not used)
    (rank,) = ranks_under(used.pid)
    lost = time.time()
    rank.suspend()  # it must not outlive its agent and exit cleanly
    os.kill(used.pid, signal.SIGKILL)
    rank.kill()
    used.communicate()
    outputs = [agent.communicate(timeout=300)[0] for agent in (first, waits)]
    assert (first.returncode, waits.returncode) == (0, 0), outputs
    assert "3 nodes have joined, and the run fits 2 of them: this one waits" in outputs[1]
    assert outputs[0].count("restart 1 of at most 1") == 1
    assert f"(process {used.pid}) and with " in outputs[0] and ", on 2 nodes" in outputs[0]
    assert run.joinpath("train.log").read_text().count("| 2 processes on") == 2
    print(recovery(run, lost))
    same_losses(run, unbroken, tolerance=1e-4)


def test_numbers_of_machines_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    meet = ("--nproc", 2, "--rendezvous", "nowhere:1", "--nodes")
    launch = ("launch", *words(data, tmp_path / "run", "parallel.pipeline=2", "parallel.tensor=2"), *meet)
    assert (
        "--nodes 1:4: not with 1 (2 processes cannot hold parallel.tensor=2 x parallel.pipeline=2: "
        "start 4); from 1 to 4 these fit: 2, 4" in refused(*launch, "1:4")
    )
    assert "--nodes 2:3: not with 3 (" in refused(*launch, "2:3")


def test_conflicting_options_are_rejected(data: Path, tmp_path: Path) -> None:
    launch = ("launch", "--nproc", 1, *words(data, tmp_path / "run"))
    assert "--nodes 2:1: the second number must be the larger one" in refused(*launch, "--nodes", "2:1")
    assert "--nodes and --rendezvous HOST:PORT" in refused(*launch, "--nodes", "1:2")
    assert "--max-restarts -1: give 0 or more" in refused(*launch, "--max-restarts", -1)
    assert "--spares -1: give 0 or more" in refused(*launch, "--spares", -1)
    assert "--spares has an effect only with --slurm" in refused(*launch, "--spares", 1)
