"""Detection of catastrophic overfitting: training with single-step attacks can lose all robustness within an epoch.

The model then stays accurate under the single-step attack that it is trained with, but loses its accuracy under
stronger attacks (Wong et al. 2020, section 5.4). After each epoch a cheap PGD attack on validation images measures the
robustness of the weights in training, even if their moving average is evaluated: the average loses its robustness
epochs later, when undoing one epoch repairs nothing. An epoch that lost the robustness is undone and repeated with PGD
(the remedy of Li et al. 2020, "Towards understanding fast adversarial training"); then the cheap objective continues.
Each further event doubles the number of epochs that are trained with PGD. Training with PGD is not watched, because it
recovers from a weak epoch by itself.

Pruning costs robustness too, and the epochs after it restore as much as the smaller network can have. So the best
accuracy is multiplied by the fraction of the weights that an epoch keeps: if a twentieth of a network is left, its
accuracy may fall to a twentieth.
"""

from __future__ import annotations

import logging
import math

from torch import Tensor, nn

from sparse_adv.attacks import Graphs
from sparse_adv.config import TrainConfig
from sparse_adv.data import Split
from sparse_adv.training.evaluation import Accuracy, Images, as_batches, robust_accuracy
from sparse_adv.training.random_numbers import seeded

IMAGES = 256
STEPS = 5
LEAST_DROP = 0.1
"""A drop counts if it is at least this much and ends below half of the best; the noise of 256 images is 0.03."""

log = logging.getLogger(__name__)


class OverfittingMonitor:
    """Measures robustness after each epoch and decides which epochs must be undone.

    Args:
        images: validation images; the first 256 are used (or whole batches, if batches are given).
        config: of the training.
        graphs: CUDA graphs of the attack to use again.

    Attributes:
        best: the highest accuracy of an epoch that was not undone, reduced by each later pruning in proportion to the
            weights left.
        density: of the network's weights after the last epoch that was not undone.
        events: number of epochs that were undone.
        pgd_epochs: number of next epochs to train with PGD.

    Examples:
        >>> monitor = OverfittingMonitor([], TrainConfig("fgsm-rs"))
        >>> [monitor.must_undo(accuracy) for accuracy in (0.3, 0.4, 0.05)]
        [False, False, True]
        >>> monitor.pgd_epochs
        1
    """

    def __init__(self, images: Images, config: TrainConfig, graphs: Graphs | None = None) -> None:
        self.config, self.graphs = config, graphs
        self.images = _first(images, IMAGES)
        self.best, self.density, self.events, self.pgd_epochs, self.warned = 0.0, 1.0, 0, 0, False

    def measure(self, model: nn.Module) -> Accuracy:
        """Return the accuracy under PGD-5 with step size eps / 4."""
        config = self.config
        return robust_accuracy(
            model,
            self.images,
            eps=config.eps,
            norm=config.norm,
            steps=STEPS,
            seed=config.seed,
            graphs=self.graphs,
            engine=config.engine,
        )

    def must_undo(self, accuracy: float, density: float = 1.0) -> bool:
        """Return whether the epoch with this accuracy lost its robustness; call it once for each epoch.

        An epoch that was trained with PGD is never undone; PGD goes on until the robustness is back.

        Args:
            accuracy: after the epoch, as `measure` returns it.
            density: of the network's weights after the epoch.
        """
        best = self.best * (density / self.density if density < self.density else 1)
        resists = math.isfinite(accuracy) and (accuracy >= best / 2 or accuracy > best - LEAST_DROP)
        if not resists and not self.pgd_epochs:
            self.events += 1
            self.pgd_epochs = 2 ** (self.events - 1)
            return True
        self.density, self.best = density, max(best, accuracy) if resists else best
        if resists:
            self.pgd_epochs = max(0, self.pgd_epochs - 1)
        else:
            log.warning(
                "accuracy under PGD-%d is %.1f %% after an epoch of PGD, and was %.1f %%: training goes on with PGD",
                STEPS,
                100 * accuracy,
                100 * best,
            )
        return False

    def warn_of_weak_attack(self, accuracy: float, train_accuracy: float) -> None:
        """Log once that the network resists the attack that it is trained with, but not PGD.

        If that is so from the beginning, as with a large eps, no epoch loses robustness, so none is undone.

        Args:
            accuracy: of an epoch that was not undone, as `measure` returns it.
            train_accuracy: on the images that the epoch trained with.
        """
        if not self.warned and train_accuracy - accuracy >= 2 * LEAST_DROP and accuracy < train_accuracy / 4:
            self.warned = True
            log.warning(
                "%.1f %% of the images that %s crafts in training are classified correctly, and %.1f %% of the "
                "validation images under PGD-%d: this attack may be too weak for eps %g, or the images too few",
                100 * train_accuracy,
                self.config.objective,
                100 * accuracy,
                STEPS,
                self.config.eps,
            )

    def state_dict(self) -> dict[str, float]:
        """Return the state that a continued run needs."""
        names = "best", "density", "events", "pgd_epochs"
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from this state."""
        self.best, self.events, self.pgd_epochs = state["best"], int(state["events"]), int(state["pgd_epochs"])
        self.density = state["density"]


def _first(images: Images, count: int) -> list[tuple[Tensor, Tensor]]:
    """The first batches, with at least `count` images if there are that many; of a Split, exactly that many."""
    if isinstance(images, Split):
        images = Split(images.images[:count], images.labels[:count])
    batches: list[tuple[Tensor, Tensor]] = []
    total = 0
    with seeded(0):  # the same images in a continued run
        for x, y in as_batches(images, count):
            batches.append((x, y))
            total += len(y)
            if total >= count:
                break
    return batches
