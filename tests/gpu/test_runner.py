"""The suite for GPUs, run on a CPU: every check passes or says why it cannot run; a fault is reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.commands import ROOT
from tests.gpu import kernels, speed, sync
from tests.gpu.__main__ import main
from tests.gpu.checks import CHECKS, Figures, ranks_on, within
from tests.gpu.runner import FAILED, NOT_POSSIBLE, PASSED, Outcome, perform, run, summary

# What a machine for training need not have, for the checks that do not need it.
OPTIONAL = (
    "datasets", "deepspeed", "fsspec", "matplotlib", "megatron", "pyarrow", "pytest", "ray", "sentencepiece",
    "tensorboard", "tokenizers", "transformers",
)  # fmt: skip
_WITHOUT = f"""
import sys
class Nothing:
    def find_spec(name, path=None, target=None):
        if name in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing)
"""
# Checks that cannot run on a CPU, and parts of checks.
ON_CPU = {"sync"}
PARTS_ON_CPU = {
    "compile, base, flex, recompute",
    "fsdp, replicated (HSDP)",
    "bench, hf.compiled",
}


def suite(*words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_every_check_passes_on_a_cpu_or_says_why_not(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = suite("--device", "cpu", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["torch"] == torch.__version__ and report["device"] == "cpu"
    assert done.stdout.startswith(f"torch: {torch.__version__}\npython: 3.")
    outcomes = [Outcome(**check) for check in report["checks"]]
    assert [outcome.name for outcome in outcomes] == list(CHECKS)
    for outcome in outcomes:
        assert outcome.outcome == (NOT_POSSIBLE if outcome.name in ON_CPU else PASSED)
        assert outcome.reason if outcome.name in ON_CPU else outcome.figures
        assert f"\n{outcome.name:14}" in done.stdout
    impossible = {what: why for outcome in outcomes for what, why in outcome.impossible().items()}
    assert impossible.keys() == ON_CPU | PARTS_ON_CPU and all(impossible.values())
    for what, why in impossible.items():
        assert f"\nnot possible here: {what}: {why}\n" in done.stdout
    assert f"{len(CHECKS) - 1} passed, 0 FAILED, 1 not possible here, 3 " in done.stdout


def test_faults_and_packages_that_are_not_there(tmp_path: Path) -> None:
    """A broken check fails; what needs those packages is not possible, by name; the rest passes."""
    (tmp_path / "sitecustomize.py").write_text(_WITHOUT)
    paths = os.pathsep.join(map(str, (tmp_path, ROOT)))
    broken, *others = "tests.gpu.broken:rows", "zero", "tol-build", "rows", "tol-rows"
    done = suite("--device", "cpu", broken, *others, PYTHONPATH=paths)
    assert done.returncode == 1, done.stderr
    assert "\n2 passed, 1 FAILED, 2 not possible here, " in done.stdout, done.stdout
    assert "beyond the limits: any-order fp32 " in done.stdout
    assert f"\nFAILED: {broken}\n" in done.stdout
    for name, package in (("zero", "deepspeed"), ("tol-build", "ray")):
        assert f"\nnot possible here: {name}: {package} is not installed\n" in done.stdout


def test_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[tuple[str, ...], str]] = [
        (("--device", "cpu", "row"), "tests.gpu: row is not a check; choose from attention, "),
        (("--device", "cpu", "--json", "no/where"), "tests.gpu: --json no/where: give a file in a folder"),
    ]
    if not torch.cuda.is_available():
        asked.append(((), "tests.gpu: --device cuda: torch finds no CUDA device here; use --device cpu\n"))
    for words, message in asked:
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err.startswith(message)


def test_one_device_shards_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks_on("cpu") == 2
    monkeypatch.setattr("tests.gpu.runner.ranks_on", lambda device: 1)
    outcome = run("fsdp", CHECKS["fsdp"], "cuda")
    assert outcome.outcome == NOT_POSSIBLE and "one device" in outcome.reason
    assert "not possible here: fsdp: one device" in "\n".join(summary([outcome]))


def test_a_module_of_ours_that_is_missing_is_a_fault() -> None:
    with pytest.raises(ModuleNotFoundError):
        perform("tests.gpu.nowhere:check", "cpu")


def test_the_line_of_a_failure_comes_first() -> None:
    outcome = Outcome("sync", FAILED, 1.0, reason="Traceback\n  at a line\nAssertionError: why")
    lines = list(outcome.lines())
    assert lines == [
        "sync           FAILED     1.0 s  AssertionError: why",
        "    Traceback",
        "      at a line",
    ]


def test_limits() -> None:
    figures: Figures = {"a fp32": 1e-6, "b": 2.0, "c": "no such card"}
    assert within(figures, {"fp32": 1e-5}) == figures
    for limits in ({"fp32": 1e-7}, {"b": 1.0}):
        with pytest.raises(AssertionError, match="beyond the limits"):
            within(figures, limits)
    with pytest.raises(AssertionError, match="nan"):
        within({"a fp32": float("nan")}, {"fp32": 1.0})


def test_the_first_synchronising_call_is_named() -> None:
    """Of a stand-in for torch's refusal, which no CPU gives, in a function of the package."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    with (
        patch.object(Tensor, "index_add_", refuse),
        pytest.raises(AssertionError, match=r"^mlm_train/memory/rows.py:\d+ waits .*: table.index_add_\("),
    ):
        sync.unsynchronised(lambda: kernels.rows("cpu"))
    with pytest.raises(RuntimeError, match="another"):
        sync.unsynchronised(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_what_the_command_lacks_is_a_reason() -> None:
    too_large = "--preset 1b: a variant needs about 60.0 GiB, but 20.0 are free"
    assert speed.reason_of(f"mlm-train: {too_large}; choose a smaller one") == too_large
    missing = "ModuleNotFoundError: No module named 'deepspeed'"
    assert speed.reason_of(f"[rank0]: {missing}\nmlm-train: base: its process ended with code 1") == missing
    assert speed.reason_of("mlm-train: base: its process ended with code 1") is None


def test_why_a_variant_was_not_measured_is_a_figure() -> None:
    rows = [{"name": "tiny.base.speed", "median": 3.0}, {"name": "tiny.base.memory.peak", "median": 2.0**31}]
    notes = ["not measured: hf.eager: transformers is not installed", "another note"]
    report = {"rows": rows, "ratios": {"tiny.over": 1.5}, "notes": notes}
    found = speed.figures_of(report, speed.PRESETS["tiny"])
    expected = {"base tokens/s": 3.0, "base GiB": 2.0, "over": 1.5}
    assert found == expected | {"hf.eager": "transformers is not installed"}
    with pytest.raises(AssertionError, match="base: does not compile"):
        speed.figures_of(report | {"notes": ["not measured: base: does not compile"]}, speed.PRESETS["tiny"])
