"""Hyperparameters of ticket search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from sparse_adv.config.checks import is_number, make_plain, require_integer

Scope = Literal["global", "uniform", "erk", "igq"]


@dataclass(frozen=True)
class PruneConfig:
    """Hyperparameters of the ticket search: how the trained dense network is pruned. The defaults are the paper's.

    `density`, `block`, `scope`, `score` and `linear` are arguments of `masks.prune`, which validates them.

    Args:
        density: fraction of the weights that the ticket keeps, in [0, 1].
        block: shape of the blocks of weights that are kept or pruned together, BO,BI or BO,BI,BR,BS (output channels,
            input channels, filter rows, filter columns).
        scope: how the kept weights are distributed over layers: global (one ranking), uniform (the same density in
            each layer), erk (Erdos-Renyi-kernel) or igq (ideal gas quotas); `masks.prune` has the formulas.
        score: importance of a weight: magnitude, or relative_magnitude (divided by the mean magnitude of its layer);
            in Python also a function (module name, weight) -> scores.
        linear: prune the weights of linear layers too, not only those of convolutions.
        rounds: rounds of training, pruning and rewinding, at least 1; round i of n prunes to density^(i/n), and 1 is
            one-shot pruning.
        rewind_step: update of the first round to whose weights the ticket is rewound, at least 0; 0 for the initial
            weights.
        keep_weights: do not rewind: the ticket holds the weights that the last round trained, and the statistics of
            BatchNorm. Each further round continues from the weights of the one before, with a new optimiser and the
            learning rate schedule from its start. With objective natural or fgsm-rs, score magnitude and an
            early_stop_distance of 0.08 this is Robust Bird.
        permute_channels: before the first pruning, permute channels so that whole blocks contain more of the scores;
            the function of the network stays the same. Meant for large blocks such as 64,64.
        early_stop_distance: end the training of a round when its mask differed from the masks of the five epochs
            before in less than this fraction of positions, in [0, 1] (Early-Bird tickets use 0.1); null to train all
            epochs.
        half_resolution: search with images averaged over squares of 2 x 2 pixels, which takes about a quarter of the
            MACs. The network must take images of any size, as those with global pooling do; the ticket is for images
            of full size.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.

    Source: Frankle and Carbin 2019 (iterative magnitude pruning), Frankle et al. 2020 (rewinding), You et al. 2020
    (Early-Bird tickets), Chen et al. 2022 (Robust Bird).

    Examples:
        >>> PruneConfig(density=0.04, rounds=2).density_of_round(1)
        0.2
    """

    density: float = 0.2
    block: tuple[int, ...] = (1, 1)
    scope: Scope = "global"
    score: str | Callable[[str, Tensor], Tensor] = "relative_magnitude"
    linear: bool = True
    rounds: int = 1
    rewind_step: int = 0
    keep_weights: bool = False
    permute_channels: bool = False
    early_stop_distance: float | None = None
    half_resolution: bool = False

    def __post_init__(self) -> None:
        make_plain(self)
        require_integer("rounds", self.rounds, least=1)
        require_integer("rewind_step", self.rewind_step, least=0)
        if self.keep_weights and self.rewind_step:
            raise ValueError(f"rewind_step must be 0 with keep_weights, which does not rewind, got {self.rewind_step}")
        distance = self.early_stop_distance
        if distance is not None and not (is_number(distance) and 0 <= distance <= 1):
            raise ValueError(f"early_stop_distance must be in [0, 1], got {distance!r}")

    def density_of_round(self, number: int) -> float:
        """Return the density after a round, counted from 1: density^(number / rounds)."""
        return self.density ** (number / self.rounds)

    def named(self) -> PruneConfig:
        """Return a copy that can be written to a file: a score that is a function is replaced by its name."""
        name = self.score if isinstance(self.score, str) else getattr(self.score, "__name__", repr(self.score))
        return replace(self, score=name)
