"""Writes tests/seconds.json: what each file takes, and which of its tests are slow or start a process."""

import json
import multiprocessing.process
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SLOW = 1.0  # seconds, without the fixtures' setup
# A fixture's, once for all tests of a process that use it. Its own processes make none of them slow.
SLOW_FIXTURE = 3.0


class Recorder:
    """Under xdist, a worker measures, and the main process gathers from the reports."""

    def __init__(self, config: pytest.Config, table: Path) -> None:
        self.config, self.table = config, table
        self.started = 0  # processes
        self.seconds: dict[str, float] = defaultdict(float)  # of each file
        self.calls: dict[str, dict[str, Any]] = {}  # of each test
        self.fixtures: dict[str, float] = {}
        sys.addaudithook(self._audit)
        start = multiprocessing.process.BaseProcess.start

        def counted(process: multiprocessing.process.BaseProcess) -> None:
            self.started += 1  # also one that a server forks, which no event tells
            start(process)

        multiprocessing.process.BaseProcess.start = counted  # type: ignore[method-assign]

    def _audit(self, event: str, _: Any) -> None:
        self.started += event in ("subprocess.Popen", "os.fork", "os.posix_spawn")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self.item = item
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        begun = time.monotonic()
        yield
        name = f"{fixturedef.baseid}::{fixturedef.argname}"
        self.item.user_properties.append(("fixture", [name, time.monotonic() - begun]))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        begun, started = time.monotonic(), self.started
        yield
        named = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
        item.user_properties.append(
            (
                "call",
                {
                    "seconds": time.monotonic() - begun,
                    "started": self.started > started,
                    "fixtures": [f"{found[-1].baseid}::{name}" for name, found in named.items()],
                },
            )
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.partition("::")[0]] += report.duration
        if report.when != "teardown":
            return
        for kind, found in report.user_properties:
            if kind == "call":
                self.calls[report.nodeid] = found  # type: ignore[assignment]
            elif kind == "fixture":
                name, seconds = found  # type: ignore[misc]
                self.fixtures[name] = max(seconds, self.fixtures.get(name, 0.0))

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workerinput"):
            return
        table = json.loads(self.table.read_text()) if self.table.is_file() else {}
        slow: dict[str, dict[str, float]] = defaultdict(dict)
        for nodeid, call in self.calls.items():
            file, _, name = nodeid.partition("::")
            waits = any(self.fixtures.get(fixture, 0.0) > SLOW_FIXTURE for fixture in call["fixtures"])
            if call["seconds"] > SLOW or call["started"] or waits:
                name = name.partition("[")[0]
                slow[file][name] = round(max(call["seconds"], slow[file].get(name, 0.0)), 1)
        for file, seconds in self.seconds.items():
            table[file] = {"seconds": round(seconds, 1), "slow": dict(sorted(slow[file].items()))}
        self.table.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
