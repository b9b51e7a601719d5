"""Adversarial training of any classifier of images in [0, 1], dense or sparse."""

from sparse_adv.config import OBJECTIVES, TrainConfig
from sparse_adv.training.checkpoint import read_weights
from sparse_adv.training.determinism import deterministic
from sparse_adv.training.evaluation import Accuracy, clean_accuracy, fgsm_accuracy, robust_accuracy
from sparse_adv.training.hook import UpdateHook
from sparse_adv.training.loop import Training, train
from sparse_adv.training.objectives import Passes, TrainingObjective, adversarial_loss
from sparse_adv.training.result import final_test

__all__ = [
    "OBJECTIVES",
    "Accuracy",
    "Passes",
    "TrainConfig",
    "Training",
    "TrainingObjective",
    "UpdateHook",
    "adversarial_loss",
    "clean_accuracy",
    "deterministic",
    "fgsm_accuracy",
    "final_test",
    "read_weights",
    "robust_accuracy",
    "train",
]
