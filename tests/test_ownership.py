"""The newest attempt of a restarted Slurm job owns the folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlm_train.errors import UserError
from mlm_train.utils.run_lock import LAUNCH, Attempt, owned, refuse_superseded
from tests.commands import ROOT

HOLD = """
import sys, time
from pathlib import Path
from mlm_train.utils.run_lock import owned
with owned(Path(sys.argv[1]), "being trained"):
    print("held", flush=True)
    time.sleep(60)
"""


def attempt(monkeypatch: pytest.MonkeyPatch, job: str, restart: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def test_a_later_attempt_takes_over_from_one_that_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    orphan = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT, env=os.environ | {"SLURM_JOB_ID": "17"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert orphan.stdout is not None and orphan.stdout.readline() == "held\n"
    attempt(monkeypatch, "18", 3)  # another job has no such right, and does not wait
    started = time.monotonic()
    with pytest.raises(UserError, match="being trained by another process"), owned(folder, "being trained"):
        pass
    assert time.monotonic() - started < 1
    attempt(monkeypatch, "17", 2)
    with owned(folder, "being trained"):
        assert "restart 2 of job 17 takes over from restart 0 of job 17" in capsys.readouterr().err
        _, errors = orphan.communicate(timeout=10)
        assert orphan.returncode == 2
        assert (
            errors == f"mlm-train: {folder} was taken over by restart 2 of job 17; "
            "restart 0 of job 17 ends and writes nothing more\n"
        )
        attempt(monkeypatch, "17", 1)  # one that comes late
        with pytest.raises(UserError, match="taken over by restart 2"):
            refuse_superseded(folder)
        with pytest.raises(UserError, match="taken over by restart 2"), owned(folder, "being trained"):
            pass
        assert Attempt.suffix() == ".17-1"
        attempt(monkeypatch, "17", 2)
    assert not list(tmp_path.glob(".*"))


def test_starts_of_a_launch_are_ordered_also_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(start: str, job: str = "", restart: int = 0) -> Attempt:
        attempt(monkeypatch, job, restart) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        monkeypatch.setenv(LAUNCH, start)
        found = Attempt.here()
        assert found is not None
        return found

    first, second, other = here("aa 1"), here("aa 2"), here("bb 3")
    assert second.follows(first) and not first.follows(second) and not other.follows(first)
    assert str(second) == "start 2 of launch aa" and Attempt.suffix() == ".bb-3"
    first, second, requeued = here("aa 1", "7"), here("aa 2", "7"), here("bb 1", "7", 1)
    assert second.follows(first) and requeued.follows(second) and not second.follows(requeued)
    assert not here("cc 1", "7").follows(second), "another launch in the same allocation"
    assert str(second) == "start 2 of the ranks in restart 0 of job 7" and Attempt.suffix() == ".7-0-cc-1"


def test_a_late_rank_of_an_earlier_start_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    environment = os.environ | {LAUNCH: "aa 1"}
    orphan = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert orphan.stdout is not None and orphan.stdout.readline() == "held\n"
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv(LAUNCH, "aa 2")
    with owned(folder, "being trained"):
        _, errors = orphan.communicate(timeout=10)
        assert orphan.returncode == 2 and "taken over by start 2 of launch aa" in errors, errors
    assert not list(tmp_path.glob(".*"))


def test_outside_slurm_there_is_only_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with owned(tmp_path / "run", "being trained"):
        assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"] and Attempt.suffix() == ""
        with pytest.raises(UserError, match="another process"), owned(tmp_path / "run", "being trained"):
            pass
