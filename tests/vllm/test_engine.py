"""Real engines of vLLM: their greedy tokens are our decoder's, from every kind of model, table and layout."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.commands import ROOT
from tests.vllm.conftest import ENVIRONMENT, TABLES

Complete = Callable[..., tuple[list[list[list[int]]], str]]
Expected = Callable[..., list[list[int]]]


def test_every_encoding_and_tier(made: Path, complete: Complete, expected: Expected) -> None:
    """One engine of flex, its table replaced between the prompts' passes."""
    plain = {"folder": str(made / "flex-tol")}
    tiers = [
        {"tier": "resident"},
        {"tier": "shared", "lock": True, "first_touch": True},
        {"tier": "disk", "depth": 3},
        {"tier": "disk", "cache_bytes": 100_000, "direct": True},
        {"tier": "disk", "cache_bytes": 100_000, "hot": str(made / "data")},
    ]
    patched = {"patches": [str(made / "patch.safetensors")]}
    tables = [
        plain,
        *({"folder": str(made / f"flex-tol-{name}")} for name in TABLES),
        *(plain | tier for tier in tiers),
        plain | patched,
    ]
    found, said = complete("flex", tables, new=48, additional_config={"tol": plain})
    assert len(found) == len(tables), said
    whole = expected("flex", "flex-tol", 48)
    assert found[0] == whole
    for name, ids in zip(TABLES, found[1:], strict=False):
        assert ids == expected("flex", f"flex-tol-{name}", 48), name
        assert ids != whole or name in ("bfloat16", "float16", "int8"), name
    for tier, ids in zip(tiers, found[1 + len(TABLES) :], strict=False):
        assert ids == whole, tier
    assert found[-1] == expected("flex", "flex-tol", 48, **patched) != whole


def test_base_is_a_llama_that_vllm_knows(complete: Complete, expected: Expected) -> None:
    found, said = complete("base")
    assert found == [expected("base")], said
    assert "LlamaForCausalLM" in said and "MemoryLLM" not in said


def test_tensor_and_pipeline_parallel(made: Path, complete: Complete, expected: Expected) -> None:
    """FFN-M looked up, each stage reading its layers' bytes; and computed, x0 sent to the later stage.

    Not eager: vLLM's CPU worker makes a later stage's buffers only where it warms up.
    """
    stages = {"pipeline_parallel_size": 2, "enforce_eager": False}
    tol = {"folder": str(made / "flex-tol-mixed"), "tier": "disk", "cache_bytes": 20_000}
    scale = {"memory_scale": [1.0, 0.0, 0.5, 1.0]}
    found, said = complete("flex", **stages, additional_config={"tol": tol}, hf_overrides=scale)
    assert found == [expected("flex", "flex-tol-mixed", **scale)], said
    found, said = complete("linear", **stages, tensor_parallel_size=2)
    assert found == [expected("linear")], said


def test_16_bit_agrees_mostly(made: Path, complete: Complete, expected: Expected) -> None:
    """Reported, with loose limits: rounding differs, and one other token changes all that follow."""
    tol = {"tol": {"folder": str(made / "flex-tol-bfloat16")}}
    found, said = complete("flex", dtype="bfloat16", additional_config=tol)
    assert found, said
    ours = expected("flex", "flex-tol-bfloat16", dtype="bfloat16")
    first = sum(a[0] == b[0] for a, b in zip(found[0], ours, strict=True))
    same = sum(a == b for a, b in zip(found[0], ours, strict=True))
    print(f"bfloat16: {first} of 20 first tokens agree, {same} of 20 whole continuations")
    assert first >= 15


def test_a_table_of_another_model_is_one_line(made: Path, complete: Complete) -> None:
    """Where vLLM is started by hand, in its log."""
    other = made / "memory-tol"
    found, said = complete("flex", additional_config={"tol": {"folder": str(other)}})
    assert not found and f"UserError: {other} was built from another model than {made / 'flex'}: give" in said


def test_the_benchmark_at_a_tiny_shape(tmp_path: Path) -> None:
    report = tmp_path / "vllm.json"
    options = ("--preset", "tiny", "--runs", "1", "--tokens", "2", "--batch", "3", "--folder", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "mlm_train", "bench", "vllm", *options, "--json", report],
        cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tree = json.loads(report.read_text())
    names = ("memory", "llama_memory", "flex", "llama_flex")
    assert [row["name"] for row in tree["rows"]] == [f"{name}.token" for name in names]
    assert tree["ratios"].keys() == {"vllm_over_vllm_llama_memory", "vllm_over_vllm_llama_flex"}
    assert all(value > 0 for value in tree["ratios"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["vllm.json"]
