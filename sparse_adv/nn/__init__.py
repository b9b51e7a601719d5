"""Masked layers, and the way from a dense model to a sparse one and back.

The seam of the library: above it nobody knows how a masked convolution is computed, below it nobody knows what a ticket
is.
"""

from sparse_adv.nn.allreduce_hook import Traffic, exchange_kept_gradients
from sparse_adv.nn.conversion import densify, frozen_weights, sparsify
from sparse_adv.nn.dead_channels import dead_channels, silence_dead_channels
from sparse_adv.nn.explanation import Explanation, explain
from sparse_adv.nn.macs import Macs, count_macs
from sparse_adv.nn.masked_conv2d import MaskedConv2d
from sparse_adv.nn.masked_linear import MaskedLinear
from sparse_adv.nn.shrinking import Shrunk, shrink
from sparse_adv.nn.tuning import tune

__all__ = [
    "Explanation",
    "Macs",
    "MaskedConv2d",
    "MaskedLinear",
    "Shrunk",
    "Traffic",
    "count_macs",
    "dead_channels",
    "densify",
    "exchange_kept_gradients",
    "explain",
    "frozen_weights",
    "shrink",
    "silence_dead_channels",
    "sparsify",
    "tune",
]
