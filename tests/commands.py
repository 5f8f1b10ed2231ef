"""Run commands as a user types them, in this process or in another."""

import contextlib
import io
import os
import random
import re
import socket
import subprocess
import sys
import time
import tty
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from mlm_train.cli import main

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "model.vocab_size=512", "model.hidden_size=32", "model.num_hidden_layers=2",
    "model.num_attention_heads=4", "model.intermediate_size=64", "data.sequence_length=32",
    "model.max_position_embeddings=64", "train.global_batch_size=8", "train.micro_batch_size=2",
    "schedule.warmup_steps=2", "train.precision=fp32", "train.eval_samples=10",
)  # fmt: skip


def mlm_train(*words: object) -> None:
    """Run a command in this process; it must succeed."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        assert not end.code, f"exit code {end.code}"


def refused(*words: object) -> str:
    """Run a command in this process, which must end with exit code 2 and one line. Returns the line."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            assert end.code == 2, f"exit code {end.code}: {errors.getvalue()}"
        else:
            raise AssertionError("the command succeeded")
    lines = errors.getvalue().strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mlm-train: "), lines
    return lines[0]


def outcome(*words: object) -> tuple[int, str]:
    """Run a command in this process. Returns its exit code and its stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            return int(end.code or 0), errors.getvalue()
    return 0, errors.getvalue()


def on_a_terminal(*words: object) -> str:
    """Output of a command, which must succeed, with a terminal as standard output."""
    ours, its = os.openpty()
    tty.setraw(its)  # no carriage returns of the terminal's own
    with ThreadPoolExecutor(1) as reader, open(ours, "rb", buffering=0) as screen:
        seen = reader.submit(_all_of, screen)  # meanwhile: a terminal holds few bytes
        with open(its, "w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            mlm_train(*words)
        return seen.result().decode()


def _all_of(screen: io.FileIO) -> bytes:
    """Read until the other end is closed, which Linux reports as an error."""
    data = b""
    with contextlib.suppress(OSError):
        while block := screen.read(2**16):
            data += block
    return data


def start(*words: object, **environment: str) -> "subprocess.Popen[str]":
    """Start a command as a process of its own, with its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlm_train", *(str(word) for word in words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(text: str, run: Path, *processes: "subprocess.Popen[str]") -> None:
    """Wait until the run's log contains `text`; the processes must stay alive."""
    log = run / "train.log"
    while not (log.is_file() and text in log.read_text()):
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def finished(*words: object, **environment: str) -> str:
    """Run a command as a process of its own, which must succeed. Returns its output."""
    process = start(*words, **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def ranks_under(pid: int | None = None) -> list[psutil.Process]:
    """The descendants of a process, by default this one, that train."""
    ranks = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if "pretrain" in child.cmdline():
                ranks.append(child)
    return ranks


def free_port() -> int:
    """A port nobody listens on, below those that the system hands out: no other process gets it by chance."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port


def listening(process: psutil.Process) -> set[str]:
    """Listening addresses of a process and its children."""
    connections = []
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            connections += each.net_connections("inet")
    waiting = (connection for connection in connections if connection.status == psutil.CONN_LISTEN)
    return {connection.laddr.ip.removeprefix("::ffff:") for connection in waiting}


def scalars(run: Path, tag: str) -> dict[int, float]:
    """Step -> value of a TensorBoard tag, read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def recovery(run: Path, lost: float) -> str:
    """What the loss of a machine at that time has cost: from the log, so to a second."""
    before, _, after = run.joinpath("train.log").read_text().rpartition("resumed from ")
    done = int(re.findall(r" step (\d+)/", before)[-1])
    again = re.search(r" at step (\d+) .*?\n(\S+ \S+) step ", after, re.DOTALL)
    assert again is not None, after
    seconds = time.mktime(time.strptime(again[2], "%Y-%m-%d %H:%M:%S")) - lost
    repeated = done - int(again[1])
    return f"{seconds:.0f} s from the loss to the first step after it, {repeated} steps repeated"


def same_losses(run: Path, other: Path, tolerance: float = 2e-5, norms: float | None = None) -> None:
    """Assert that two runs have the same values at every step, in training and validation.

    `norms`: the tolerance of gradient norms, for runs in several layouts: a token with a hidden state near
    zero multiplies rounding; which text has one depends on the Python whose sources the tests train on.
    """
    for tag in ("train/loss", "train/grad_norm", "validation/loss"):
        values, expected = scalars(run, tag), scalars(other, tag)
        assert values.keys() == expected.keys(), (tag, values)
        for step, value in expected.items():
            assert values[step] == pytest.approx(
                value, rel=norms if norms and tag == "train/grad_norm" else tolerance
            ), (tag, step)
