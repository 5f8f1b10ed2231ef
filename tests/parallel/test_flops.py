"""MFU's FLOPs against the matmuls that torch counts, in every mode, stage split and layout."""

from typing import Any

import pytest
import torch

from mlm_train.monitor.resources import datasheet_peak_flops, peak_flops
from tests.parallel.layouts import MODES
from tests.parallel.reference import GLOBAL_BATCH, LENGTH
from tests.ranks import run_on_ranks

HIDDEN, LAYERS = 32, 4
ATTENTION = (
    6 * LAYERS * HIDDEN * LENGTH * (LENGTH * GLOBAL_BATCH)
)  # causal: half of each matmul, three passes
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{}, {"zero_stage": 2}, {"tensor": 2}, {"pipeline": 2, "layers_per_stage": [3, 1]}],
    4: [{"pipeline": 2, "layers_per_stage": [3, 1]}, {"tensor": 2}],
}
KINDS: dict[str, dict[str, Any]] = {
    "base": {"kind": "base", "tie_word_embeddings": True},
    "memory": {"kind": "memory"},
    "flex": {"kind": "flex", "compute_intermediate_size": 22},
}


def _cases(world: int) -> dict[str, dict[str, Any]]:
    found = {}
    for layout in LAYOUTS[world]:
        for kind, model in KINDS.items():
            model = model | {"num_hidden_layers": LAYERS}
            modes = {"base": {"none": None}, "memory": MODES, "flex": {"table shared": MODES["table shared"]}}
            for name, mode in modes[kind].items():
                engine = {"engine": "fsdp"} if "owned" in name else {}
                if engine and "zero_stage" in layout:
                    continue
                if world == 4 and "shared" not in name:
                    continue  # fewer ranks show it
                # Kept layers recompute nothing, so that each matmul counts.
                kept = {"kept_layers": LAYERS} if mode and mode["mode"] == "table" else {}
                case = {"model": model, "parallel": layout | engine}
                found[f"{layout} {kind} {name}"] = case | ({"memory": mode | kept} if mode else {})
    return found


@pytest.mark.parametrize("world", LAYOUTS)
def test_mfu_counts_the_matmuls_of_a_step(world: int) -> None:
    cases = _cases(world)
    results = run_on_ranks("tests.parallel.flops_cases:count_matmuls", world, cases=list(cases.values()))
    for name, result in zip(cases, results, strict=True):
        assert result["logged"] == pytest.approx(result["matmuls"] + ATTENTION, rel=1e-9), name


def test_recomputation_does_not_count() -> None:
    model, table = KINDS["memory"] | {"num_hidden_layers": LAYERS}, {"mode": "table"}
    kept = {"model": model, "memory": table | {"kept_layers": LAYERS}}
    cases = [kept, {"model": model, "memory": table}, kept | {"train": {"activation_checkpointing": "full"}}]
    first, *others = run_on_ranks("tests.parallel.flops_cases:count_matmuls", 1, cases=cases)
    for other in others:
        assert other["logged"] == pytest.approx(first["logged"]) and other["matmuls"] > first["matmuls"]


def test_peaks_are_named_after_their_origin() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "fp32", None).keys() == {"measured"}
    assert peak_flops(cpu, "fp32", 2.0)["datasheet"] == 2e12
    assert datasheet_peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert datasheet_peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert datasheet_peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert datasheet_peak_flops("NVIDIA A1000", "bf16") is None
