"""How Flying Bird+ lets the density follow the training: by the generalisation gap and the validation loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from sparse_adv.runs import EpochRecord

WINDOW = 4
"""Number of differences between successive evaluated epochs that are considered."""
LEAST_SHARE = 0.5
"""Fraction of the differences that must be positive."""
MORE_DROPPED, MORE_GROWN = 0.4, 0.05
"""Additional blocks that are then dropped or grown, as a fraction of those that Flying Bird drops and grows."""


class Adaptation:
    """Decides at each change of the masks whether to drop or to grow more blocks.

    The gap is the accuracy on the adversarial images of the updates minus the robust validation accuracy; the loss is
    the loss on the validation images under attack. Each is compared with its value at the evaluation before. If at
    least half of the last four differences of the gap are positive, 0.4 times as many blocks are dropped in addition.
    If at least half of those of the loss are positive, 0.05 times as many are grown in addition. Both can apply. With
    fewer than four differences, those so far count; without any, nothing changes.

    Attributes:
        gaps, losses: the values of the last five evaluated epochs.

    Source: Chen et al., "Sparsity winning twice" (ICLR 2022), section 3 (Flying Bird+), with the numbers of its code.
    That code also counts an unchanged loss as rising; here only a larger one counts.

    Examples:
        >>> adaptation = Adaptation()
        >>> adaptation.gaps, adaptation.losses = [0.1, 0.2, 0.3], [1.0, 0.9, 0.8]
        >>> adaptation.more_dropped, adaptation.more_grown
        (0.4, 0.0)
    """

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.losses: list[float] = []

    def observe(self, record: EpochRecord) -> None:
        """Note the values of an epoch; an epoch without evaluation changes nothing."""
        if record.train_accuracy is None or record.robust_accuracy is None or record.robust_loss is None:
            return
        self.gaps = [*self.gaps, record.train_accuracy - record.robust_accuracy][-WINDOW - 1 :]
        self.losses = [*self.losses, record.robust_loss][-WINDOW - 1 :]

    @property
    def more_dropped(self) -> float:
        """Number of additional blocks to drop, as a fraction of those that Flying Bird drops."""
        return MORE_DROPPED if _rises(self.gaps) else 0.0

    @property
    def more_grown(self) -> float:
        """Number of additional blocks to grow, as a fraction of those that Flying Bird grows."""
        return MORE_GROWN if _rises(self.losses) else 0.0

    def state_dict(self) -> dict[str, list[float]]:
        """Return the state that a continued run needs."""
        return {"gaps": self.gaps, "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from this state."""
        self.gaps, self.losses = list(state["gaps"]), list(state["losses"])


def _rises(values: Sequence[float]) -> bool:
    changes = [after > before for before, after in pairwise(values)]
    return bool(changes) and sum(changes) >= LEAST_SHARE * len(changes)
