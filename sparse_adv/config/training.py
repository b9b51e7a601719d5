"""Hyperparameters of training, and the schedules of its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sparse_adv.argument_types import check_count
from sparse_adv.config.checks import (
    is_number,
    make_plain,
    require_number,
    require_one_of,
    require_radius,
)

Objective = Literal[
    "natural", "fgsm", "fgsm-rs", "n-fgsm", "fgsm-rs-cs", "fgsm-uap", "nu-at", "pgd", "free", "trades", "mart"
]
LearningRateSchedule = Literal["piecewise", "cosine", "cyclic", "onecycle", "constant"]
Norm = Literal["linf", "l2"]
Precision = Literal["float32", "bfloat16", "float16"]

OBJECTIVES: tuple[str, ...] = get_args(Objective)
"""The names of the training objectives."""
SCHEDULES: tuple[str, ...] = get_args(LearningRateSchedule)
NORMS: tuple[str, ...] = get_args(Norm)
PRECISIONS: tuple[str, ...] = get_args(Precision)

_ALPHA_OVER_EPS = {"fgsm-rs": 1.25, "pgd": 0.25, "trades": 0.25, "mart": 0.25}
"""Default step size as a multiple of eps, from the paper of each objective; 1 for objectives without an entry."""
_BETA = {"fgsm-rs-cs": 1.0, "fgsm-uap": 10.0, "nu-at": 4.0, "trades": 6.0, "mart": 5.0}
"""Default weight of the second term of a loss, from the paper of each objective or the FastAT Benchmark."""
MULTI_STEP = ("pgd", "trades", "mart")
"""Objectives whose attack has several steps."""
SINGLE_STEP = tuple(each for each in OBJECTIVES if each not in ("natural", *MULTI_STEP))
"""Objectives whose attack has one step: catastrophic overfitting may occur with them."""


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of adversarial training with SGD, of its evaluations and of its overfitting monitor.

    One configuration can serve several objectives, by `dataclasses.replace`: a field that the objective does not use is
    ignored. The command line refuses a flag that has no effect; `without_effect` names them.

    Args:
        objective: training loss; `training.objectives` has the formula and the paper of each.
        epochs: passes over the training images, at least 1.
        lr: learning rate of SGD before schedule and warm-up, at least 0.
        momentum: momentum of SGD, in [0, 1). The schedule onecycle moves it from 0.05 more to 0.05 less and
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
        norm: norm of the perturbation ball, "linf" or "l2", also written "Linf" or "L2".
        alpha: step size of the attack in image units; default: fgsm-rs 1.25 eps, pgd, trades and mart eps / 4, the
            other objectives eps.
        steps: attack steps of the objectives pgd, trades and mart, at least 1; with the other attacks, those of the PGD
            training that repeats an epoch which the overfitting monitor undid.
        beta: weight of the second term of the loss, at least 0; default: fgsm-rs-cs 1, fgsm-uap 10, nu-at 4,
            trades 6, mart 5; the other objectives have no second term.
        label_smoothing: part of the label's probability, in [0, 1), that cross-entropy losses give to all classes
            evenly (fgsm-rs-cs smooths its labels twice, in two ways); single-step attacks raise the loss with these
            labels too.
        awp_gamma: adversarial weight perturbation: before each gradient the weights are moved by this fraction, at
            least 0, of the norm of each tensor; 0 turns it off. 0.01 is usual for pgd, 0.005 for trades.
        awp_warmup_epochs: number of first epochs without that perturbation, fractions allowed; 9 is usual for trades.
        replays: updates that the objective free makes on each batch, at least 1; it is usual to divide the epochs by
            this number.
        max_grad_norm: gradients of an update are scaled down to this L2 norm; 0 for no clipping.
        ema_decay: decay per update, in [0, 1), of an exponential moving average of the weights and the BatchNorm
            statistics, which is evaluated and saved instead of them; after t updates the decay is at most t / (t + 9),
            because an average that starts slowly would still consist of the first weights when a short run ends; 0
            for no average.
        precision: float32, or the dtype of automatic mixed precision, bfloat16 or float16; float16 scales the loss, and
            is very slow on a CPU.
        evaluate_every: epochs from one evaluation on the validation images to the next, at least 1; the last epoch is
            always evaluated.
        evaluation_steps: steps of the PGD attack in evaluations, at least 1; their size is eps / 4.
        overfitting_monitor: detect catastrophic overfitting of single-step attacks with PGD-5 on 256 validation images
            after each epoch, undo that epoch and repeat it with PGD training; it attacks the weights themselves, also
            with ema_decay.
        engine: let `sparse_adv.engine` form the gradients of attacks where it can; false leaves all to autograd.
        graphs: replay whole updates as CUDA graphs where they can be captured; false replays only their attacks. On a
            CPU it changes nothing.
        seed: seed of the random starts of attacks, of the order of images and of the network's own random numbers
            (dropout), at least 0.

    Raises:
        ValueError: if a value is out of range, naming the field and the value.

    Source: of `awp_gamma` Wu et al., "Adversarial weight perturbation helps robust generalization" (NeurIPS 2020);
    those of the schedules are in `learning_rate`, those of the objectives in their classes.

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
    schedule: LearningRateSchedule = "piecewise"
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
    awp_warmup_epochs: float = 0.0
    replays: int = 8
    max_grad_norm: float = 0.0
    ema_decay: float = 0.0
    precision: Precision = "float32"
    evaluate_every: int = 1
    evaluation_steps: int = 10
    overfitting_monitor: bool = True
    engine: bool = True
    graphs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        if isinstance(self.norm, str):
            object.__setattr__(self, "norm", self.norm.lower())  # torchattacks writes "Linf" and "L2"
        require_one_of("objective", self.objective, OBJECTIVES)
        require_one_of("schedule", self.schedule, SCHEDULES)
        require_one_of("norm", self.norm, NORMS)
        require_one_of("precision", self.precision, PRECISIONS)
        for name in ("epochs", "steps", "replays", "evaluate_every", "evaluation_steps"):
            check_count(name, getattr(self, name), least=1)
        check_count("seed", self.seed, least=0)
        for name in ("lr", "weight_decay", "warmup_epochs", "warmup_start_lr", "eps"):
            require_number(name, getattr(self, name))
        require_radius(self.eps, self.norm)
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs must be at most the {self.epochs} epochs, got {self.warmup_epochs!r}")
        for name in ("max_grad_norm", "awp_gamma", "awp_warmup_epochs"):
            require_number(name, getattr(self, name))
        for name in ("alpha", "beta"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        if self.alpha is not None:
            require_radius(self.alpha, self.norm, "alpha")
        for name in ("momentum", "ema_decay", "label_smoothing"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")
        if not isinstance(self.milestones, tuple) or not all(is_number(m) and 0 <= m <= 1 for m in self.milestones):
            raise ValueError(f"milestones must be fractions of the epochs in [0, 1], got {self.milestones}")
        if self.schedule == "onecycle" and not 0.05 <= self.momentum < 0.95:
            raise ValueError(f"momentum must be in [0.05, 0.95) for schedule 'onecycle', got {self.momentum!r}")
        if self.awp_gamma and self.awp_warmup_epochs >= self.epochs:
            raise ValueError(
                f"awp_warmup_epochs must be less than the {self.epochs} epochs, or no update perturbs the weights, "
                f"got {self.awp_warmup_epochs!r}"
            )
        if self.awp_gamma and self.objective == "natural":
            raise ValueError(f"awp_gamma must be 0 for objective 'natural', which has no attack, got {self.awp_gamma}")

    def without_effect(self) -> dict[str, str]:
        """Return the fields that the others leave without effect, with the reason.

        Examples:
            >>> TrainConfig("natural", schedule="constant").without_effect()["milestones"]
            "with schedule 'constant'"
        """
        objective = f"with objective {self.objective!r}"
        unused: dict[str, str] = {}
        if self.objective == "natural":
            unused |= dict.fromkeys(("alpha", "steps"), objective)
        elif self.objective in SINGLE_STEP and not self.overfitting_monitor:
            unused["steps"] = f"{objective} and no overfitting monitor"
        if self.objective not in _BETA:
            unused["beta"] = objective
        if not self.awp_gamma:
            unused["awp_warmup_epochs"] = "without awp_gamma"
        if self.objective != "free":
            unused["replays"] = objective
        if self.schedule != "piecewise":
            unused["milestones"] = f"with schedule {self.schedule!r}"
        if not self.warmup_epochs:
            unused["warmup_start_lr"] = "without warm-up"
        return unused

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
        A warm-up of W updates replaces lr by warmup_start_lr + (lr - warmup_start_lr) (step + 1) / W in the same
        formula, so that milestones inside the warm-up take effect.

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
        """Return the momentum of an update: `momentum`, except with the schedule onecycle.

        With onecycle it moves against the learning rate, as in PyTorch's OneCycleLR: from momentum + 0.05 to momentum -
        0.05 and back.

        Args:
            step, steps_per_epoch: as in `learning_rate`.
        """
        if self.schedule != "onecycle":
            return self.momentum
        high, low = self.momentum + 0.05, self.momentum - 0.05
        return _one_cycle(step, steps_per_epoch * self.epochs, high, low, high)


def _one_cycle(step: int, steps: int, start: float, middle: float, end: float) -> float:
    """Half a cosine from start to middle in the first 30 % of the steps, another one from there to the end."""
    turn, last = 0.3 * steps - 1, steps - 1
    if step <= turn:
        before, after, part = start, middle, step / turn
    else:
        before, after, part = middle, end, (step - turn) / (last - turn)
    return after + (before - after) / 2 * (1 + math.cos(math.pi * part))
