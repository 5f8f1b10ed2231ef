"""The command as a whole: help, version, dry run, doctor, and common errors."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mlm_train import __version__
from mlm_train.cli import COMMANDS, main
from mlm_train.errors import Terminated
from mlm_train.utils.signals import stoppable
from tests.commands import ROOT, mlm_train, refused
from tests.parsers import parsers

# Each takes seconds to import, or draws in one that does: help and a wrong option are answered without them.
HEAVY = ("torch", "transformers", "ray", "megatron", "deepspeed", "datasets", "fsspec")
_LOADED = f"""
import sys, time
started = time.perf_counter()
import mlm_train
package = time.perf_counter() - started
loaded = [name for name in {HEAVY} if name in sys.modules]
from mlm_train.__main__ import main
try:
    main()
except SystemExit as end:
    print("exit code", end.code)
loaded += [name for name in {HEAVY} if name in sys.modules]
print(f"{{package:.3f}} s, then {{time.perf_counter() - started:.3f}} s", file=sys.stderr)
print("loaded", loaded)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    mlm_train(command, "--help")
    text = capsys.readouterr().out
    assert "example" in text and f"mlm-train {command}" in text
    assert COMMANDS[command].summary


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


@pytest.mark.parametrize("path", ((), *parsers()), ids=lambda path: " ".join(path) or "mlm-train")
def test_help_imports_nothing_heavy(path: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, *path, "--help"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    print("import mlm_train:", done.stderr)
    assert f"usage: mlm-train{''.join(f' {word}' for word in path)} " in done.stdout
    assert done.stdout.endswith("exit code 0\nloaded []\n")


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
    mlm_train("pretrain", "configs/paper/flex-3h2-1b.yaml", "--dry-run", "--world", 64)
    text = capsys.readouterr().out
    assert "1,208," in text and "704," in text  # total and active parameters, millions
    assert "compute_intermediate_size: 2048" in text and "memory per rank" in text
    assert "4 per micro-batch x 64" in text
    assert "multiple of" in refused("pretrain", "configs/paper/memory-1b.yaml", "--dry-run", "--world", 63)


def test_doctor_finds_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    mlm_train("doctor")
    text = capsys.readouterr().out
    assert "torch" in text and "missing" not in text


def test_full_disks_under_stdout() -> None:
    """One line only, and no other exit code when Python exits."""
    for word, unbuffered in (("--version", ""), ("doctor", ""), ("doctor", "1")):
        with open("/dev/full", "w") as full:
            words = [sys.executable, "-m", "mlm_train", word]
            environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
            done = subprocess.run(
                words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
            )
            silent = subprocess.run(words, stdout=full, stderr=full, cwd=ROOT, env=environment)
        assert (silent.returncode, done.returncode, done.stderr.count("\n")) == (2, 2, 1), done
        assert done.stderr.startswith(
            "mlm-train: the output cannot be written: No space left on device; free"
        )


@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        (KeyboardInterrupt, 130, "stopped by the user"),
        (Terminated, 143, "stopped by SIGTERM; run the same command again to continue"),
    ],
)
def test_stopped_while_modules_are_imported(
    stop: type[BaseException],
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(_: object) -> None:
        raise stop

    monkeypatch.setattr("mlm_train.cli.build_parser", stopped)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        main(["tol", "build"])
    assert (end.value.code, capsys.readouterr().err) == (code, f"mlm-train: {line}\n")


def test_further_signals_let_it_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further signals within seconds are ignored; a later one ends the process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with stoppable():
        pass
    assert all(signal.getsignal(number) == handler for number, handler in before.items())
    ended = list[int]()
    monkeypatch.setattr(os, "_exit", ended.append)
    try:
        with pytest.raises(Terminated), stoppable():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                assert not ended
                monkeypatch.setattr("mlm_train.utils.signals.ECHO_SECONDS", 0.0)
                signal.raise_signal(signal.SIGINT)
        assert ended == [130]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
