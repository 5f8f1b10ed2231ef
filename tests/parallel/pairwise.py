"""Cases that together contain every pair of choices that the config accepts (an all-pairs design).

From a pool of random valid cases, the one with the most pairs not covered yet is taken until all are covered.
This also tests which pairs the config rejects: test_parity.py lists them.
"""

import random
from functools import cache
from itertools import combinations
from typing import Any

from mlm_train.config.parallel import INTERLEAVED, ZERO_BUBBLE
from mlm_train.errors import UserError
from mlm_train.parallel.mesh.topology import Topology
from tests.parallel.layouts import LAYOUTS as ALL_LAYOUTS
from tests.parallel.layouts import MODELS, MODES, Case, Layout, shaped
from tests.parallel.reference import tiny_config

POOL, TRIES = 4000, 1000
Choice = tuple[tuple[str, Any], ...]

# TP4 and PP4 are in the product only (matrix.py).
LAYOUTS = [layout for layout in ALL_LAYOUTS if layout.tensor < 4 and layout.pipeline < 4]
# Choices that interact in one mechanism: three or more of them in a case, with any other choices.
TOGETHER: list[dict[str, Any]] = [
    {"sequence": True, "mode": "unique", "schedule": "zbv", "model": "memory tied alpha"},
    {"sequence": True, "transport": "replicate", "model": "memory tied alpha"},
    {"sequence": True, "engine": "ZeRO-2", "layout": Layout(2, 1, 2), "mode": "unique"},
    {"sequence": True, "engine": "ZeRO-3", "layout": Layout(2, 1, 2), "recompute": "full"},
    {"engine": "ZeRO-0", "schedule": "zbv", "layout": Layout(1, 2, 2, virtual=2)},
    {
        "engine": "ZeRO-2",
        "schedule": "interleaved_zero_bubble",
        "layout": Layout(1, 2, 2, virtual=2),
        "mode": "unique",
    },
    {"deterministic": True, "transport": "broadcast", "sequence": True},
    {"sequence": True, "mode": "table", "schedule": "zbv", "model": "memory tied alpha"},
    {
        "sequence": True,
        "mode": "table shared",
        "engine": "ZeRO-2",
        "layout": Layout(2, 1, 2),
        "deterministic": True,
    },
    {"mode": "table shared", "schedule": "dualpipe_v", "layout": Layout(1, 2, 2, virtual=2)},
    {
        "mode": "table of a layer shared",
        "transport": "broadcast",
        "layout": Layout(1, 2, 2),
        "engine": "ZeRO-2",
    },
    # Stages of which some have layers without a table and others have none.
    {"mode": "table of a layer shared", "layout": Layout(1, 2, 2), "stages": "longest first"},
    {"mode": "table of a layer shared", "layout": Layout(1, 2, 2), "stages": "longest last"},
    {"mode": "table of a layer", "layout": Layout(1, 2, 1), "stages": "longest first"},
    # Owners of layers: of the ranks' own positions, on unequal stages, with a tied embedding.
    {"mode": "table owned", "sequence": True, "layout": Layout(2, 2, 2), "model": "memory"},
    {"mode": "table owned", "sequence": True, "layout": Layout(2, 1, 2), "model": "memory tied alpha"},
    {"mode": "table owned", "sequence": False, "layout": Layout(2, 1, 2), "model": "flex linear post tied"},
    {"mode": "table of a layer owned", "layout": Layout(1, 2, 2), "stages": "longest first"},
    {"mode": "table owned", "schedule": "zbv", "layout": Layout(1, 2, 2, virtual=2)},
    {"mode": "table owned", "layout": Layout(1, 1, 4), "deterministic": True, "model": "flex"},
]


ENGINES = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "fsdp")


def engine_of(name: str) -> Case:
    """An engine's fields of config section parallel."""
    return {"engine": "fsdp"} if name == "fsdp" else {"zero_stage": int(name[-1])}


def _axes(layout: Layout, model: str) -> dict[str, tuple[Any, ...]]:
    """The choices of every axis other than layout and model."""
    memory, pipeline, tensor = MODELS[model]["kind"] != "base", layout.pipeline > 1, layout.tensor > 1
    straight = ("gpipe", "1f1b")
    virtual = ("interleaved_1f1b", *ZERO_BUBBLE)
    return {
        "mode": tuple(MODES) if memory else (None,),
        "transport": ("broadcast", "relay", "replicate") if memory and pipeline else (None,),
        "schedule": (virtual if layout.virtual > 1 else straight) if pipeline else (None,),
        "stages": (None, "longest first", "longest last") if pipeline else (None,),
        "sequence": (False, True) if tensor else (False,),
        "odd": (False, True) if tensor else (False,),
        "engine": ENGINES,
        "recompute": ("none", "selective", "full"),
        "chunk": (None, 5),
        "deterministic": (False, True),
        "micro_batches": (4, 3) if layout.data > 1 else (4, 5),
    }


