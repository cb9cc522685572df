"""Settings of every command as frozen dataclasses, and their files. Imports no jax."""

from metalr.config.settings import (
    MODEL_SETTINGS,
    QUICKSTART,
    CompareConfig,
    EvaluationConfig,
    GridConfig,
    InnerConfig,
    MeshConfig,
    ModelConfig,
    OuterConfig,
    SearchConfig,
    SlurmConfig,
    SpaceConfig,
    SweepConfig,
    TableConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "MODEL_SETTINGS",
    "QUICKSTART",
    "CompareConfig",
    "EvaluationConfig",
    "GridConfig",
    "InnerConfig",
    "MeshConfig",
    "ModelConfig",
    "OuterConfig",
    "SearchConfig",
    "SlurmConfig",
    "SpaceConfig",
    "SweepConfig",
    "TableConfig",
    "TaskConfig",
    "TrainConfig",
]
