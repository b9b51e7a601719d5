"""Masked layers, and the way from a dense model to a sparse one and back.

The seam of the library: above it nobody knows how a masked convolution is computed, below it nobody knows what a ticket
is.
"""

from sparse_adv.nn.conversion import constant_weights, densify, sparsify
from sparse_adv.nn.explanation import Explanation, explain
from sparse_adv.nn.masked_conv2d import MaskedConv2d
from sparse_adv.nn.tuning import tune

__all__ = ["Explanation", "MaskedConv2d", "constant_weights", "densify", "explain", "sparsify", "tune"]
