"""Training that is sparse from the first step: masks start random or full, and change during training."""

from sparse_adv.config import MethodConfig
from sparse_adv.methods.adaptation import Adaptation
from sparse_adv.methods.schedule import Schedule
from sparse_adv.methods.sparse_training import SparseTraining
from sparse_adv.methods.start import random_masks, start

__all__ = ["Adaptation", "MethodConfig", "Schedule", "SparseTraining", "random_masks", "start"]
