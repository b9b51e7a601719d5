"""Weight-sparse convolutions and a fused PGD step as PyTorch ops: fast robust training of sparse networks."""

from importlib.metadata import version

from sparse_adv import attacks, masks, nn, ops
from sparse_adv.nn import densify, explain, sparsify

__version__ = version("sparse_adv")

__all__ = ["attacks", "densify", "explain", "masks", "nn", "ops", "sparsify"]
