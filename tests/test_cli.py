"""The command as a whole: help, versions, dry run, doctor, and errors a user may meet."""

import subprocess
import sys
import time

import pytest

from mlm_train import __version__
from mlm_train.cli import COMMANDS, SUMMARY, main
from tests.commands import ROOT, mlm_train, refused


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    mlm_train(command, "--help")
    text = capsys.readouterr().out
    assert "example" in text and f"mlm-train {command}" in text
    assert command in SUMMARY


def test_top_level_help_is_quick_and_lists_all_commands() -> None:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mlm_train", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert all(command in done.stdout for command in COMMANDS)
    assert "torch" not in done.stderr
    assert time.perf_counter() - started < 10  # torch alone would take longer on a loaded machine
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mlm_train", "--help"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert "| torch\n" not in done.stderr, "help must not import torch"


def test_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    mlm_train("--version")
    assert __version__ in capsys.readouterr().out
    assert refused().endswith("COMMAND; see `mlm-train --help`")
    assert "invalid choice: 'pretrian'" in refused("pretrian")
    assert refused("pretrain").endswith("section.field=value; see `mlm-train pretrain --help`")
    assert refused("tol", "verify", "table", "--wrong").startswith(
        "mlm-train: unrecognized arguments: --wrong"
    )
    assert "--sample: invalid int value: 'x'" in refused("tol", "verify", "table", "--sample", "x")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--debug", "nowhere.yaml"])
    errors = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" in errors and "nowhere.yaml does not exist" in errors


def test_dry_run_allocates_nothing_and_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    mlm_train("pretrain", "configs/flex-3h2-1b.yaml", "--dry-run", "--world", 64)
    text = capsys.readouterr().out
    assert "1,208," in text and "704," in text  # total and active parameters, millions
    assert "compute_intermediate_size: 2048" in text and "memory per rank" in text
    assert "4 a micro-batch x 64" in text
    assert "multiple of" in refused("pretrain", "configs/memory-1b.yaml", "--dry-run", "--world", 63)


def test_doctor_finds_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    mlm_train("doctor")
    text = capsys.readouterr().out
    assert "torch" in text and "missing" not in text
