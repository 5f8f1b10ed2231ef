"""A process of a benchmark that answers orders: JSON, one per line, through its standard input and output."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from mlm_train.errors import UserError


class Worker(Protocol):
    """What a process does."""

    def do(self, order: dict[str, Any]) -> dict[str, Any]:
        """Execute an order. Returns the answer; UserError refuses it."""
        ...


class WorkerProcess:
    """The process of one variant, `mlm-train WORDS`, seen from the coordinator."""

    def __init__(self, name: str, *words: str) -> None:
        self.name = name
        command = [sys.executable, "-m", "mlm_train", *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, order: dict[str, Any]) -> None:
        """Send an order without waiting for its answer."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self._failed()

    def answer(self) -> dict[str, Any]:
        """The answer to the last order. UserError where it was refused or the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._failed()
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise UserError(f"{self.name}: {answer['refused']}")
        return answer

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Send an order and return its answer."""
        self.send(order | {"do": do})
        return self.answer()

    def _failed(self) -> None:
        code = self.process.wait()
        raise UserError(f"{self.name}: its process ended with code {code}")

    def end(self) -> None:
        """Close the pipe and wait for the process to end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()


def serve_orders(build: Callable[[dict[str, Any]], Worker]) -> int:
    """In the process: build the worker from its first order, and do all of them until the pipe is closed."""
    answers = _own_output()
    worker: Worker | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if worker is None:
                worker = build(order)
            answer = worker.do(order)
        except UserError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _own_output() -> TextIO:
    """The pipe to the coordinator; from now on, libraries' output goes to stderr."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
