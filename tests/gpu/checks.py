"""The checks of the suite, by name, and what a check is."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tests.parallel.reference import GLOBAL_BATCH

# What a check returns: figures by name. A text says why a figure cannot be had here.
Figures = dict[str, float | str]
BF16_FACTOR = 1.25  # how much further from float64 than bf16 on a CPU, in one plain process, bf16 may be


class NotPossible(Exception):
    """A check cannot run here; the message says why."""


@dataclass(frozen=True)
class Check:
    """`target`: "module:function"; it gets the device's type and returns figures, or raises.

    `sharded`: it runs on several ranks, one per GPU; else on one. `timeout`: in seconds.
    """

    target: str
    about: str
    sharded: bool = False
    timeout: float = 900


CHECKS = {
    "attention": Check(
        "tests.gpu.kernels:attention", "attention, and its gradients, also of documents apart"
    ),
    "head-loss": Check("tests.gpu.kernels:head", "head and loss by chunks, and their gradients"),
    "rows": Check("tests.gpu.kernels:rows", "lookups of rows and sums of their gradients"),
    "modes": Check("tests.gpu.steps:modes", "steps of base, memory and flex, per_token and unique"),
    "tables": Check("tests.gpu.steps:tables", "steps of memory and flex with tables, kept or not"),
    "bf16": Check("tests.gpu.steps:bf16", "gradients of every kind and mode in bf16"),
    "recompute": Check("tests.gpu.steps:recompute", "steps with activation checkpointing"),
    "documents": Check("tests.gpu.steps:documents", "steps with separate documents"),
    "deterministic": Check("tests.gpu.steps:deterministic", "two runs with the same bits"),
    "compile": Check("tests.gpu.steps:compiled", "steps of compiled layers", timeout=1800),
    "fsdp": Check("tests.gpu.ranks:fsdp", "steps under FSDP, rows shared and owned", sharded=True),
    "fsdp-bf16": Check("tests.gpu.ranks:fsdp_bf16", "gradients under FSDP in bf16", sharded=True),
    "zero": Check("tests.gpu.ranks:zero", "steps under DeepSpeed's ZeRO", sharded=True),
    "sync": Check("tests.gpu.sync:step", "passes and update that never wait for the device"),
    "tol-rows": Check("tests.gpu.tol:rows", "FFN-M of the vocabulary, as a ToL build computes it"),
    "tol-build": Check("tests.gpu.tol:build", "a ToL built by Ray's workers, and generation from it"),
    "tol-serving": Check(
        "tests.gpu.tol:serving", "rows of a table, read part by part and copied beside the computation"
    ),
    "generation": Check("tests.gpu.tol:generation", "generation with FFN-M computed"),
    "bench": Check("tests.gpu.speed:bench", "bench train, beside transformers' Llama", timeout=7200),
}


def ranks_on(device: str) -> int:
    """Ranks of a sharded check: a power of two, which divides the batch; two on a CPU."""
    found = torch.get_device_module(device).device_count() if device != "cpu" else 2
    return 1 << (min(found, GLOBAL_BATCH).bit_length() - 1)


def within(figures: Figures, limits: Mapping[str, float]) -> Figures:
    """The figures; AssertionError where one is beyond its limit, or not a number.

    limits: by a figure's name, or by its last word.
    """
    beyond = [
        f"{name} {value:.2e} > {limit:.2e}"
        for name, value in figures.items()
        if (limit := limits.get(name, limits.get(name.rpartition(" ")[2]))) is not None
        and not (isinstance(value, float) and value <= limit)
    ]
    assert not beyond, "beyond the limits: " + ", ".join(beyond)
    return figures
