"""Signals are delayed where they would do harm, and never lost. For whole commands see test_interrupts.py."""

import importlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_train.checkpoint.index import read_index
from mlm_train.checkpoint.reading import slices
from mlm_train.checkpoint.shards import write_shard
from mlm_train.errors import Terminated, UserError
from mlm_train.model.logical import LogicalSlice
from mlm_train.utils.files import finished
from mlm_train.utils.signals import heard, held, stoppable

NUMBERS = (signal.SIGINT, signal.SIGTERM)
MODULE = """
import signal
signal.raise_signal(signal.SIGINT)
whole = sum(range(1000))
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore pytest's handlers."""
    before = {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait(seconds: float = 5.0) -> None:
    """Like code that is not aware of signals."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("number", NUMBERS)
def test_raised_at_once(number: signal.Signals) -> None:
    with pytest.raises(Terminated if number == signal.SIGTERM else KeyboardInterrupt), stoppable():
        signal.raise_signal(number)
        pytest.fail("it was not raised")
    assert heard() == number


def test_held_until_a_result_is_in_place() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), stoppable():
        with held():
            with held():
                signal.raise_signal(signal.SIGINT)
            wait(0.2)
            done.append("in place")
        pytest.fail("it was not raised after the block")
    assert done == ["in place"]


def test_a_module_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "signalled.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt), stoppable():
        importlib.import_module("signalled")
        wait()
    assert sys.modules.pop("signalled").whole == sum(range(1000))


def test_what_cleans_up_is_let_finish() -> None:
    cleaned = []
    with pytest.raises(KeyboardInterrupt), stoppable():
        try:
            raise UserError("an error of its own")
        except UserError:
            signal.raise_signal(signal.SIGINT)
            wait(0.2)
            cleaned.append(True)
        wait()
    assert cleaned


def test_raised_again_where_it_was_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    """By a library that continues after any error, and by a finalizer."""

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def swallow() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            return

    for swallowing in (swallow, Finalised):
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt), stoppable():
            swallowing()
            wait()
        assert time.monotonic() < begun + 2
    assert capsys.readouterr() == ("", "")


def test_ignored_where_the_shell_has_it_ignored() -> None:
    """As in the background, where Ctrl-C is meant for the foreground process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stoppable():
        signal.raise_signal(signal.SIGINT)
    assert heard() is None and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_checkpoint_is_not_damaged_by_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a read error."""
    part = LogicalSlice("weight/a", torch.Size([4]), (0,), torch.ones(4))
    index = read_index(tmp_path, [finished(write_shard(tmp_path / "shard.safetensors", [part])).entry])
    read = slices.read_at

    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return read(*args)

    monkeypatch.setattr(slices, "read_at", interrupted)
    with pytest.raises(KeyboardInterrupt), stoppable():
        slices.read_tensor(index, "weight/a")
