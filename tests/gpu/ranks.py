"""Whole steps on several ranks, one GPU each, against float64 in one process on a CPU."""

import torch.distributed as dist

from tests.gpu.checks import Figures
from tests.gpu.steps import BASE, FLEX, FSDP, MEMORY, bf16_errors, errors_of
from tests.parallel.layouts import Case


def fsdp(device: str) -> Figures:
    """Weights, gradients and moments sharded; rows of tables computed here, shared, and owned."""
    shared = ("per_token", "unique", "table", "table shared", "table owned", "table of a layer owned")
    cases: dict[str, Case] = {f"memory {mode}": {"model": MEMORY, "mode": mode} for mode in shared}
    cases |= {"base": {"model": BASE, "mode": None}, "flex owned": {"model": FLEX, "mode": "table owned"}}
    replicated: Case = {"model": MEMORY, "mode": "unique", "parallel": FSDP | {"replicate": 2}}
    figures = errors_of(device, {name: {"micro_batch": 1} | case for name, case in cases.items()})
    if dist.get_world_size() < 4:
        return figures | {"replicated (HSDP)": f"{dist.get_world_size()} ranks, and it needs 4"}
    return figures | errors_of(device, {"replicated (HSDP)": {"micro_batch": 1} | replicated})


def fsdp_bf16(device: str) -> Figures:
    shared = ["unique", "table shared", "table owned", "table owned, bf16 gradient rows"]
    return bf16_errors(device, FLEX, shared, micro_batch=1)


def zero(device: str) -> Figures:
    cases: dict[str, Case] = {
        f"ZeRO-{stage}": {
            "model": MEMORY,
            "mode": "unique" if stage == 3 else "table",
            "micro_batch": 1,
            "parallel": {"zero_stage": stage},
        }
        for stage in (1, 2, 3)
    }
    return errors_of(device, cases)
