"""Attacks: loops around the fused step that find, within a ball around each image, one that the model gets wrong.

Every attack leaves the model as it found it: each module's training flag, buffers, `requires_grad` and `.grad`. None
forms weight gradients. Images are in [lo, hi], normally [0, 1]: a model that wants normalised images normalises inside.
Of a DistributedDataParallel model, whose forward prepares a gradient exchange that an attack never makes, `.module` is
used. On CUDA, attacks that come again can be CUDA graphs: see `Graphs`.
"""

from sparse_adv.attacks.classes import FFGSM, FGSM, PGD, PGDL2, TPGD
from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.functional import Options, fgsm, fgsm_rs, n_fgsm, pgd, tpgd
from sparse_adv.attacks.loop import MODES, Loss

__all__ = [
    "FFGSM",
    "FGSM",
    "MODES",
    "PGD",
    "PGDL2",
    "TPGD",
    "Graphs",
    "Loss",
    "Options",
    "fgsm",
    "fgsm_rs",
    "n_fgsm",
    "pgd",
    "tpgd",
]
