"""Masked layers, and conversion from a dense model to a sparse one and back.

This package imports `masks`, `ops` and `kernels`, but nothing from the attacks and the training above it. The import
contract in pyproject.toml lists the order of all packages.
"""

from sparse_adv.nn.allreduce_hook import CommStats, register_masked_allreduce_hook
from sparse_adv.nn.conversion import densify, frozen_weights, sparsify
from sparse_adv.nn.dead_channels import dead_channels, revive_dead_channels, zero_dead_channels
from sparse_adv.nn.dense_gradients import dense_gradients
from sparse_adv.nn.explanation import Explanation, Row, explain
from sparse_adv.nn.macs import Macs, count_macs, mac_density
from sparse_adv.nn.masked_conv2d import Choice, LayerChoices, MaskedConv2d
from sparse_adv.nn.masked_linear import MaskedLinear
from sparse_adv.nn.shrinking import ShrinkResult, shrink
from sparse_adv.nn.tuning import Choices, tune

__all__ = [
    "Choice",
    "Choices",
    "CommStats",
    "Explanation",
    "LayerChoices",
    "Macs",
    "MaskedConv2d",
    "MaskedLinear",
    "Row",
    "ShrinkResult",
    "count_macs",
    "dead_channels",
    "dense_gradients",
    "densify",
    "explain",
    "frozen_weights",
    "mac_density",
    "register_masked_allreduce_hook",
    "revive_dead_channels",
    "shrink",
    "sparsify",
    "tune",
    "zero_dead_channels",
]
