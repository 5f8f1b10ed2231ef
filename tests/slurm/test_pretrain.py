"""Runs on a real Slurm of several nodes: launched, warned, preempted, robbed of a node, crashing."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from mlm_train.checkpoint.folders import committed, newest
from mlm_train.checkpoint.load import open_checkpoint
from tests.commands import ROOT, recovery, refused, same_losses
from tests.slurm.conftest import Cluster, SlurmJob, words

PRETRAIN = ROOT / "slurm/pretrain.sbatch"


def stopped_and_resumed(text: str) -> tuple[int, int]:
    """The steps after which the first attempt says that it stopped, and the second that it went on."""
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+)", text)
    resumed = re.search(r"resumed from .* at step (\d+)", text)
    assert stopped and resumed, text
    return int(stopped[1]), int(resumed[1])


def test_two_nodes_train_what_one_process_trains(
    cluster: Cluster, unbroken: Path, data: Path, tmp_path: Path
) -> None:
    with_agent, without = tmp_path / "agent", tmp_path / "srun"
    job = cluster.submit(tmp_path / "agent.log", "--nodes=2", PRETRAIN, *words(data, with_agent))
    plain = ("--nodes=2", "--ntasks-per-node=1", ROOT / "slurm/pretrain_srun.sbatch", *words(data, without))
    assert job.end() == "COMPLETED", job.text()
    assert "2 processes on cpu" in job.text()
    same_losses(with_agent, unbroken)
    job = cluster.submit(tmp_path / "srun.log", *plain)
    assert job.end() == "COMPLETED", job.text()
    same_losses(without, unbroken)


def test_a_warned_job_checkpoints_requeues_and_goes_on(
    cluster: Cluster, unbroken: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = cluster.submit(tmp_path / "log", "--nodes=2", PRETRAIN, *words(data, run, "checkpoint.interval=0"))
    job.wait_for("step 5/")
    cluster.do("scancel", "--batch", "--signal=USR1", job.number)
    assert job.end() == "COMPLETED", job.text()
    assert "saved a checkpoint, back into the queue" in job.text()
    stopped, resumed = stopped_and_resumed(job.text())
    assert stopped == resumed and job.field("Restarts") == "1"
    same_losses(run, unbroken)


def test_a_preempted_job_goes_on_later(cluster: Cluster, unbroken: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    low = ("--partition=low", "--nodes=2", PRETRAIN, *words(data, run, "checkpoint.interval=0"))
    job = cluster.submit(tmp_path / "log", *low)
    job.wait_for("step 5/")
    urgent = ("--partition=high", "--nodes=4", "--exclusive", "--wrap=sleep 1")
    high = cluster.submit(tmp_path / "high.log", *urgent)
    assert high.end() == "COMPLETED" and job.end() == "COMPLETED", job.text()
    stopped, resumed = stopped_and_resumed(job.text())
    assert stopped == resumed
    same_losses(run, unbroken)


def test_a_lost_node_and_ranks_that_live_on_there(
    cluster: Cluster, unbroken: Path, data: Path, tmp_path: Path
) -> None:
    """The node freezes, Slurm gives it up and starts the job elsewhere, and then the node wakes."""
    run = tmp_path / "run"
    job = cluster.submit(tmp_path / "log", "--nodes=1", PRETRAIN, *words(data, run))
    job.wait_for("step 12/")
    node = job.field("BatchHost")
    (rank,) = cluster.ranks(job, node)
    os.kill(int((cluster.folder / f"run/slurmd.{node}.pid").read_text()), signal.SIGKILL)
    rank.suspend()
    job.wait_for("restart 1 of job")
    assert rank.status() == psutil.STATUS_STOPPED and job.field("BatchHost") != node
    rank.resume()
    rank.wait(timeout=30)
    assert job.end() == "COMPLETED", job.text()
    assert f"{run}: restart 1 of job {job.number} takes over from restart 0" in job.text()
    for folder in committed(run / "checkpoints"):
        open_checkpoint(folder)
    assert {path.name[:5] for path in (run / "checkpoints").iterdir()} == {"lates", "step-"}
    same_losses(run, unbroken)
    cluster.restore(node)


@pytest.mark.long
def test_a_spare_node_replaces_one_whose_network_is_lost(
    cluster: Cluster, unbroken: Path, data: Path, tmp_path: Path
) -> None:
    """No connection is closed, and the lost node's ranks live on. Then its network is back."""
    run = tmp_path / "run"
    three = ("--nodes=3", "--no-kill", PRETRAIN, *words(data, run))
    job = cluster.submit(tmp_path / "log", *three, MLM_NODES="2")
    job.wait_for("step-00000010 committed")
    (node,) = (node for node in job.other_nodes() if cluster.ranks(job, node))
    (late,) = cluster.ranks(job, node)
    lost = time.time()
    cluster.cut_off(node)
    try:
        job.wait_for("resumed from")
        assert late.is_running()
    finally:
        cluster.cut_off(node, connected=True)
    late.wait(timeout=60)
    assert job.end() == "COMPLETED" and job.field("Restarts") == "0", job.text()
    # Ranks were started twice; the node that is back may have joined again, and waits.
    assert job.text().count("| 2 processes on") == 2 and job.text().count("resumed from") == 1
    for folder in committed(run / "checkpoints"):
        open_checkpoint(folder)
    print(recovery(run, lost))
    same_losses(run, unbroken)


