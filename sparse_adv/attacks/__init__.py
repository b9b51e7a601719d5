"""Adversarial attacks: loops of the fused ops `random_start` and `pgd_step`, and searches for the nearest example.

An attack leaves the model as it was: training flags, buffers (except with bn_mode "train"), `requires_grad` and
`.grad`; no attack computes weight gradients. Images are in [lo, hi], normally [0, 1]; a model that needs normalised
images must normalise inside. A model in DistributedDataParallel is attacked through its `.module`. So is one in
AveragedModel, or on one device in DataParallel, if the wrapper has no hooks. On CUDA, repeated attacks can be captured
as CUDA graphs, see `Graphs`.
"""

from sparse_adv.attacks import losses
from sparse_adv.attacks.apgd import APGD, APGDT, apgd, apgd_t
from sparse_adv.attacks.autoattack import AutoAttack
from sparse_adv.attacks.base import Attack
from sparse_adv.attacks.bim import BIM, bim
from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.cw import CW, cw
from sparse_adv.attacks.deepfool import DeepFool, deepfool
from sparse_adv.attacks.distances import distances
from sparse_adv.attacks.eotpgd import EOTPGD, eotpgd
from sparse_adv.attacks.fab import FAB, FABT, fab, fab_t
from sparse_adv.attacks.fgsm import FFGSM, FGSM, fgsm, fgsm_rs, n_fgsm
from sparse_adv.attacks.fmn import FMN, fmn
from sparse_adv.attacks.gradient_masking import signs_of_masking
from sparse_adv.attacks.losses import Loss
from sparse_adv.attacks.mifgsm import MIFGSM, mifgsm
from sparse_adv.attacks.multi_attack import MultiAttack
from sparse_adv.attacks.noise import GN, VANILA
from sparse_adv.attacks.options import BN_MODES, AttackOptions, BasicOptions, CommonOptions, LossOptions
from sparse_adv.attacks.pgd import PGD, PGDL2, pgd
from sparse_adv.attacks.rfgsm import RFGSM, rfgsm
from sparse_adv.attacks.run_attack import run_attack
from sparse_adv.attacks.square import Square, square
from sparse_adv.attacks.tpgd import TPGD, tpgd

__all__ = [
    "APGD",
    "APGDT",
    "BIM",
    "BN_MODES",
    "CW",
    "EOTPGD",
    "FAB",
    "FABT",
    "FFGSM",
    "FGSM",
    "FMN",
    "GN",
    "MIFGSM",
    "PGD",
    "PGDL2",
    "RFGSM",
    "TPGD",
    "VANILA",
    "Attack",
    "AttackOptions",
    "AutoAttack",
    "BasicOptions",
    "CommonOptions",
    "DeepFool",
    "Graphs",
    "Loss",
    "LossOptions",
    "MultiAttack",
    "Square",
    "apgd",
    "apgd_t",
    "bim",
    "cw",
    "deepfool",
    "distances",
    "eotpgd",
    "fab",
    "fab_t",
    "fgsm",
    "fgsm_rs",
    "fmn",
    "losses",
    "mifgsm",
    "n_fgsm",
    "pgd",
    "rfgsm",
    "run_attack",
    "signs_of_masking",
    "square",
    "tpgd",
]
