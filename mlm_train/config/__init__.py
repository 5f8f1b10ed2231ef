"""Typed configuration: the schema, and its reader of YAML with dotted overrides."""

from mlm_train.config.load import changed_fields, dump_config, load_config
from mlm_train.config.model import ModelConfig
from mlm_train.config.monitor import MonitorConfig
from mlm_train.config.schedule import ScheduleConfig
from mlm_train.config.schema import (
    BatchSizeWarmup,
    CheckpointConfig,
    Config,
    DataConfig,
    MemoryConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

__all__ = [
    "BatchSizeWarmup",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "MemoryConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "TrainConfig",
    "changed_fields",
    "dump_config",
    "load_config",
]
