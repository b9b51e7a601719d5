"""Hyperparameters of ticket search and of dynamic sparse training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.config.checks import is_number, make_plain, require_density, require_number, require_one_of

Scope = Literal["global", "uniform", "erk", "igq"]
Method = Literal["none", "static", "flying-bird", "flying-bird-plus", "rigl", "set", "gmp"]
Growth = Literal["gradient", "random"]

METHODS: tuple[str, ...] = get_args(Method)

_SINGLE_WEIGHTS = "with blocks of one weight"


@dataclass(frozen=True)
class PruneConfig:
    """Hyperparameters of the ticket search: how the trained dense network is pruned. The defaults are the paper's.

    `density`, `block`, `scope`, `score` and `linear` are arguments of `masks.prune`, which validates the last four; its
    own defaults are density 0.1, score "magnitude" and linear=False.

    Args:
        density: fraction of the weights that the ticket keeps, in (0, 1].
        block: shape of the blocks of weights that are kept or pruned together, BO,BI or BO,BI,BR,BS (output channels,
            input channels, filter rows, filter columns).
        scope: how the kept weights are distributed over layers: global (one ranking), uniform (the same density in
            each layer), erk (Erdos-Renyi-kernel) or igq (ideal gas quotas); `masks.prune` has the formulas.
        score: importance of a weight: magnitude, or relative_magnitude (divided by the mean magnitude of its layer);
            in Python also a function (module name, weight) -> scores, at least 0. No round keeps a weight that an
            earlier one pruned, whatever its score.
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
            before in less than this fraction of positions (Early-Bird tickets use 0.1); null to train all epochs. It
            must be below 2 min(d, 1 - d) for the density d of each round, which no two masks exceed, and needs more
            than 6 epochs.
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
        require_density(self.density)
        check_count("rounds", self.rounds, least=1)
        check_count("rewind_step", self.rewind_step, least=0)
        if self.keep_weights and self.rewind_step:
            raise ValueError(f"rewind_step must be 0 with keep_weights, which does not rewind, got {self.rewind_step}")
        distance = self.early_stop_distance
        if distance is not None and not (is_number(distance) and 0 <= distance <= 1):
            raise ValueError(f"early_stop_distance must be in [0, 1], got {distance!r}")

    def without_effect(self) -> dict[str, str]:
        """Return the fields that the others leave without effect, with the reason.

        Examples:
            >>> PruneConfig(block=(1, 1)).without_effect()
            {'permute_channels': 'with blocks of one weight'}
        """
        return {"permute_channels": _SINGLE_WEIGHTS} if set(self.block) == {1} else {}

    def density_of_round(self, number: int) -> float:
        """Return the density after a round, counted from 1: density^(number / rounds)."""
        return self.density ** (number / self.rounds)

    def named(self) -> PruneConfig:
        """Return a copy that can be written to a file: a score that is a function is replaced by its name."""
        name = self.score if isinstance(self.score, str) else getattr(self.score, "__name__", repr(self.score))
        return replace(self, score=name)


