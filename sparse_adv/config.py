"""Hyperparameters of a run: plain dataclasses, validated when they are created.

The texts under `Args:` are also the help texts of the command line, which has a flag for every field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Objective = Literal[
    "natural", "fgsm", "fgsm-rs", "n-fgsm", "fgsm-rs-cs", "fgsm-uap", "nu-at", "pgd", "free", "trades", "mart"
]
Schedule = Literal["piecewise", "cosine", "cyclic", "onecycle", "constant"]
Norm = Literal["linf", "l2"]
Precision = Literal["float32", "bfloat16", "float16"]
Scope = Literal["global", "uniform", "erk", "igq"]
Method = Literal["none", "static", "flying-bird", "rigl", "set", "gmp"]
Growth = Literal["gradient", "random"]

OBJECTIVES: tuple[str, ...] = get_args(Objective)
SCHEDULES: tuple[str, ...] = get_args(Schedule)
NORMS: tuple[str, ...] = get_args(Norm)
PRECISIONS: tuple[str, ...] = get_args(Precision)
METHODS: tuple[str, ...] = get_args(Method)

_ALPHA_OVER_EPS = {"fgsm-rs": 1.25, "pgd": 0.25, "trades": 0.25, "mart": 0.25}
"""Default step size as a multiple of eps, from the paper of each objective; 1 for those that are not here."""
_BETA = {"fgsm-rs-cs": 1.0, "fgsm-uap": 10.0, "nu-at": 4.0, "trades": 6.0, "mart": 5.0}
"""Default weight of the second term of a loss, from the paper of each objective or the FastAT Benchmark."""


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of adversarial training with SGD, of its evaluations and of its overfitting monitor.

    Args:
        objective: training loss; `training.objectives` has the formula and the paper of each.
        epochs: passes over the training images, at least 1.
        lr: learning rate of SGD before schedule and warm-up, at least 0.
        momentum: momentum of SGD, at least 0. The schedule onecycle moves it from 0.05 more to 0.05 less and
            back; it needs a value in [0.05, 0.95).
        weight_decay: L2 penalty of SGD on all parameters, at least 0.
        schedule: learning rate schedule, applied at every update: piecewise (times 0.1 at each milestone), cosine
            (from lr to 0), cyclic (linear from 0 to lr in the first half of the epochs, back to 0 in the second),
            onecycle (cosine from lr / 25 to lr in the first 3/10 of the updates, then to lr / 250,000) or constant.
        milestones: fractions of the epochs, in [0, 1], after which the piecewise schedule multiplies the learning
            rate by 0.1.
        warmup_epochs: number of first epochs, fractions allowed, in which the learning rate rises linearly; 0 for no
            warm-up.
        warmup_start_lr: learning rate at which the warm-up starts, at least 0.
        eps: radius of the perturbation ball in training and evaluation; images lie in [0, 1], so 8/255 is usual for
            linf.
        norm: norm of the perturbation ball.
        alpha: step size of the attack in image units; null for the default of the objective, which is 1.25 eps for
            fgsm-rs, eps / 4 for pgd, trades and mart, and eps for the others.
        steps: attack steps of the objectives pgd, trades and mart, at least 1.
        beta: weight of the second term of the loss, at least 0; null for the default of the objective, which is 1 for
            fgsm-rs-cs, 10 for fgsm-uap, 4 for nu-at, 6 for trades and 5 for mart. The others have one term only.
        label_smoothing: part of the label's probability, in [0, 1), that cross-entropy losses give to all classes
            evenly (fgsm-rs-cs: to the other classes); single-step attacks raise the loss with these labels too.
        awp_gamma: size of the adversarial perturbation of the weights that the gradient is formed at, relative to the
            norm of each weight tensor, at least 0; 0 for none. 0.01 is usual for pgd, 0.005 for trades and mart.
        replays: updates that the objective free makes on each batch, at least 1; it is usual to divide the epochs by
            this number.
        max_grad_norm: gradients of an update are scaled down to this L2 norm; 0 for no clipping.
        ema_decay: decay per update, in [0, 1), of an exponential moving average of the weights and the BatchNorm
            statistics, which is evaluated and saved instead of them; after t updates the decay is at most t / (t + 9),
            because an average that starts slowly would still consist of the first weights when a short run ends; 0
            for no average.
        precision: float32, or the dtype of automatic mixed precision, bfloat16 or float16; float16 scales the loss.
        evaluate_every: epochs from one evaluation on the validation images to the next, at least 1; the last epoch is
            always evaluated.
        evaluation_steps: steps of the PGD attack in evaluations, at least 1; their size is eps / 4.
        overfitting_monitor: detect catastrophic overfitting with a PGD-5 attack on 256 validation images after each
            epoch, undo that epoch and repeat it with PGD training.
        engine: let `sparse_adv.engine` form the gradients of attacks where it can; false leaves all to autograd.
        seed: seed of the random starts of attacks, of the order of images and of the network's own random numbers
            (dropout), at least 0.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.

    Examples:
        >>> config = TrainConfig(objective="fgsm-rs", epochs=4, schedule="cosine")
        >>> config.learning_rate(step=100, steps_per_epoch=50)  # after two of four epochs
        0.05
        >>> round(255 * config.step_size, 6)  # 1.25 eps
        10.0
    """

    objective: Objective = "pgd"
    epochs: int = 30
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "piecewise"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup_epochs: float = 0.0
    warmup_start_lr: float = 0.0
    eps: float = 8 / 255
    norm: Norm = "linf"
    alpha: float | None = None
    steps: int = 10
    beta: float | None = None
    label_smoothing: float = 0.0
    awp_gamma: float = 0.0
    replays: int = 8
    max_grad_norm: float = 0.0
    ema_decay: float = 0.0
    precision: Precision = "float32"
    evaluate_every: int = 1
    evaluation_steps: int = 10
    overfitting_monitor: bool = True
    engine: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        _require_one_of("objective", self.objective, OBJECTIVES)
        _require_one_of("schedule", self.schedule, SCHEDULES)
        _require_one_of("norm", self.norm, NORMS)
        _require_one_of("precision", self.precision, PRECISIONS)
        for name in ("epochs", "steps", "replays", "evaluate_every", "evaluation_steps"):
            _require_integer(name, getattr(self, name), least=1)
        _require_integer("seed", self.seed, least=0)
        for name in ("lr", "momentum", "weight_decay", "warmup_epochs", "warmup_start_lr", "eps"):
            _require_number(name, getattr(self, name))
        for name in ("max_grad_norm", "awp_gamma"):
            _require_number(name, getattr(self, name))
        for name in ("alpha", "beta"):
            if getattr(self, name) is not None:
                _require_number(name, getattr(self, name))
        for name in ("ema_decay", "label_smoothing"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")
        if not isinstance(self.milestones, tuple) or not all(_is_number(m) and 0 <= m <= 1 for m in self.milestones):
            raise ValueError(f"milestones must be fractions of the epochs in [0, 1], got {self.milestones}")
        if self.schedule == "onecycle" and not 0.05 <= self.momentum < 0.95:
            raise ValueError(f"momentum must be in [0.05, 0.95) for schedule 'onecycle', got {self.momentum!r}")
        if self.awp_gamma and self.objective == "natural":
            raise ValueError(f"awp_gamma must be 0 for objective 'natural', which has no attack, got {self.awp_gamma}")

    @property
    def step_size(self) -> float:
        """Step size of the training attack in image units: `alpha`, or the default of the objective."""
        return _ALPHA_OVER_EPS.get(self.objective, 1.0) * self.eps if self.alpha is None else self.alpha

    @property
    def second_weight(self) -> float:
        """Weight of the second term of the loss: `beta`, or the default of the objective."""
        return _BETA.get(self.objective, 0.0) if self.beta is None else self.beta

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of an update.

        With t = step / steps_per_epoch epochs done of E: "piecewise" is lr / 10^(number of milestones m with t >= m E);
        "cosine" is lr (1 + cos(pi t / E)) / 2 (Loshchilov and Hutter 2017, equation 5); "cyclic" is
        lr (1 - |1 - 2 t / E|) (Wong et al. 2020, section 5), shifted by half an update so that no update has rate 0;
        "onecycle" is that of PyTorch's OneCycleLR with its defaults and max_lr = lr (Smith and Topin 2019).
        A warm-up replaces lr by warmup_start_lr + (lr - warmup_start_lr) t / warmup_epochs in the same formula, so
        that milestones inside the warm-up take effect.

        Args:
            step: updates made before this one.
            steps_per_epoch: updates of an epoch.
        """
        progress = step / (steps_per_epoch * self.epochs)
        if self.schedule == "piecewise":
            factor = 0.1 ** sum(progress >= milestone for milestone in self.milestones)
        elif self.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        elif self.schedule == "cyclic":
            factor = 1 - abs(1 - 2 * (step + 1) / (self.epochs * steps_per_epoch + 1))
        elif self.schedule == "onecycle":
            factor = _one_cycle(step, steps_per_epoch * self.epochs, 1 / 25, 1.0, 1 / 25 / 1e4)
        else:
            factor = 1.0
        warmup = min(1.0, (step + 1) / (self.warmup_epochs * steps_per_epoch)) if self.warmup_epochs else 1.0
        return factor * (self.warmup_start_lr + (self.lr - self.warmup_start_lr) * warmup)

    def momentum_of(self, step: int, steps_per_epoch: int) -> float:
        """Return the momentum of an update: `momentum`, but for the schedule onecycle.

        There it moves against the learning rate, as that of PyTorch's OneCycleLR: from momentum + 0.05 to
        momentum - 0.05 and back.

        Args:
            step, steps_per_epoch: as in `learning_rate`.
        """
        if self.schedule != "onecycle":
            return self.momentum
        high, low = self.momentum + 0.05, self.momentum - 0.05
        return _one_cycle(step, steps_per_epoch * self.epochs, high, low, high)


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
        permute_channels: before the first pruning, permute channels so that whole blocks contain more of the scores;
            the function of the network stays the same. Meant for large blocks such as 64,64.
        early_stop_distance: end the training of a round when its mask differed from the masks of the five epochs
            before in less than this fraction of positions, in [0, 1] (Early-Bird tickets use 0.1); null to train all
            epochs.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.

    Source: Frankle and Carbin 2019 (iterative magnitude pruning), Frankle et al. 2020 (rewinding), You et al. 2020
    (Early-Bird tickets).

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
    permute_channels: bool = False
    early_stop_distance: float | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        _require_integer("rounds", self.rounds, least=1)
        _require_integer("rewind_step", self.rewind_step, least=0)
        distance = self.early_stop_distance
        if distance is not None and not (_is_number(distance) and 0 <= distance <= 1):
            raise ValueError(f"early_stop_distance must be in [0, 1], got {distance!r}")

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

    `density`, `block`, `scope` and `linear` are arguments of `masks.prune`, which validates them.

    Args:
        method: how masks arise: none (no masks but those of a ticket), static (random, and never changed), flying-bird,
            rigl and set (random; blocks are dropped and grown), or gmp (all weights at first, then fewer and fewer).
        density: fraction of the weights that are kept; gmp reaches it at its last change.
        block: shape of the blocks of weights that are kept or pruned together, BO,BI or BO,BI,BR,BS (output channels,
            input channels, filter rows, filter columns).
        scope: how the kept weights are distributed over layers: global (one ranking), uniform (the same density in
            each layer), erk (Erdos-Renyi-kernel) or igq (ideal gas quotas); null for that of the method: igq for
            flying-bird, uniform for gmp, erk for the others.
        linear: whether linear layers get masks too, not only convolutions.
        interval: updates from one change of the masks to the next, at least 1.
        drop_fraction: fraction of the kept blocks, in [0, 1], that the first change drops and replaces; null for 0.5
            with flying-bird and 0.3 with rigl and set. It falls to 0 at the last change, along a half cosine.
        change_until: fraction of the updates, in [0, 1], after which the masks stay; null for 0.75 with rigl and gmp
            and 1 with flying-bird and set.
        growth: which blocks are grown: those of the largest gradient, or random ones; null for random with set
            and gradient with the others.
        dense_epochs: number of first epochs that are trained without masks, fractions allowed; then the weights of
            largest magnitude are kept. gmp begins to prune there.
        rescale_init: multiply the initial weights of each output channel by the root of (its weights / its kept
            weights), so that outputs have the variance that they have without masks.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.

    Source: Chen et al. 2022 (Flying Bird), Evci et al. 2020 (RigL), Mocanu et al. 2018 (SET), Zhu and Gupta 2017
    (gradual magnitude pruning), Evci et al. 2022, section 3.1 (rescaled initial weights).

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
    growth: Growth | None = None
    dense_epochs: float = 0.0
    rescale_init: bool = False

    def __post_init__(self) -> None:
        make_plain(self)
        _require_one_of("method", self.method, METHODS)
        _require_integer("interval", self.interval, least=1)
        _require_number("dense_epochs", self.dense_epochs)
        for name in ("density", "drop_fraction", "change_until"):
            value = getattr(self, name)
            if not (value is None and name != "density") and not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        if self.scope is not None:
            _require_one_of("scope", self.scope, get_args(Scope))
        if self.growth is not None:
            _require_one_of("growth", self.growth, get_args(Growth))

    def resolved(self) -> MethodConfig:
        """Return a copy in which the method's own values replace None."""
        own: dict[str, Any] = {"scope": "erk", "drop_fraction": 0.3, "change_until": 1.0, "growth": "gradient"}
        own |= _OF_METHOD.get(self.method, {})
        return replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})


