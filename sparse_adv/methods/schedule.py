"""When the masks of a run change, how many blocks a change replaces, and which density it leaves."""

from __future__ import annotations

import math

from sparse_adv.argument_types import checks_types
from sparse_adv.config import MethodConfig


class Schedule:
    """The changes of a run's masks, counted in updates.

    Args:
        config: of the method.
        epochs: of the run.
        steps_per_epoch: updates of an epoch.

    Attributes:
        first: number of updates before the first pruning: 0 without `dense_epochs`, else at least one and less than
            all. Then gmp begins to prune; other methods prune to their density at once.
        pruned: number of updates after which there is no more pruning: `last` with gmp, else `first`.
        last: number of updates after which the masks no longer change. With gmp it is at least one, and the density is
            reached then.
        adapt_after: number of updates after which the density follows the training; None for methods without this.

    Examples:
        >>> schedule = Schedule(MethodConfig("rigl", interval=100, drop_fraction=0.5), epochs=10, steps_per_epoch=80)
        >>> schedule.last, schedule.is_due(99, 100), schedule.is_due(100, 101)
        (600, True, False)
        >>> schedule.drop_fraction(300)
        0.25
    """

    @checks_types
    def __init__(self, config: MethodConfig, epochs: int, steps_per_epoch: int) -> None:
        self.config = config.resolved()
        assert self.config.change_until is not None and self.config.drop_fraction is not None
        updates = epochs * steps_per_epoch
        dense = max(1, min(round(config.dense_epochs * steps_per_epoch), updates - 1))
        self.first = dense if config.dense_epochs else 0
        least = 1 if config.method == "gmp" else 0
        self.last = max(least, self.first, round(self.config.change_until * updates))
        self.pruned = self.last if config.method == "gmp" else self.first
        start = self.config.adapt_from
        self.adapt_after = None if start is None else round(start * updates)

    def is_due(self, before: int, now: int) -> bool:
        """Return whether the masks change after one of the updates before + 1, ..., now.

        They change after `first` updates if that is not 0, and after each multiple of the interval before `last`. With
        gmp they also change after `last` updates, which gives the density of the configuration.
        """
        if before < self.first <= now or (self.config.method == "gmp" and before < self.last <= now):
            return True
        if self.config.method == "static":
            return False
        interval = self.config.interval
        return max(before, self.first) < min(now, self.last - 1) // interval * interval

    def drop_fraction(self, step: int) -> float:
        """Return the fraction of the kept blocks that a change after this many updates replaces.

        It is drop_fraction (1 + cos(pi t)) / 2, where t goes from 0 at `first` to 1 at `last`.

        Source: Evci et al., "Rigging the lottery" (ICML 2020), section 3 (2). In the code of Chen et al. (Flying Bird)
        it ends at 0.005 instead of 0.
        """
        assert self.config.drop_fraction is not None
        return self.config.drop_fraction * (1 + math.cos(math.pi * self._progress(step))) / 2

    def adapts(self, step: int) -> bool:
        """Return whether a change after this many updates follows the training: flying-bird-plus from `adapt_from` on.

        Examples:
            >>> schedule = Schedule(MethodConfig("flying-bird-plus"), epochs=4, steps_per_epoch=10)
            >>> schedule.adapts(20), schedule.adapts(21)
            (False, True)
        """
        return self.adapt_after is not None and step > self.adapt_after

    def density(self, step: int) -> float:
        """Return the density that a pruning after this many updates leaves.

        With gmp it is d + (1 - d) (1 - t)^3 for the density d of the configuration, where t goes from 0 at `first` to 1
        at `last`; with the other methods it is d.

        Source: Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), section 3, with initial sparsity 0.
        """
        target = float(self.config.density)
        if self.config.method != "gmp":
            return target
        return target + (1 - target) * (1 - self._progress(step)) ** 3

    def _progress(self, step: int) -> float:
        """0 up to `first`, 1 from `last` on, linear in between."""
        length = self.last - self.first
        return min(1.0, max(0.0, (step - self.first) / length)) if length else 1.0