@dataclass(frozen=True)
class MethodConfig:
    """Hyperparameters of training that is sparse from the first step, or becomes sparse in its course.

    A field that the method does not use is ignored. The command line refuses a flag that has no effect;
    `without_effect` names them.

    `density`, `block`, `scope` and `linear` are arguments of `masks.prune`, which validates the last three.

    Args:
        method: how masks arise: none (no masks but those of a ticket), static (random, and never changed), flying-bird,
            rigl and set (random; blocks are dropped and grown), flying-bird-plus (as flying-bird, but the density
            follows the training), or gmp (all weights at first, then fewer and fewer).
        density: fraction of the weights that are kept, in (0, 1]; gmp reaches it at its last change, flying-bird-plus
            starts with it.
        block: shape of the blocks of weights that are kept or pruned together, BO,BI or BO,BI,BR,BS (output channels,
            input channels, filter rows, filter columns).
        scope: how the kept weights are distributed over layers: global (one ranking), uniform (the same density in
            each layer), erk (Erdos-Renyi-kernel) or igq (ideal gas quotas); null for that of the method: igq for
            flying-bird and flying-bird-plus, uniform for gmp, erk for the others.
        linear: whether linear layers get masks too, not only convolutions.
        interval: updates from one change of the masks to the next, at least 1.
        drop_fraction: fraction of the kept blocks, in [0, 1], that the first change drops and replaces; null for 0.5
            with flying-bird and flying-bird-plus, and 0.3 with rigl and set. It falls to 0 at the last change, along a
            half cosine.
        change_until: fraction of the updates, in [0, 1], after which the masks stay; null for 0.75 with rigl and gmp
            and 1 with the others.
        adapt_from: fraction of the updates, in [0, 1], after which the density of flying-bird-plus follows the
            training; null for 0.5, epoch 100 of 200 in the authors' code. No other method has it.
        growth: which blocks are grown: those of the largest gradient, or random ones; null for random with set
            and gradient with the others.
        dense_epochs: number of first epochs that are trained without masks, less than all, fractions allowed; then the
            weights of largest magnitude are kept. gmp begins to prune there.
        permute_channels: before the first pruning of dense weights, which gmp and `dense_epochs` have, permute channels
            so that whole blocks contain more of the weights; the function of the network stays the same. Meant for
            large blocks such as 64,64.
        rescale_init: multiply the initial weights of each output channel by the root of (its weights / its kept
            weights), so that outputs have the variance that they have without masks.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.

    Source: Chen et al. 2022 (Flying Bird, Flying Bird+), Evci et al. 2020 (RigL), Mocanu et al. 2018 (SET), Zhu and
    Gupta 2017 (gradual magnitude pruning), Evci et al. 2022, section 3.1 (rescaled initial weights).

    Examples:
        >>> config = MethodConfig("rigl", density=0.1, block=(4, 4))
        >>> config.scope, config.resolved().scope
        (None, 'erk')
    """

    method: Method = "none"
    density: float = 0.1
    block: tuple[int, ...] = (1, 1)
    scope: Scope | None = None
    linear: bool = True
    interval: int = 100
    drop_fraction: float | None = None
    change_until: float | None = None
    adapt_from: float | None = None
    growth: Growth | None = None
    dense_epochs: float = 0.0
    permute_channels: bool = False
    rescale_init: bool = False

    def __post_init__(self) -> None:
        make_plain(self)
        require_one_of("method", self.method, METHODS)
        check_count("interval", self.interval, least=1)
        require_number("dense_epochs", self.dense_epochs)
        require_density(self.density)
        for name in ("drop_fraction", "change_until", "adapt_from"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        if self.adapt_from is not None and self.method not in ("none", "flying-bird-plus"):
            raise ValueError(f"adapt_from is a setting of method 'flying-bird-plus', got method {self.method!r}")
        if self.permute_channels and self.method not in ("none", "gmp") and not self.dense_epochs:
            raise ValueError(
                "permute_channels needs weights before they are pruned, as gmp or dense_epochs have them, got method "
                f"{self.method!r}"
            )
        if self.scope is not None:
            require_one_of("scope", self.scope, get_args(Scope))
        if self.growth is not None:
            require_one_of("growth", self.growth, get_args(Growth))

    def without_effect(self) -> dict[str, str]:
        """Return the fields that the others leave without effect, with the reason.

        Examples:
            >>> sorted(MethodConfig("gmp").without_effect())
            ['drop_fraction', 'growth', 'permute_channels', 'rescale_init']
        """
        unused = dict.fromkeys(_WITHOUT_EFFECT.get(self.method, ()), f"with method {self.method!r}")
        if set(self.block) == {1}:
            unused["permute_channels"] = _SINGLE_WEIGHTS
        if self.dense_epochs:
            unused["rescale_init"] = "with dense_epochs, which train the initial weights without masks"
        return unused

    def resolved(self) -> MethodConfig:
        """Return a copy in which the method's own values replace None."""
        own: dict[str, Any] = {"scope": "erk", "drop_fraction": 0.3, "change_until": 1.0, "growth": "gradient"}
        own |= _OF_METHOD.get(self.method, {})
        return replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})


_OF_METHOD: dict[str, dict[str, Any]] = {
    "flying-bird": {"scope": "igq", "drop_fraction": 0.5},
    "flying-bird-plus": {"scope": "igq", "drop_fraction": 0.5, "adapt_from": 0.5},
    "rigl": {"change_until": 0.75},
    "set": {"growth": "random"},
    "gmp": {"scope": "uniform", "change_until": 0.75},
}
"""Values of the methods, from their papers and code, that differ from those of `MethodConfig.resolved`."""
_WITHOUT_EFFECT = {
    "static": ("interval", "drop_fraction", "change_until", "growth"),
    "gmp": ("drop_fraction", "growth", "rescale_init"),
}
"""Fields that a method does not use: static masks never change, gmp only drops blocks, and begins with all weights."""
