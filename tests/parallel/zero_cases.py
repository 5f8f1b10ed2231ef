"""What the ranks of the ZeRO tests run: bytes held by each stage, counted on the live engine."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mlm_train.config import Config
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.engine.fsdp import FsdpEngine
from mlm_train.parallel.mesh.sharded import local
from mlm_train.plan.memory import rank_memory
from tests.parallel.parity_cases import make_trainer, my_batches, run_cases
from tests.parallel.reference import tiny_config


def count_bytes(engines: list[dict]) -> list[dict[str, dict[str, int]]]:
    """Per engine: bytes on this rank between two micro-batches of a second step, and the planned bytes."""
    return [_count(parallel) for parallel in engines]


def _count(parallel: dict) -> dict[str, dict[str, int]]:
    config = tiny_config({"kind": "memory", "tie_word_embeddings": True}, parallel=parallel)
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    trainer.step(my_batches(runtime, 0, config), 1e-3)
    found: list[dict[str, int]] = []
    trainer.engine.model.register_forward_pre_hook(
        lambda *_: found.append(_held(trainer.engine)), prepend=True
    )
    trainer.backward(my_batches(runtime, 1, config))
    assert len(found) > 1, "it takes two micro-batches to see accumulated gradients"
    return {"held": found[1], "planned": rank_memory(config, runtime.topology)._asdict()}


def _held(engine: Engine) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on this rank."""
    if isinstance(engine, FsdpEngine):
        return _held_by_fsdp(engine)
    zero, parameters = engine.zero.optimizer, list(engine.model.parameters())
    weights = [parameter.data for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    state = [value for entry in engine.zero.basic_optimizer.state.values() for value in entry.values()]
    if engine.stage in (1, 2):
        state += zero.single_partition_of_fp32_groups
        gradients += [g for group in zero.all_grad_tensors.values() for g in group or []]
    if engine.stage == 3:
        weights += [parameter.ds_tensor for parameter in parameters]
        state += zero.fp32_partitioned_groups_flat
        gradients += zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values()
    return {
        "weights": _bytes(weights),
        "gradients": _bytes(gradients),
        "optimizer": _bytes(value for value in state if value.dim()),
    }


def _held_by_fsdp(engine: FsdpEngine) -> dict[str, int]:
    """The same under FSDP, whose whole gradients are in its own parameters."""
    gradients = [parameter.grad for parameter in (*engine.parameters.values(), *engine.rows.values())]
    states = [m._get_fsdp_state() for m in engine.model.modules() if isinstance(m, FSDPModule)]
    groups = [
        group  # torch 2.11 has one per module
        for state in states
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    ]
    for parameter in (parameter for group in groups for parameter in group.fsdp_params):
        gradients.append(parameter.unsharded_accumulated_grad)
        if hasattr(parameter, "_unsharded_param"):
            gradients.append(parameter._unsharded_param.grad)
    state = [value for entry in engine.optimizer.state.values() for value in entry.values() if value.dim()]
    return {
        "weights": _bytes(engine.shards.values()),
        "gradients": _bytes(None if g is None else local(g) for g in gradients),
        "optimizer": _bytes(state),
    }


def _bytes(tensors: Any) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None}
    return sum(storage.nbytes() for storage in storages.values())


def refuse_an_update(stages: list[int]) -> list[float]:
    """The norm that each stage reports for a step with non-finite gradients, after a good step."""
    return [_refused(tiny_config({"kind": "base"}, parallel={"zero_stage": stage})) for stage in stages]


def _refused(config: Config) -> float:
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    trainer.step(my_batches(runtime, 0, config), 1e-3)
    honest = trainer.executor.loss  # type: ignore[attr-defined]

    def broken(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Any:
        return honest(hidden, weight, labels, scale * torch.inf)

    trainer.executor.loss = broken  # type: ignore[attr-defined]
    return trainer.step(my_batches(runtime, 1, config), 1e-3).grad_norm


def run_counting_copies_twice(cases: list[dict]) -> list[dict[str, float]]:
    """The cases with a mutation: a copy of the embedding on a later stage is as good as the first."""
    honest = Engine.__init__

    def careless(self: Engine, model: Any, config: Config, runtime: processes.Runtime, roots: Any) -> None:
        if runtime.topology.pipeline_rank > 0:
            model.embed_tokens.weight.ds_pipe_replicated = False
            model.embed_tokens.weight.model_parallel = True
        honest(self, model, config, runtime, roots)

    with patch.object(Engine, "__init__", careless):
        return run_cases(cases)
