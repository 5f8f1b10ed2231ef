"""Which tests run beside each other, longest first, and which are fast, by what they took when recorded.

`tests/seconds.json` says that; `--record-seconds` (tests/recorder.py) writes it anew. Results know
nothing of it.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

TABLE = Path(__file__).with_name("seconds.json")
UNKNOWN = 30.0  # seconds of a file that is not recorded yet
# Folders whose files stay in one process: they share what takes long to bring up, or is there once only.
TOGETHER = ("tests/slurm",)
# The longest, and those that share a Ray, one after another: it ends with the last of them.
FIRST = ("tests/slurm", "tests/tol")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlm_train")
    group.addoption("--fast", action="store_true", help="only tests that take no second and start no process")
    group.addoption("--record-seconds", action="store_true", help="write tests/seconds.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-seconds"):
        from tests.recorder import Recorder

        config.pluginmanager.register(Recorder(config, TABLE))


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def function_of(nodeid: str) -> str:
    """A test's name without its parameters."""
    return nodeid.partition("::")[2].partition("[")[0]


def unit_of(nodeid: str) -> str:
    """The tests of a unit run in one process, one after another."""
    file = file_of(nodeid)
    return next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), file)


def _place(unit: str) -> tuple[bool, ...]:
    """Sorts by FIRST."""
    return tuple(not unit.startswith(folder) for folder in FIRST)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    table = json.loads(TABLE.read_text())
    if config.getoption("--fast"):
        slow = {(file, name) for file, row in table.items() for name in row["slow"]}
        left_out = {item for item in items if (file_of(item.nodeid), function_of(item.nodeid)) in slow}
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if hasattr(config, "workerinput"):
        seconds: dict[str, float] = defaultdict(float)
        for file in {file_of(item.nodeid) for item in items}:
            seconds[unit_of(file)] += table[file]["seconds"] if file in table else UNKNOWN
        items.sort(key=lambda item: (*_place(unit := unit_of(item.nodeid)), -seconds[unit], unit))


class InOrder(LoadScopeScheduling):
    """Hands out units in the order of their tests."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> InOrder:
    config.option.loadscopereorder = False  # by the number of tests
    return InOrder(config, log)
