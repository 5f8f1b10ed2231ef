"""The config of a small step and its executor, shared by several benchmarks."""

from typing import Any

from mlm_train.config import Config
from mlm_train.config.load import parse_config
from mlm_train.model.initial import initialise
from mlm_train.model.transformer import Transformer
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_executor, build_model
from mlm_train.parallel.pipeline.single_stage import Executor

SEED = 1234
MODES: dict[str, dict[str, Any]] = {  # executions of FFN-M, as config sections `memory`
    "per_token": {"mode": "per_token"},
    "unique": {"mode": "unique"},
    "table": {"mode": "table"},
    "kept": {"mode": "table", "kept_layers": 999},  # all of them
}


def step_config(
    model: dict[str, Any],
    mode: str | None,
    length: int,
    micro_batch: int,
    micro_batches: int,
    train: dict[str, Any],
    parallel: dict[str, Any] | None = None,
) -> Config:
    """Config of a step on CPU without data. mode: one of MODES, or auto; None: a base model."""
    tree: dict[str, Any] = {
        "model": model | {"kind": "base" if mode is None else "memory"},
        "data": {"path": "none", "sequence_length": length},
        "parallel": parallel or {},
        "train": {
            "output": "none",
            "steps": 1,
            "device": "cpu",
            "micro_batch_size": micro_batch,
            "global_batch_size": micro_batch * micro_batches,
        }
        | train,
    }
    return parse_config(tree if mode is None else tree | {"memory": MODES.get(mode, {"mode": mode})})


def build(config: Config) -> tuple[Transformer, Executor, processes.Runtime]:
    """Build model and executor on all ranks, without an optimizer; every layout has the same weights."""
    runtime = processes.start(config)
    model = build_model(config, runtime)
    initialise(model, config.model, SEED)
    return model, build_executor(model, config, runtime), runtime
