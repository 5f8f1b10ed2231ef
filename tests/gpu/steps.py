"""Whole steps of the trainer in one process, three each, against float64 on a CPU (tests/parallel)."""

import hashlib
from typing import Any

from mlm_train.parallel import runtime as processes
from mlm_train.train.schedule import learning_rate
from tests.gpu.checks import BF16_FACTOR, Figures, within
from tests.parallel.layouts import MODES, Case
from tests.parallel.parity_cases import make_trainer, my_batches, run_bf16_cases, run_case, whole_weights
from tests.parallel.reference import LIMITS, tiny_config

BASE, MEMORY, FLEX = {"kind": "base"}, {"kind": "memory"}, {"kind": "flex", "flex_beta": 2}
FSDP = {"engine": "fsdp"}  # which needs torch alone
ALONE = ("per_token", "unique", "table", "table kept", "table of a layer")  # modes without other ranks


def errors_of(device: str, cases: dict[str, Case]) -> Figures:
    """The largest error of each case, of those with a limit; AssertionError beyond it.

    A case: arguments of `run_case`, of which the device is set here.
    """
    figures: Figures = {}
    for name, case in cases.items():
        train = case.get("train", {}) | {"device": device}
        arguments: Case = {"micro_batch": 2, "parallel": FSDP} | case | {"train": train}
        error = run_case(**arguments)
        within({f"{name}: {key}": error[key] for key in LIMITS}, LIMITS)
        figures[name] = max(error["loss"], error["norm"], error["gradients"])
    return figures


def modes(device: str) -> Figures:
    cases: dict[str, Case] = {"base": {"model": BASE, "mode": None}}
    for model in (MEMORY, FLEX):
        cases |= {
            f"{model['kind']} {mode}": {"model": model, "mode": mode} for mode in ("per_token", "unique")
        }
    return errors_of(device, cases)


def tables(device: str) -> Figures:
    named = [mode for mode in ALONE if "table" in mode]
    models = (MEMORY, FLEX)
    return errors_of(
        device, {f"{m['kind']} {mode}": {"model": m, "mode": mode} for m in models for mode in named}
    )


def bf16(device: str) -> Figures:
    """The median over several initialisations."""
    figures: Figures = {}
    for model, of_kind in ((BASE, ["none"]), (MEMORY, list(ALONE)), (FLEX, list(ALONE))):
        figures |= bf16_errors(device, model, of_kind, 2)
    return figures


def bf16_errors(device: str, model: Case, modes: list[str], micro_batch: int) -> Figures:
    """Errors of a kind's gradients in bf16, by mode; AssertionError where a CPU is much closer to float64."""
    seeds = 3 if device == "cpu" else 5
    errors = run_bf16_cases(model, modes, micro_batch, seeds, FSDP, device)
    alone, kind = errors.pop("alone"), model["kind"]
    figures: Figures = {kind if mode == "none" else f"{kind} {mode}": each for mode, each in errors.items()}
    limits = dict.fromkeys(figures, BF16_FACTOR * alone)
    return within(figures | {f"{kind}, plain on a CPU": alone}, limits)


def recompute(device: str) -> Figures:
    cases: dict[str, Case] = {
        f"{model['kind']} {extent}": {
            "model": model,
            "mode": mode,
            "train": {"activation_checkpointing": extent},
        }
        for extent in ("selective", "full")
        for model, mode in ((BASE, None), (MEMORY, "unique"), (FLEX, "table"))
    }
    return errors_of(device, cases)


def documents(device: str) -> Figures:
    """Documents in one row, against documents that are run one at a time."""
    cases: dict[str, Case] = {
        f"{model['kind']}": {"model": model, "mode": mode, "data": {"separate_documents": True}}
        for model, mode in ((BASE, None), (MEMORY, "table"), (FLEX, "unique"))
    }
    return errors_of(device, cases)


def deterministic(device: str) -> Figures:
    fixed = {"deterministic": True}
    figures = errors_of(device, {mode: {"model": MEMORY, "mode": mode, "train": fixed} for mode in ALONE})
    for mode in ALONE:
        train = fixed | {"device": device, "precision": "bf16"}
        config = tiny_config(MEMORY, memory=MODES[mode], parallel=FSDP, train=train)
        assert _digest(config) == _digest(config), f"{mode}: two runs differ"
    return figures


def _digest(config: Any) -> str:
    """SHA-256 of the weights after three steps."""
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    for step in range(3):
        trainer.step(my_batches(runtime, step, config), learning_rate(config, step))
    digest = hashlib.sha256()
    for weight in whole_weights(trainer.engine).values():
        digest.update(weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def compiled(device: str) -> Figures:
    """Compiled layers, head and loss, without graph breaks. A CPU compiles for minutes: one case there."""
    from tests.parallel.compile_cases import run_compiled

    cases: dict[str, Case] = {"memory table": {"model": MEMORY | {"num_hidden_layers": 1}, "mode": "table"}}
    if device != "cpu":
        cases |= {"base": {"model": BASE, "mode": None}, "flex unique": {"model": FLEX, "mode": "unique"}}
        for extent in ("selective", "full"):
            recomputes = {"train": {"activation_checkpointing": extent}}
            cases[f"memory {extent}"] = {"model": MEMORY, "mode": "unique"} | recomputes
    figures: Figures = {}
    for name, case in cases.items():
        train = case.get("train", {}) | {"device": device}
        case = case | {"micro_batch": 2, "parallel": FSDP, "train": train}
        error = run_compiled({name: case})[name]
        within({f"{name}: {key}": error[key] for key in LIMITS}, LIMITS)
        assert error["breaks"] == 0, f"{name}: {error['breaks']} graph breaks"
        figures |= {
            name: max(error["loss"], error["norm"], error["gradients"]),
            f"{name} graphs": error["graphs"],
        }
    if device == "cpu":
        figures["base, flex, recompute"] = "compiling takes minutes on a CPU"
    return figures
