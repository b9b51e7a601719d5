"""Hyperparameters of a run: plain dataclasses, validated when they are created.

The texts under `Args:` are also the help texts of the command line, which has a flag for every field.
"""

from sparse_adv.config.checks import make_plain, refuse_unused, require_radius
from sparse_adv.config.data import DataConfig, NetworkConfig
from sparse_adv.config.pruning import METHODS, Growth, Method, MethodConfig, PruneConfig, Scope
from sparse_adv.config.training import (
    NORMS,
    OBJECTIVES,
    PRECISIONS,
    SCHEDULES,
    SINGLE_STEP,
    LearningRateSchedule,
    Norm,
    Objective,
    Precision,
    TrainConfig,
)

__all__ = [
    "METHODS",
    "NORMS",
    "OBJECTIVES",
    "PRECISIONS",
    "SCHEDULES",
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
    "make_plain",
    "refuse_unused",
    "require_radius",
]