@pytest.mark.long
def test_fewer_nodes_go_on_and_too_few_are_requeued(
    cluster: Cluster, unbroken: Path, data: Path, tmp_path: Path
) -> None:
    """One of two nodes is lost; the other goes on alone, to a signal. Then the script's own node is lost."""
    run = tmp_path / "run"
    two = ("--nodes=2", "--no-kill", PRETRAIN, *words(data, run, "train.steps=3000"))
    job = cluster.submit(tmp_path / "log", *two, MLM_NODES="1:2")
    job.wait_for("step-00000010 committed")
    (node,) = job.other_nodes()
    lost = time.time()
    cluster.lose(node)
    job.wait_for("| 1 processes on")
    job.wait_for("step 60/")
    assert job.field("Restarts") == "0"
    print(recovery(run, lost))
    cluster.do("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for("saved a checkpoint, back into the queue")
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+)", job.text())
    assert stopped is not None
    job.wait_for(f"at step {stopped[1]} | 2 processes on")
    host = job.field("BatchHost")
    cluster.lose(host)
    job.wait_for("restart 2 of job")
    assert job.field("Restarts") == "2"
    cluster.do("scancel", "--batch", "--signal=TERM", job.number)
    job.end()
    cluster.restore(node)
    cluster.restore(host)


def test_a_job_that_crashes_again_and_again_ends(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    crash = {"MLM_PYTHON": "/bin/false", "MLM_MAX_RESTARTS": "2"}
    job = cluster.submit(
        tmp_path / "crash.log", "--nodes=1", PRETRAIN, *words(data, tmp_path / "run"), **crash
    )
    typo = cluster.submit(tmp_path / "typo.log", "--nodes=1", PRETRAIN, "configs/mikro.yaml")
    assert job.end() == "FAILED" and job.field("Restarts") == "2", job.text()
    lines = [line for line in job.text().splitlines() if line.startswith("mlm-train: ")]
    last = "exit code 1 and was restarted 2 times, MLM_MAX_RESTARTS=2: it ends here"
    assert len(lines) == 3 and last in lines[2], job.text()
    assert typo.end() == "FAILED" and typo.field("Restarts") == "0", typo.text()
    assert "did you mean configs/micro.yaml?" in typo.text()


def test_commas_and_spaces_in_every_name(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """Of the clone, the working folder, the config, the data and the run."""
    clone, work = tmp_path / "a clone, mine", tmp_path / "work, here"
    for part in ("mlm_train", "slurm", "configs"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    text = shutil.copytree(data, tmp_path / "text, all")
    work.mkdir()
    shutil.copy(ROOT / "configs/micro.yaml", work / "tiny, one.yaml")
    config = ("tiny, one.yaml", *words(text, Path("run, first")), "train.stop_after=2")
    launch = [
        sys.executable,
        "-m",
        "mlm_train",
        "launch",
        "--slurm",
        *config[:1],
        *config[2:],
        "--nproc",
        "1",
    ]
    given = {"PYTHONPATH": str(clone), "MLM_ROOT": "", "MLM_PYTHON": "", "MLM_NPROC": ""}
    said = cluster.do(*launch, cwd=work, **given)
    number = re.search(r"submitted job (\d+)", said)
    assert number
    log = work / "slurm-logs" / f"mlm-tiny, one-{number[1]}.log"
    job = SlurmJob(cluster, number[1], log)
    assert job.end() == "COMPLETED", job.text()
    assert newest(work / "run, first/checkpoints") is not None, job.text()
    assert f"'slurm-logs/{log.name}'" in said  # as a shell takes it


def test_launch_submits(
    cluster: Cluster, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from tests.commands import mlm_train

    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    config = (ROOT / "configs/micro.yaml", *words(data, run)[1:], "train.stop_after=2")
    launch = ("launch", "--slurm", *config, "--nproc", 1)
    assert "--partition hihg: `sinfo -s` lists" in refused(*launch, "--partition", "hihg")
    assert "--account them: `sacctmgr show associations" in refused(*launch, "--account", "them")
    assert "--nodes 8" in refused(*launch, "--nodes", 8, "train.global_batch_size=16")
    assert "--gpus-per-node 9" in refused(*launch[:-2], "--gpus-per-node", 9, "train.global_batch_size=18")
    capsys.readouterr()
    mlm_train(*launch, "--account", "us")
    said = capsys.readouterr().out
    number = re.search(r"submitted job (\d+): 1 nodes x 1 processes", said)
    assert number and f"scancel {number[1]}" in said and f"squeue -j {number[1]}" in said
    log = tmp_path / "slurm-logs" / f"mlm-micro-{number[1]}.log"
    end = time.monotonic() + 120
    while not (log.is_file() and "checkpoint" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.2)
