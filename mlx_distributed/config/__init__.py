"""The configuration of a run. Imports no MLX, so that a file can be checked on any machine."""

from mlx_distributed.config.dump import to_dict, to_yaml
from mlx_distributed.config.load import load_config
from mlx_distributed.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ElasticConfig,
    EvalConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SchedulerConfig,
    SourceConfig,
    TrainConfig,
    WandbConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ElasticConfig",
    "EvalConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SchedulerConfig",
    "SourceConfig",
    "TrainConfig",
    "WandbConfig",
    "load_config",
    "to_dict",
    "to_yaml",
]
