"""The base class of all objectives: the interface that an update calls, and training without attack."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sparse_adv import attacks
from sparse_adv.attacks import CommonOptions
from sparse_adv.attacks.checks import check_batch
from sparse_adv.attacks.losses import Loss, SmoothedCrossEntropy
from sparse_adv.config import TrainConfig

Noise = Generator | Tensor | None
"""What a random start is drawn from: a generator, or Philox key and offset, as `ops.random_start` takes them."""


class Passes(NamedTuple):
    """Passes through the network for each image of an update."""

    attack_forward: int = 0
    """Forward passes that no backward pass with gradients of weights follows."""
    attack_backward: int = 0
    """Backward passes down to the image, without gradients of weights."""
    update: int = 1
    """Forward passes that are followed by a backward pass with gradients of weights."""
    to_image: int = 0
    """How many of these backward passes continue down to the image."""
    dense_gradients: int = 0
    """How many of them form the gradients of pruned weights too."""


class CraftingOptions(CommonOptions):
    """The options that all attacks of objectives have in common."""

    eps: float
    alpha: float


class TrainingObjective:
    """What an update trains on: the images that `craft` makes of a batch, and the `loss` on them.

    This class crafts nothing and has the loss CE(f(x), y), the cross-entropy with `config.label_smoothing`; a subclass
    overrides what it does otherwise.

    Args:
        config: of the training.
        check: whether to validate the values of every batch.
        graphs: CUDA graphs of the attack to use again.
    """

    updates = 1
    """Number of updates on each batch."""
    has_loss_of_one_batch: ClassVar[bool] = True
    """Whether the loss of a batch needs nothing of the batches before it."""

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        self.config, self.check, self.graphs = config, check, graphs
        smoothing = config.label_smoothing
        self.attack_loss: str | Loss = SmoothedCrossEntropy(smoothing) if smoothing else "ce"
        """CE for attacks; always the same object, since its identity is part of the key of a CUDA graph."""

    @property
    def passes(self) -> Passes:
        """Passes of the update that was made last, or of every update if all are alike."""
        return Passes()

    @property
    def variant(self) -> Hashable:
        """What, beside `state_dict`, `craft`, `loss` and `after_update` depend on: a CUDA graph holds one variant."""
        return None

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for the updates of an epoch, counted from 0."""

    def draws(self, x: Tensor) -> bool:
        """Whether `craft` draws a number for these images; it draws one or none."""
        return False

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        """Return the images of the update: float [N, C, H, W] in [0, 1]."""
        if self.check:
            check_batch(x, y)
        return x

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of the batch, a scalar with a gradient."""
        return self.cross_entropy(model(adv), y)

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy of the update."""
        return F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)

    def after_update(self) -> None:
        """Use the gradients of the update, if the objective needs them; what it changes are tensors, in place."""

    def count_update(self) -> None:
        """Called after each update, one that was replayed too, in which no other method was called."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of earlier updates that the next one needs: the tensors themselves."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from this state."""

    def _options(self, noise: Noise) -> CraftingOptions:
        return {
            "eps": self.config.eps,
            "alpha": self.config.step_size,
            "generator": noise,
            "check": self.check,
            "graphs": self.graphs,
            "engine": self.config.engine,
        }


class Natural(TrainingObjective):
    """Training without attack."""
