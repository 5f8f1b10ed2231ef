"""Writes tests/seconds.json: what each file takes, and which of its tests are slow or start a process."""

import importlib
import json
import multiprocessing.process
import sys
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.order import file_of, function_of

# Of this process's CPU, which other load does not change: of a test without its fixtures, and of a fixture,
# which is set up once for all tests of a process that use it.
SLOW, SLOW_FIXTURE = 1.0, 3.0


class Recorder:
    """Under xdist, a worker measures, and the main process gathers from the reports."""

    def __init__(self, config: pytest.Config, table: Path) -> None:
        self.config, self.table = config, table
        self.started = 0  # processes
        self.seconds: dict[str, float] = defaultdict(float)  # of each file
        self.calls: dict[str, dict[str, Any]] = {}  # of each test
        self.slow_fixtures: set[str] = set()
        if hasattr(config, "workerinput") or not config.getoption("numprocesses"):
            self._watch()

    def _watch(self) -> None:
        importlib.import_module("tests.preload")  # or the first test to import something would be slow
        sys.addaudithook(self._audit)
        start = multiprocessing.process.BaseProcess.start

        def counted(process: multiprocessing.process.BaseProcess) -> None:
            self.started += 1  # also one that a server forks, which no event tells
            start(process)

        multiprocessing.process.BaseProcess.start = counted  # type: ignore[method-assign]

    def _audit(self, event: str, _: Any) -> None:
        self.started += event in ("subprocess.Popen", "os.fork", "os.posix_spawn")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.item = item

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, object, object]:
        begun, started = time.process_time(), self.started
        value = yield
        if self.started > started or time.process_time() - begun > SLOW_FIXTURE:
            self.item.user_properties.append(("slow fixture", f"{fixturedef.baseid}::{fixturedef.argname}"))
        return value

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        begun, started = time.process_time(), self.started
        yield
        slow = self.started > started or time.process_time() - begun > SLOW
        named = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
        fixtures = [f"{found[-1].baseid}::{name}" for name, found in named.items()]
        item.user_properties.append(("call", {"slow": slow, "fixtures": fixtures}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[file_of(report.nodeid)] += report.duration
        if report.when != "teardown":
            return
        for kind, found in report.user_properties:
            if kind == "call":
                self.calls[report.nodeid] = found  # type: ignore[assignment]
            elif kind == "slow fixture":
                self.slow_fixtures.add(str(found))

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workerinput"):
            return
        table = json.loads(self.table.read_text()) if self.table.is_file() else {}
        slow: dict[str, set[str]] = defaultdict(set)
        for nodeid, call in self.calls.items():
            if call["slow"] or self.slow_fixtures.intersection(call["fixtures"]):
                slow[file_of(nodeid)].add(function_of(nodeid))
        for file, seconds in self.seconds.items():
            table[file] = {"seconds": round(seconds, 1), "slow": sorted(slow[file])}
        self.table.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
