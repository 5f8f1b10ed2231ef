"""What the ranks of the fault tests run: a step that one rank makes non-finite, between good steps."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mlm_train.model.transformer import Transformer
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.mesh.sharded import local
from mlm_train.train.step import Trainer
from tests.parallel.parity_cases import make_trainer, my_batches, whole_weights
from tests.parallel.reference import tiny_config


def spoil_forward(model: Transformer, layer: str) -> Callable[[], None]:
    """Make a layer return NaN; returns a function that undoes it."""
    return model.layers[layer].register_forward_hook(lambda _, __, output: output * torch.nan).remove


def spoil_once(model: Transformer, layer: str) -> Callable[[], None]:
    """Make a layer return NaN in its next forward pass only."""
    calls = iter([torch.nan])
    return model.layers[layer].register_forward_hook(lambda _, __, out: out * next(calls, 1.0)).remove


def spoil_weight(model: Transformer, layer: str) -> Callable[[], None]:
    """Set a weight to infinity, as after a flipped bit."""
    weight: Any = model.layers[layer].get_parameter("self_attn.o_proj.weight")
    held = local(getattr(weight, "ds_tensor", weight)).data.view(-1)
    before = held[1].clone()
    held[1] = torch.inf
    return lambda: held[1:2].copy_(before)


def spoil_gradient(model: Transformer, layer: str) -> Callable[[], None]:
    """Make a weight's gradient NaN."""
    projection = model.layers[layer].get_submodule("self_attn.o_proj")
    if isinstance(projection.weight, DTensor):  # FSDP's passes have another parameter in its place

        def spoil(_: object, __: object, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda gradient: gradient * torch.nan)

        return projection.register_forward_hook(spoil).remove
    return projection.get_parameter("weight").register_hook(lambda gradient: gradient * torch.nan).remove


KINDS = {"forward": spoil_forward, "once": spoil_once, "weight": spoil_weight, "gradient": spoil_gradient}


def run(cases: list[dict]) -> list[dict[str, Any]]:
    """The outcome of each case; their layouts may differ."""
    return [_run(**case) for case in cases]


def _run(kind: str, guilty: int, model: dict, **sections: Any) -> dict[str, Any]:
    config = tiny_config(model, train={"micro_batch_size": 1}, **sections)
    runtime = processes.start(config)

    def step(trainer: Trainer, number: int) -> Any:
        return trainer.step(my_batches(runtime, number, config), 1e-3)

    trainer = make_trainer(config, runtime)
    step(trainer, 0)
    before = whole_weights(trainer.engine)
    network = trainer.engine.model
    assert isinstance(network, Transformer)
    layer = next(iter(network.layers))
    undo = KINDS[kind](network, layer) if runtime.topology.rank == guilty else None
    broken = step(trainer, 1)
    if undo is not None:
        undo()
    kept = _equal(before, whole_weights(trainer.engine))
    good = step(trainer, 2)
    clean = make_trainer(config, runtime)
    step(clean, 0)
    expected = step(clean, 2)
    went_on = expected.loss == good.loss and _equal(
        whole_weights(trainer.engine), whole_weights(clean.engine)
    )
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (broken.fault, broken.grad_norm, kept, went_on, good.fault, layer))
    return {
        "faults": [outcome[0] for outcome in outcomes],
        "norms": [str(outcome[1]) for outcome in outcomes],
        "kept": all(outcome[2] for outcome in outcomes),
        "went_on": all(outcome[3] for outcome in outcomes),
        "good": [outcome[4] for outcome in outcomes],
        "layer": outcomes[guilty][5],
    }


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)
