"""Hyperparameters of a run: plain dataclasses, validated when they are created.

The texts under `Args:` are also the help texts of the command line, which has a flag for every field.
"""

from sparse_adv.config.data import DataConfig, NetworkConfig
from sparse_adv.config.pruning import Growth, Method, MethodConfig, PruneConfig, Scope
from sparse_adv.config.training import (
    NORMS,
    OBJECTIVES,
    SINGLE_STEP,
    LearningRateSchedule,
    Norm,
    Objective,
    Precision,
    TrainConfig,
)

__all__ = [
    "NORMS",
    "OBJECTIVES",
    "SINGLE_STEP",
    "DataConfig",
    "Growth",
    "LearningRateSchedule",
    "Method",
    "MethodConfig",
    "NetworkConfig",
    "Norm",
    "Objective",
    "Precision",
    "PruneConfig",
    "Scope",
    "TrainConfig",
]
