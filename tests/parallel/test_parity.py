"""Contract 5: every layout and FFN-M mode gives the loss and every gradient of one process."""

import pytest

from tests.ranks import run_on_ranks

MODELS = {
    "base": {"kind": "base"},
    "base gqa tied": {"kind": "base", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "memory": {"kind": "memory"},
    "memory tied, alpha": {"kind": "memory", "tie_word_embeddings": True, "memory_scale": [1.0, 0.5, 0.0]},
    "flex": {"kind": "flex", "flex_beta": 2, "num_key_value_heads": 2},
    "flex linear post": {
        "kind": "flex",
        "flex_beta": 2,
        "compute_form": "linear",
        "compute_input": "post_attention",
    },
}


def cases() -> dict[str, dict]:
    """Name -> case: every model, in both FFN-M modes, with and without accumulation."""
    found = {}
    for name, model in MODELS.items():
        for mode in (None,) if model["kind"] == "base" else ("per_token", "unique"):
            for micro_batch in (1, 4):
                found[f"{name} / {mode} / micro-batch {micro_batch}"] = {
                    "model": model,
                    "mode": mode,
                    "micro_batch": micro_batch,
                }
    found["embeddings not decayed"] = found["memory / unique / micro-batch 1"] | {
        "optimizer": {"lr": 1e-2, "clip": 0.5, "decay_embeddings": False}
    }
    return found


# Sizes that neither 2 nor 4 divides: padding of vocabulary, FFN, FFN-C and FFN-M.
ODD = {"vocab_size": 97, "intermediate_size": 45, "num_key_value_heads": 4}


def tensor_cases(tensor: int) -> dict[str, dict]:
    """The cases at a tensor-parallel size, with even and odd dimensions."""
    found = {}
    for name, case in cases().items():
        if case["model"].get("num_key_value_heads", 4) % tensor == 0:
            found[f"TP{tensor} {name}"] = case | {"parallel": {"tensor": tensor}}
        odd = case["model"] | ODD
        if odd["kind"] == "flex":
            odd = {key: value for key, value in odd.items() if key != "flex_beta"}
            odd["compute_intermediate_size"] = 21
        found[f"TP{tensor} odd {name}"] = case | {"parallel": {"tensor": tensor}, "model": odd}
    return found


def pipeline_cases(tensor: int, pipeline: int) -> dict[str, dict]:
    """Models x transports x schedules: uneven layers, tied heads, micro-batches that PP does not divide."""
    found = {}
    for name, model in MODELS.items():
        has_memory = model["kind"] != "base"
        if tensor > 1:
            model = {**model, "vocab_size": 97, "intermediate_size": 45, "num_key_value_heads": 4}
        model = model | {"num_hidden_layers": 5, "memory_scale": None}
        modes = ("per_token", "unique") if has_memory else (None,)
        for number, transport in enumerate(("broadcast", "relay", "replicate") if has_memory else (None,)):
            for schedule in ("gpipe", "1f1b", "interleaved_1f1b"):
                if schedule == "interleaved_1f1b" and pipeline > 2:
                    continue
                layout = {"tensor": tensor, "pipeline": pipeline, "schedule": schedule}
                if transport:
                    layout["x0_transport"] = transport
                if schedule == "interleaved_1f1b":
                    layout["virtual_stages"] = 2
                elif schedule == "1f1b":
                    layout["layers_per_stage"] = {2: [4, 1], 4: [1, 2, 1, 1]}[pipeline]
                case = {"model": model, "mode": modes[number % len(modes)], "micro_batch": 1}
                title = f"TP{tensor} PP{pipeline} {name} / {transport} / {schedule} / {case['mode']}"
                found[title] = case | {"parallel": layout}
    return found


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(2, 1, 2), (4, 1, 4), (4, 2, 2), (4, 1, 2)])
def test_pipeline_parity_with_one_process(world: int, tensor: int, pipeline: int) -> None:
    named = pipeline_cases(tensor, pipeline)
    results = run_on_ranks(
        "tests.parallel.parity_cases:run_cases", world, timeout=900, cases=list(named.values())
    )
    worst = {key: max(result[key] for result in results) for key in results[0]}
    print(f"world {world}, TP {tensor}, PP {pipeline}: {len(results)} cases, worst errors {worst}")
    for name, error in zip(named, results, strict=True):
        assert max(error["loss"], error["norm"], error["gradients"]) <= 1e-5, (name, error)
        assert error["weights"] <= 1e-4, (name, error)


@pytest.mark.parametrize(("world", "tensor"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_parity_with_one_process(world: int, tensor: int) -> None:
    named = cases() if tensor == 1 else tensor_cases(tensor)
    results = run_on_ranks("tests.parallel.parity_cases:run_cases", world, cases=list(named.values()))
    worst = {key: max(result[key] for result in results) for key in results[0]}
    print(f"world {world}, TP {tensor}: {len(results)} cases, worst errors {worst}")
    for name, error in zip(named, results, strict=True):
        assert error["loss"] <= 1e-5, (name, error)
        assert error["norm"] <= 1e-5, (name, error)
        assert error["gradients"] <= 1e-5, (name, error)
        assert error["weights"] <= 1e-4, (name, error)


def test_bf16_is_no_further_from_fp32_than_one_process() -> None:
    distance = run_on_ranks(
        "tests.parallel.parity_cases:run_bf16_cases",
        2,
        model={"kind": "flex", "flex_beta": 2},
        modes=["per_token", "unique"],
        micro_batch=1,
        seeds=5,
    )
    print(distance)
    assert distance["alone"] > 1e-4, "the peer must really compute in bf16"
    for mode in ("per_token", "unique"):
        assert distance[mode] <= 1.25 * distance["alone"], distance


def test_the_suite_sees_a_wrong_normalisation() -> None:
    """Averaging each rank's own mean, as careless code does, must fail where masks differ by rank."""
    case = {"model": {"kind": "memory"}, "mode": "unique", "micro_batch": 4}
    (error,) = run_on_ranks("tests.parallel.parity_cases:run_with_local_normalisation", 2, cases=[case])
    assert error["gradients"] > 1e-2, error