_OF_METHOD: dict[str, dict[str, Any]] = {
    "flying-bird": {"scope": "igq", "drop_fraction": 0.5},
    "rigl": {"change_until": 0.75},
    "set": {"growth": "random"},
    "gmp": {"scope": "uniform", "change_until": 0.75},
}
"""Values of the methods, from their papers and code, that differ from those of `MethodConfig.resolved`."""


@dataclass(frozen=True)
class DataConfig:
    """The images of a run and their division into batches.

    Args:
        data: "digits" (scikit-learn's), or path of a folder or archive of images.
        limit: number of training images to use, the first ones; null for all.
        validation: part of the training images to hold out for validation: a fraction below 1, or a number of images;
            null for the default of the data set.
        batch_size: images per update, summed over all processes, at least 1.
        augment: random crop and horizontal flip; null for yes with 32 x 32 colour images, else no.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.
    """

    data: str = "digits"
    limit: int | None = None
    validation: float | None = None
    batch_size: int = 128
    augment: bool | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if self.limit is not None:
            _require_integer("limit", self.limit, least=1)
        if self.validation is not None:
            _require_number("validation", self.validation)
        _require_integer("batch_size", self.batch_size, least=1)


@dataclass(frozen=True)
class NetworkConfig:
    """The architecture of a run's network.

    Args:
        arch: name of an architecture of `sparse_adv.models`.
        width: channels of the first stage, at least 1; null for the published number.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.
    """

    arch: str
    width: int | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if self.width is not None:
            _require_integer("width", self.width, least=1)


def make_plain(record: DataclassInstance) -> None:
    """Replace scalars of NumPy and PyTorch in the fields of a dataclass by Python's numbers, and lists by tuples.

    Only these can be written to JSON and read with `torch.load(weights_only=True)`, and compared with what was read.

    Examples:
        >>> import numpy as np
        >>> TrainConfig(lr=np.float64(0.1), milestones=[np.float32(0.5)]).milestones
        (0.5,)
    """
    for field in fields(record):
        object.__setattr__(record, field.name, _plain(getattr(record, field.name)))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        return tuple(value.tolist())
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def _one_cycle(step: int, steps: int, start: float, middle: float, end: float) -> float:
    """Half a cosine from start to middle in the first 30 % of the steps, another one from there to the end."""
    turn, last = 0.3 * steps - 1, steps - 1
    if step <= turn:
        before, after, part = start, middle, step / turn
    else:
        before, after, part = middle, end, (step - turn) / (last - turn)
    return after + (before - after) / 2 * (1 + math.cos(math.pi * part))


def _require_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _require_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _require_number(name: str, value: object) -> None:
    if not _is_number(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
