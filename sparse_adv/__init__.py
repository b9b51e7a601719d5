"""Weight-sparse convolutions and a fused PGD step as PyTorch ops: fast robust training of sparse networks."""

from sparse_adv import attacks, engine, masks, nn, ops
from sparse_adv.memory import keep_freed_memory
from sparse_adv.nn import densify, explain, sparsify

__version__ = ops.build_facts()["version"]

__all__ = ["attacks", "densify", "engine", "explain", "keep_freed_memory", "masks", "nn", "ops", "sparsify"]
