"""Weight-sparse convolutions and a fused PGD step as PyTorch ops: fast robust training of sparse networks."""

from importlib.metadata import version

__version__ = version("sparse_adv")
