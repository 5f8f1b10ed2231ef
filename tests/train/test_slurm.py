"""`mlm-train launch --slurm` without a Slurm; tests/slurm uses a real one."""

import shlex
import sys
from pathlib import Path

import pytest

from mlm_train.train.slurm import SlurmJob, _advice
from tests.commands import ROOT, TINY, mlm_train, refused

JOB = ("launch", "--slurm", "configs/micro.yaml", *TINY)


def test_the_command_is_shown(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = (f"data.path={data}", f"train.output={tmp_path / 'run'}", "train.global_batch_size=64")
    options = (
        "--nodes",
        4,
        "--gpus-per-node",
        8,
        "--partition",
        "gpu",
        "--account",
        "us",
        "--time",
        "04:00:00",
    )
    mlm_train(*JOB, *overrides, *options, "--render")
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "env" and words[4] == "sbatch" and words[-1] == overrides[-1]
    for option in ("--nodes=4", "--gpus-per-node=8", "--partition=gpu", "--account=us", "--time=04:00:00"):
        assert option in words
    script = next(number for number, word in enumerate(words) if word.endswith("slurm/pretrain.sbatch"))
    assert words[script + 1] == "configs/micro.yaml" and Path(words[script]).is_file()
    assert any(word.endswith("slurm-logs/%x-%j.log") for word in words)
    given = {f"MLM_ROOT={ROOT}", f"MLM_PYTHON={sys.executable}", "MLM_NPROC=8"}
    assert set(words[1:4]) == given and "--export=ALL" in words and "--no-kill" not in words

    spare = ("--nproc", 1, "--nodes", "2:4", "--spares", 1, "--max-restarts", 3, "--render")
    mlm_train(*JOB, *overrides, *spare)
    words = shlex.split(capsys.readouterr().out)
    assert {"--nodes=5", "--no-kill", "MLM_NODES=2:4", "MLM_RANK_RESTARTS=3"} <= set(words)


def test_bad_input(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    place = (f"data.path={data}", f"train.output={tmp_path / 'run'}")
    gpus = ("--gpus-per-node", 1)
    cases = (
        ((*JOB, *place, *gpus), "sbatch is not on the PATH: run this on a login node"),
        ((*JOB, *place), "--slurm needs --gpus-per-node"),
        ((*JOB, *place, "--nproc", 1, *gpus), "--slurm needs --gpus-per-node"),
        ((*JOB, *place, *gpus, "--nodes", 0), "--nodes 0: give at least 1"),
        ((*JOB, *place, "--gpus-per-node", 0), "--gpus-per-node 0: give at least 1"),
        ((*JOB, *place, *gpus, "--rendezvous", "a:1"), "--rendezvous: a Slurm job chooses its own"),
        ((*JOB, *place, *gpus, "--nodes", 3), "train.global_batch_size=8: must be a multiple of"),
        (("launch", "--slurm", "configs/mikro.yaml", *gpus), "did you mean configs/micro.yaml?"),
        (("launch", JOB[2], *TINY, *place), "--nproc is missing"),
        (("launch", JOB[2], *TINY, *place, "--nproc", 1, "--nodes", 2), "--nodes and --rendezvous"),
        (
            ("launch", JOB[2], *TINY, *place, "--nproc", 1, "--time", "1"),
            "--time has an effect only with --slurm",
        ),
    )
    for words, message in cases:
        assert message in refused(*words), words
    assert not (tmp_path / "run").exists()


def test_advice_for_what_slurm_says() -> None:
    """Messages of Slurm 22.05; tests/slurm provokes some of them."""
    advice_for = {
        "allocation failure: Invalid partition name specified": "--partition NAME: `sinfo -s`",
        "allocation failure: Invalid account or account/partition combination specified": "--account us: ",
        "allocation failure: Requested time limit is invalid (missing or exceeds some limit)": "--time HH:MM",
        "allocation failure: Requested node configuration is not available": "--nodes 2 --gpus-per-node 8: ",
        "allocation failure: Invalid generic resource (gres) specification": "--nodes 2 --gpus-per-node 8: ",
        "Job violates accounting/QOS policy (job submit limit)": "--account us: ",
        "Job submission disabled": "check `sinfo`",
    }
    job = SlurmJob("a.yaml", (), nodes=(2, 2), processes=8, gpus=8, account="us")
    for reason, advice in advice_for.items():
        assert _advice(f"sbatch: error: {reason}", job).startswith(advice), reason
