"""Masked layers, and conversion from a dense model to a sparse one and back.

This package imports `masks`, `ops` and `kernels`, and nothing of the attacks and the training above it. The import
contract in pyproject.toml has the order of all packages.
"""

from sparse_adv.nn.allreduce_hook import CommStats, register_masked_allreduce_hook
from sparse_adv.nn.conversion import densify, frozen_weights, sparsify
from sparse_adv.nn.dead_channels import dead_channels, zero_dead_channels
from sparse_adv.nn.dense_gradients import dense_gradients
from sparse_adv.nn.explanation import Explanation, explain
from sparse_adv.nn.macs import Macs, count_macs, mac_density
from sparse_adv.nn.masked_conv2d import MaskedConv2d
from sparse_adv.nn.masked_linear import MaskedLinear
from sparse_adv.nn.shrinking import ShrinkResult, shrink
from sparse_adv.nn.tuning import tune

__all__ = [
    "CommStats",
    "Explanation",
    "Macs",
    "MaskedConv2d",
    "MaskedLinear",
    "ShrinkResult",
    "count_macs",
    "dead_channels",
    "dense_gradients",
    "densify",
    "explain",
    "frozen_weights",
    "mac_density",
    "register_masked_allreduce_hook",
    "shrink",
    "sparsify",
    "tune",
    "zero_dead_channels",
]
