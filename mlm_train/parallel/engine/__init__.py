"""Engines: data parallelism and the optimizer."""

from collections.abc import Sequence

from torch import nn

from mlm_train.config import Config
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.engine.deepspeed_zero import DeepSpeedEngine
from mlm_train.parallel.engine.fsdp import FsdpEngine
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.extensions import find

# Names of config field parallel.engine (config/choices.py lists them too).
ENGINES: dict[str, type[Engine]] = {"fsdp": FsdpEngine, "deepspeed": DeepSpeedEngine}


__all__ = ["ENGINES", "Engine", "make_engine"]


def make_engine(model: nn.Module, config: Config, runtime: Runtime, roots: Sequence[nn.Module]) -> Engine:
    """Create the engine of config field parallel.engine for this rank's shard of the model.

    roots: the modules that a step calls (Executor.roots).
    """
    kind = find("parallel.engine", config.parallel.engine, ENGINES, Engine)
    engine: Engine = kind(model, config, runtime, roots)
    return engine
