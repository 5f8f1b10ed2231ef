"""A temporarily full disk: no line or scalar is lost, and none is written in part."""

import resource
import signal
from pathlib import Path

from mlm_train.config import load_config
from mlm_train.monitor.appended import Appended
from mlm_train.monitor.writers import TensorBoardWriter
from tests.commands import scalars


class Full:
    """Limits files of this process to `size` bytes, like a full disk."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.heard)


def test_lines_wait_for_room(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    log = Appended(path)
    log.add(b"one\n")
    with Full(6):
        log.add(b"two\n")
        log.add(b"three\n")
        assert path.read_bytes() == b"one\n"
    log.add(b"four\n")
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"
    with Full(6):
        log.add(b"five\n")
    log.close()
    assert path.read_bytes().endswith(b"four\nfive\n")


def test_scalars_wait_for_room_and_a_later_launch_voids_what_it_repeats(tmp_path: Path) -> None:
    config = load_config("configs/micro.yaml", ["data.path=none", f"train.output={tmp_path}"])
    events = TensorBoardWriter(config, first_step=1)
    for step in range(1, 6):
        with Full(250 if step in (3, 4) else 10_000):
            events.scalars({"train/loss": 10.0 - step, "train/lr": 0.5}, step)
    events.close()
    assert scalars(tmp_path, "train/loss") == {step: 10.0 - step for step in range(1, 6)}
    events = TensorBoardWriter(config, first_step=4)
    events.scalars({"train/loss": 1.5}, 4)
    events.close()
    assert scalars(tmp_path, "train/loss") == {1: 9.0, 2: 8.0, 3: 7.0, 4: 1.5}
