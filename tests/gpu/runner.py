"""Run checks one after another, each in processes of its own, and report every one of them."""

import importlib
import platform
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import torch
import torch.distributed as dist

from tests.gpu.checks import Check, Figures, NotPossible, ranks_on
from tests.ranks import run_on_ranks

PASSED: Final = "passed"
FAILED: Final = "FAILED"
NOT_POSSIBLE: Final = "not possible here"
# Packages whose absence is a fault, not a reason.
NEEDED = {"torch", "mlm_train", "tests"}


@dataclass(frozen=True)
class Outcome:
    """What became of a check. `reason`: why it failed or cannot run. `missing`: figures, and why."""

    name: str
    outcome: Literal["passed", "FAILED", "not possible here"]
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    def lines(self) -> Iterator[str]:
        """The report of a check; a failure's traceback follows its last line."""
        *traceback, last = self.reason.strip().splitlines() or [""]
        shown = last or "; ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
        colon = ": " if self.outcome == NOT_POSSIBLE else "  "
        yield f"{self.name:14} {self.outcome:6} {self.seconds:7.1f} s{colon}{shown}"
        yield from (f"    {line}" for line in traceback)
        yield from (f"    {what} {NOT_POSSIBLE}: {why}" for what, why in self.missing.items())

    def impossible(self) -> dict[str, str]:
        """What of it could not run here, and why."""
        whole = {self.name: self.reason} if self.outcome == NOT_POSSIBLE else {}
        return whole | {f"{self.name}, {what}": why for what, why in self.missing.items()}


def machine(device: str) -> dict[str, Any]:
    """The versions and the cards of this run."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }
    if device == "cpu":
        return found | {"ranks": ranks_on(device)}
    module = torch.get_device_module(device)
    cards = [module.get_device_properties(index) for index in range(module.device_count())]
    return found | {
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cards": [f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards],
    }


def run(name: str, check: Check, device: str) -> Outcome:
    """Run one check. Its processes are its own: what a fault leaves on a device affects no other check."""
    ranks = ranks_on(device) if check.sharded else 1
    if check.sharded and ranks < 2:
        return Outcome(name, NOT_POSSIBLE, reason="one device, and it shards over two or more")
    started = time.perf_counter()
    try:
        found = run_on_ranks(
            "tests.gpu.runner:perform",
            ranks,
            check.timeout,
            "tests.gpu.preload",
            function=check.target,
            device=device,
        )
    except AssertionError as error:
        return Outcome(name, FAILED, time.perf_counter() - started, reason=str(error))
    seconds = time.perf_counter() - started
    if "not_possible" in found:
        return Outcome(name, NOT_POSSIBLE, seconds, reason=found["not_possible"])
    figures, missing = {}, {}
    for what, value in found.items():
        if isinstance(value, str):
            missing[what] = value
        else:
            figures[what] = value
    return Outcome(name, PASSED, seconds, figures, missing)


def perform(function: str, device: str) -> Figures:
    """Run a check's function on this rank; without what it needs here, return the reason alone."""
    torch.set_float32_matmul_precision("highest")  # no TF32
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    module, _, name = function.partition(":")
    try:
        figures: Figures = getattr(importlib.import_module(module), name)(device)
    except NotPossible as error:
        return _together({"not_possible": str(error)})
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in NEEDED:
            raise
        return _together({"not_possible": f"{error.name} is not installed"})
    return figures


def _together(figures: Figures) -> Figures:
    """The same, once all ranks are here: those still connecting to one that has left would fail."""
    if dist.is_initialized():
        dist.barrier()
    return figures


def summary(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """How many checks had which outcome; the failures, and all that was not possible, by name."""
    outcomes = list(outcomes)
    counts = {what: sum(each.outcome == what for each in outcomes) for what in (PASSED, FAILED, NOT_POSSIBLE)}
    counts["figures of the others " + NOT_POSSIBLE] = sum(len(each.missing) for each in outcomes)
    yield ", ".join(f"{count} {what}" for what, count in counts.items())
    yield from (f"{FAILED}: {each.name}" for each in outcomes if each.outcome == FAILED)
    for each in outcomes:
        yield from (f"{NOT_POSSIBLE}: {what}: {why}" for what, why in each.impossible().items())


def tree_of(machine: dict[str, Any], outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """The report as JSON."""
    return machine | {"checks": [asdict(outcome) for outcome in outcomes]}
