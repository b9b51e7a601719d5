"""Networks by name. Each takes images in [0, 1] and normalises them in its first layer."""

from sparse_adv.models.architectures import Architecture, build, find, names
from sparse_adv.models.checkpoints import fit_ticket, load_checkpoint
from sparse_adv.models.normalize import Normalize

__all__ = ["Architecture", "Normalize", "build", "find", "fit_ticket", "load_checkpoint", "names"]