def case_of(choice: Choice) -> Case:
    """The case of a choice, for tests/parallel/parity_cases.py."""
    c = dict(choice)
    layout: Layout = c["layout"]
    parallel: Case = {"tensor": layout.tensor, "pipeline": layout.pipeline, **engine_of(c["engine"])}
    for key, name in (("schedule", "pipeline_schedule"), ("transport", "x0_transport")):
        if c[key] is not None:
            parallel[name] = c[key]
    if c["schedule"] in INTERLEAVED:
        parallel["virtual_stages"] = 2
    if c["sequence"]:
        parallel["sequence"] = True
    # A wrong anchor or a weight's gradient counted twice shows with two layers a stage only.
    stages = layout.pipeline * layout.virtual
    layers = max(3, 2 * stages)
    if c["stages"] is not None:
        sizes = [3, *[2] * (stages - 2), 1]
        parallel["layers_per_stage"] = sizes if c["stages"] == "longest first" else sizes[::-1]
    train: Case = {
        "global_batch_size": c["micro_batches"] * layout.data,
        "activation_checkpointing": c["recompute"],
    }
    if c["deterministic"]:
        train["deterministic"] = True
    if c["chunk"]:
        train["loss_chunk_size"] = c["chunk"]
    return {
        "model": shaped(MODELS[c["model"]], layout, c["odd"], layers),
        "mode": c["mode"],
        "micro_batch": 1,
        "parallel": parallel,
        "train": train,
    }


def valid(choice: Choice) -> bool:
    """Whether the config accepts a choice."""
    case, layout = case_of(choice), dict(choice)["layout"]
    sections = {"parallel": case["parallel"], "train": case["train"] | {"micro_batch_size": 1}}
    if case["mode"] is not None:
        sections["memory"] = MODES[case["mode"]]
    try:
        config = tiny_config(case["model"], **sections)
        Topology.of(config.parallel, layout.world).check_batch(config)
    except UserError:
        return False
    return True


def pairs_of(choice: Choice) -> set[tuple[Any, Any]]:
    """Every pair of choices of a case."""
    return set(combinations(choice, 2))


@cache
def pool() -> tuple[list[Choice], set[tuple[Any, Any]]]:
    """Random cases that the config accepts, and the pairs that only rejected cases have."""
    rng, rejected = random.Random(7), set()
    valid_choices: list[Choice] = []
    for _ in range(POOL):
        choice = _draw(rng, {})
        if valid(choice):
            valid_choices.append(choice)
        else:
            rejected |= pairs_of(choice)
    rejected -= set().union(*map(pairs_of, valid_choices))
    for pair in sorted(rejected, key=str):  # rare, or rejected with any other choices
        if rare := _draw_valid(rng, dict(pair)):
            valid_choices.append(rare)
    return valid_choices, rejected - set().union(*map(pairs_of, valid_choices))


def _draw_valid(rng: random.Random, fixed: dict[str, Any]) -> Choice | None:
    """A valid case with the choices of `fixed`, None where TRIES attempts find none."""
    drawn = (_draw(rng, fixed) for _ in range(TRIES))
    return next((choice for choice in drawn if set(fixed.items()) <= set(choice) and valid(choice)), None)


def _draw(rng: random.Random, fixed: dict[str, Any]) -> Choice:
    """A random case with the choices of `fixed`; it may not be valid."""
    layout = fixed.get("layout", rng.choice(LAYOUTS))
    model = fixed.get("model", rng.choice(list(MODELS)))
    axes = {name: rng.choice(values) for name, values in _axes(layout, model).items()}
    axes |= {name: value for name, value in fixed.items() if value in _axes(layout, model).get(name, ())}
    return tuple(({"layout": layout, "model": model} | axes).items())


def together() -> list[Choice]:
    """A valid case for each entry of TOGETHER."""
    rng = random.Random(8)
    choices = [_draw_valid(rng, fixed) for fixed in TOGETHER]
    assert all(choices), choices
    return [choice for choice in choices if choice is not None]


@cache
def pairwise() -> dict[Layout, dict[str, Case]]:
    """Layout -> name -> case."""
    candidates, _ = pool()
    pairs = [pairs_of(choice) for choice in candidates]
    missing, cases = set().union(*pairs), {layout: {} for layout in LAYOUTS}
    required = together()
    while missing or required:
        if required:
            choice = required.pop()
        else:
            choice = candidates[max(range(len(pairs)), key=lambda i: len(pairs[i] & missing))]
        missing -= pairs_of(choice)
        name = " / ".join(_label(key, value) for key, value in choice[1:] if value not in (None, False))
        cases[choice[0][1]][name] = case_of(choice)
    return cases


def _label(key: str, value: Any) -> str:
    """A choice's name in docs/parity.md."""
    named = {"chunk": f"loss chunk {value}", "recompute": f"checkpointing {value}"}
    named |= {
        "deterministic": "deterministic",
        "micro_batches": f"{value} micro-batches",
        "sequence": "SP",
        "stages": f"stages {value}",
        "odd": "odd sizes",
    }
    return named.get(key, str(value))
