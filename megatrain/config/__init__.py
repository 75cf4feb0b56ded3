"""What the user wrote: read, checked, frozen. `load` is the only way in."""

from megatrain.config.load import dump, load
from megatrain.config.problem import Problem
from megatrain.config.schema import (
    CheckpointConfig,
    DataConfig,
    ImageClassificationConfig,
    LoraConfig,
    MaskedLMConfig,
    ModelConfig,
    ObjectiveConfig,
    ObserveConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeScaling,
    RunConfig,
    RunSection,
    ScheduleConfig,
    SpikesConfig,
    TrainConfig,
    TrainingDataset,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "ImageClassificationConfig",
    "LoraConfig",
    "MaskedLMConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Problem",
    "RopeScaling",
    "RunConfig",
    "RunSection",
    "ScheduleConfig",
    "SpikesConfig",
    "TrainConfig",
    "TrainingDataset",
    "dump",
    "load",
]
