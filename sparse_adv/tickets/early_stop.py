"""When a ticket has been found: the mask that pruning would give has stopped moving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparse_adv import masks
from sparse_adv.training import distributed
from sparse_adv.training.checkpoint import read_state, write_state

QUEUE = 5
FILE = "moving_masks.pt"


class MaskWatch:
    """Compares each epoch's mask with those of the five epochs before it.

    The distance is the share of positions that differ, `masks.distance`; the mask has settled when the largest of the
    five distances is below the threshold (You et al., "Drawing early-bird tickets", ICLR 2020, section 3.2).

    Args:
        threshold: None never stops, and looks at no mask.
        folder: where to keep the last masks, for a run that is stopped and continued.
    """

    def __init__(self, threshold: float | None, folder: Path | None) -> None:
        self.threshold, self.path = threshold, folder / FILE if folder else None
        self.distance: float | None = None
        """The largest distance at the last epoch, of as many masks as there were."""
        self._masks: dict[int, dict[str, Tensor]] = {}
        self._distances: dict[int, float] = {}
        if threshold is not None and self.path is not None and self.path.exists():
            state = read_state(self.path, torch.device("cpu"))
            self._masks, self._distances = state["masks"], state["distances"]

    def settled(self, epoch: int, prune: Callable[[], dict[str, Tensor]]) -> bool:
        """Look at an epoch's mask; one that was looked at before the run was stopped is not pruned again."""
        if self.threshold is None:
            return False
        if epoch not in self._distances:
            mask = {name: tensor.cpu() for name, tensor in prune().items()}
            self._distances[epoch] = max((masks.distance(mask, old) for old in self._masks.values()), default=1.0)
            kept = sorted([*self._masks, epoch])[-QUEUE:]
            self._masks = {number: known for number, known in (self._masks | {epoch: mask}).items() if number in kept}
            if self.path is not None and distributed.rank() == 0:
                write_state(self.path, {"masks": self._masks, "distances": self._distances})
        self.distance = self._distances[epoch]
        return len([known for known in self._distances if known <= epoch]) > QUEUE and self.distance < self.threshold
