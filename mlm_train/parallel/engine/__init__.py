"""Engines: data parallelism and the optimizer."""

from torch import nn

from mlm_train.config import Config
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.engine.deepspeed_zero import DeepSpeedEngine
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.extensions import find

# Names of config field parallel.engine (config/choices.py lists them too).
ENGINES: dict[str, type[Engine]] = {"deepspeed": DeepSpeedEngine}


def make_engine(model: nn.Module, config: Config, runtime: Runtime) -> Engine:
    """Create the engine of config field parallel.engine for this rank's shard of the model."""
    engine: Engine = find("parallel.engine", config.parallel.engine, ENGINES, Engine)(model, config, runtime)
    return engine
