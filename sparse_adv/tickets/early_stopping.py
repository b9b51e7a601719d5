"""Early stopping of a ticket search, once the mask from pruning no longer changes (Early-Bird tickets)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparse_adv import masks
from sparse_adv.config import PruneConfig
from sparse_adv.training import distributed
from sparse_adv.training.checkpoint import read_state, write_state

EPOCHS = 5
FILE = "early_stopping.pt"


def check_threshold(config: PruneConfig, epochs: int) -> None:
    """Check that two masks of a search can differ by more than the threshold, and that stopping can save an epoch.

    Two masks of density d differ in at most a fraction 2 min(d, 1 - d) of positions. So with a threshold of that size
    each round would end after its sixth epoch, whatever its masks are.

    Args:
        config: of the pruning; a threshold of 0 is never reached, so it only records distances.
        epochs: of each round.

    Raises:
        ValueError: if the threshold is too large for the density of a round, or the epochs are too few.

    Examples:
        >>> check_threshold(PruneConfig(density=0.04, early_stop_distance=0.1), epochs=20)
        Traceback (most recent call last):
        ...
        ValueError: early_stop_distance must be below 0.08, which no two masks of density 0.04 exceed, got 0.1
    """
    threshold = config.early_stop_distance
    if not threshold:
        return
    for number in range(1, config.rounds + 1):
        density = config.density_of_round(number)
        bound = 2 * min(density, 1 - density)
        if threshold >= bound or math.isclose(threshold, bound):
            raise ValueError(
                f"early_stop_distance must be below {bound:.3g}, which no two masks of density {density:.3g} exceed, "
                f"got {threshold!r}"
            )
    if epochs <= EPOCHS + 1:
        raise ValueError(
            f"epochs must be more than {EPOCHS + 1}, after which early_stop_distance {threshold!r} ends a training at "
            f"the earliest, got {epochs}"
        )


class EarlyStopping:
    """Compares the mask of each epoch with the masks of the five epochs before.

    Training can stop when the largest of the five distances (`masks.distance`, the fraction of positions that differ)
    is below the threshold.

    Args:
        threshold: in [0, 1]; None never stops, and computes no masks.
        folder: where to write the last masks, so that a stopped run can continue; None to write nothing.

    Attributes:
        distance: the largest distance at the last epoch; 1 at the first epoch, None without threshold.

    Source: You et al., "Drawing early-bird tickets" (ICLR 2020), section 3.2.

    Examples:
        >>> stopping, mask = EarlyStopping(0.1, None), {"layer": torch.tensor([True, False])}
        >>> [stopping.should_stop(epoch, lambda: mask) for epoch in range(1, 8)]
        [False, False, False, False, False, True, True]
    """

    def __init__(self, threshold: float | None, folder: Path | None) -> None:
        self.threshold, self.path = threshold, folder / FILE if folder else None
        self.distance: float | None = None
        self._masks: dict[int, dict[str, Tensor]] = {}
        self._distances: dict[int, float] = {}
        if threshold is not None and self.path is not None and self.path.exists():
            state = read_state(self.path, torch.device("cpu"), ["masks", "distances"])
            self._masks, self._distances = state["masks"], state["distances"]

    def should_stop(self, epoch: int, prune: Callable[[], dict[str, Tensor]]) -> bool:
        """Return whether training can stop after this epoch.

        Args:
            epoch: its number.
            prune: computes the mask; not called for an epoch that was compared before the run was stopped.
        """
        if self.threshold is None:
            return False
        if epoch not in self._distances:
            mask = {name: tensor.cpu() for name, tensor in prune().items()}
            self._distances[epoch] = max((masks.distance(mask, old) for old in self._masks.values()), default=1.0)
            last = sorted([*self._masks, epoch])[-EPOCHS:]
            self._masks = {number: known for number, known in (self._masks | {epoch: mask}).items() if number in last}
            if self.path is not None and distributed.rank() == 0:
                write_state(self.path, {"masks": self._masks, "distances": self._distances})
        self.distance = self._distances[epoch]
        compared = sum(number <= epoch for number in self._distances)
        return compared > EPOCHS and self.distance < self.threshold
