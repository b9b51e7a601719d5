"""The base class of all objectives: the interface that an update calls, and training without attack."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sparse_adv import attacks
from sparse_adv.argument_types import shortened
from sparse_adv.attacks import CommonOptions
from sparse_adv.attacks.checks import check_batch
from sparse_adv.attacks.losses import Loss, SmoothedCrossEntropy
from sparse_adv.config import TrainConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Noise = Generator | Tensor | None
"""The source of a random start: a generator, or Philox key and offset, as `ops.random_start` takes them."""


class Passes(NamedTuple):
    """Passes through the network for each image of an update."""

    attack_forward: int = 0
    """Forward passes without a following backward pass that computes gradients of weights."""
    attack_backward: int = 0
    """Backward passes down to the image, without gradients of weights."""
    update: int = 1
    """Forward passes with a following backward pass that computes gradients of weights."""
    to_image: int = 0
    """How many of these backward passes continue down to the image."""
    dense_gradients: int = 0
    """How many of them also compute the gradients of pruned weights."""


class CraftingOptions(CommonOptions):
    """The options that all attacks of objectives have in common."""

    eps: float
    alpha: float


class TrainingObjective:
    """What an update trains on: the images that `craft` makes from a batch, and the `loss` on them.

    This class crafts nothing and has the loss CE(f(x), y), the cross-entropy with `config.label_smoothing`; a subclass
    overrides what it does differently. `train(..., objective=...)` takes your own objective.

    If updates are captured as CUDA graphs, a replay runs only `count_update`. So the other methods may change only the
    tensors of `state_dict`, in place, and everything else that they depend on must be in `variant`.
    `config.graphs=False` turns this off.

    Args:
        config: of the training.
        check: whether to validate the values of every batch.
        graphs: CUDA graphs of the attack to use again.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, data, training
        >>> class FastGradientSign(training.TrainingObjective):
        ...     passes = training.Passes(attack_forward=1, attack_backward=1)
        ...     def craft(self, model, x, y, noise):
        ...         return attacks.fgsm(model, x, y, eps=self.config.eps)
        >>> batches = data.Batches(data.Split(torch.rand(8, 1, 2, 2), torch.arange(8) % 2), 4)
        >>> model, config = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), training.TrainConfig("fgsm", epochs=2)
        >>> [record.step for record in training.train(model, batches, config, objective=FastGradientSign)]
        [2, 4]
    """

    updates = 1
    """Number of updates on each batch."""
    settings: DataclassInstance | dict[str, Any] | None = None
    """Settings besides `config` that decide the images and the loss. They are written to `run.json` with the name of
    the class; a run with other settings is not continued."""
    has_loss_of_one_batch: ClassVar[bool] = True
    """Whether the loss of a batch is independent of the batches before it."""

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        self.config, self.check, self.graphs = config, check, graphs
        smoothing = config.label_smoothing
        self.attack_loss: str | Loss = SmoothedCrossEntropy(smoothing) if smoothing else "ce"
        """CE for attacks; always the same object, because its identity is part of the key of a CUDA graph."""

    @property
    def passes(self) -> Passes:
        """Passes of the update that was made last, or of every update if all are alike."""
        return Passes()

    @property
    def variant(self) -> Hashable:
        """What `craft`, `loss` and `after_update` depend on besides `state_dict`; each variant has a CUDA graph."""
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
        """Return the mean loss of the batch, a scalar with a gradient; it must call `model(adv)`."""
        return self.cross_entropy(model(adv), y)

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy of the update."""
        return F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)

    def after_update(self) -> None:
        """Use the gradients of the update, if the objective needs them; changes only tensors, in place."""

    def count_update(self) -> None:
        """Called after each update, also after a replayed one, in which no other method is called."""

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


def state_of(objective: TrainingObjective) -> dict[str, Tensor]:
    """The state of an objective; raises TypeError unless it is a dict of tensors, which graphs and files need."""
    state = objective.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"objective.state_dict() must hold tensors, got {shortened(value)} for {shortened(name)}")
    return state


class Natural(TrainingObjective):
    """Training without attack."""
