"""The other job scripts on a real Slurm: evaluation, TensorBoard, a sweep, a chain, and who gets a folder."""

import re
import shutil
import time
from pathlib import Path

import pytest

from mlm_train.checkpoint.folders import newest
from mlm_train.config.load import dump_config, load_config
from tests.commands import ROOT, mlm_train, same_losses
from tests.slurm.conftest import PATIENCE, Cluster, SlurmJob, words

PRETRAIN = ROOT / "slurm/pretrain.sbatch"


def test_evaluation_tensorboard_and_a_sweep(
    cluster: Cluster, unbroken: Path, data: Path, tmp_path: Path
) -> None:
    export, configs = tmp_path / "export, one", [tmp_path / "a, lr=1.yaml", tmp_path / "b.yaml"]
    mlm_train("export", unbroken, "--output", export)
    for config in configs:
        _, *overrides = words(data, tmp_path / config.stem, "train.steps=4")
        config.write_text(dump_config(load_config(ROOT / "configs/micro.yaml", overrides)))
    board = cluster.submit(tmp_path / "board.log", ROOT / "slurm/tensorboard.sbatch", unbroken, "login")
    options = (tmp_path / "%a.log", "--array=0-1", "--nodes=1", ROOT / "slurm/sweep.sbatch")
    sweep = cluster.submit(*options, *configs, "optimizer.lr=2e-3")
    evaluation = ("--model", export, "--data", data)
    scored = cluster.submit(tmp_path / "scored.log", ROOT / "slurm/evaluate.sbatch", *evaluation)

    assert scored.end() == "COMPLETED" and "perplexity" in scored.text(), scored.text()
    board.wait_for("then open http://127.0.0.1:")
    found = re.search(r"http://127\.0\.0\.1:(\d+)", board.text())
    node = board.field("BatchHost")
    assert found and f"ssh -N -L {found[1]}:127.0.0.1:{found[1]} -J login {node}" in board.text()
    board.wait_for("TensorBoard 2")  # its own line: it listens
    inside = ["ip", "netns", "exec", cluster.namespace(node)]
    sockets = cluster.do(*inside, "ss", "-Hltn", f"sport = :{found[1]}")
    assert f"127.0.0.1:{found[1]}" in sockets and len(sockets.splitlines()) == 1
    cluster.do("scancel", board.number)
    assert board.end() == "CANCELLED"

    all_end(cluster, sweep)
    for number, config in enumerate(configs):
        log = (tmp_path / f"{number}.log").read_text()
        checkpoint = newest(tmp_path / config.stem / "checkpoints")
        assert checkpoint is not None and checkpoint.name == "step-00000004", log
        assert load_config(tmp_path / config.stem / "config.yaml").optimizer.lr == 2e-3


def test_an_array_of_trainings_for_reproduce(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    about = ("--scale", "tiny", "--text", shutil.copytree(corpus, tmp_path / "prose"))
    output = tmp_path / "results, one"
    mlm_train("reproduce", "data", *about, "--output", output)
    options = (tmp_path / "%a.log", f"--chdir={output}", "--array=0-1", "--nodes=1")
    all_end(cluster, cluster.submit(*options, ROOT / "slurm/reproduce.sbatch", *about))
    for number, kind in enumerate(("base-small", "base")):
        checkpoint = newest(output / f"runs/{kind}-s0/checkpoints")
        assert checkpoint is not None and checkpoint.name == "step-00000060", (
            tmp_path / f"{number}.log"
        ).read_text()
    mlm_train("reproduce", "train", "--number", "1", *about, "--output", output)
    assert "resumed from" not in (output / "runs/base-s0/train.log").read_text()


def all_end(cluster: Cluster, array: SlurmJob) -> None:
    """Wait for the last element of a job array."""
    end = time.monotonic() + PATIENCE
    while cluster.do("squeue", "-h", "-j", array.number):
        assert time.monotonic() < end
        time.sleep(0.5)


def test_a_chain_whose_folder_no_other_job_gets(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    endless = words(data, tmp_path / "run, one", "checkpoint.interval=0", "train.steps=1000000")
    job = ("--nodes=1", PRETRAIN, *endless)
    said = cluster.do(ROOT / "slurm/submit_chain.sh", 2, f"--output={tmp_path}/%j.log", *job)
    first, second = (SlurmJob(cluster, n, tmp_path / f"{n}.log") for n in re.findall(r"of 2: (\d+)", said))
    first.wait_for("step 5/")
    intruder = cluster.submit(tmp_path / "intruder.log", *job)
    assert intruder.end() == "FAILED" and intruder.field("Restarts") == "0"
    assert "is being trained by another process" in intruder.text()
    assert second.field("JobState") == "PENDING"
    cluster.do("scancel", "--batch", "--signal=USR1", first.number)
    assert first.end() == "FAILED" and first.field("ExitCode") == "85:0", first.text()
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+)", first.text())
    assert stopped is not None
    second.wait_for(f"at step {stopped[1]} |")  # "resumed from FOLDER at step N | ..."
    cluster.do("scancel", second.number)
    second.end()


@pytest.mark.long
def test_a_preemption_that_gives_sigterm_alone(
    cluster: Cluster, unbroken: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    low = ("--partition=low", "--signal=B:TERM@180", PRETRAIN, *words(data, run, "checkpoint.interval=0"))
    job = cluster.submit(tmp_path / "log", "--nodes=1", *low)
    job.wait_for("step 5/")
    urgent = ("--partition=high", "--nodes=4", "--exclusive", "--wrap=sleep 1")
    high = cluster.submit(tmp_path / "high.log", *urgent)
    assert high.end() == "COMPLETED" and job.end() == "COMPLETED", job.text()
    assert "stopped by SIGTERM after step" in job.text() and "got SIGUSR1" not in job.text()
    assert job.field("Restarts") == "1"
    same_losses(run, unbroken)
