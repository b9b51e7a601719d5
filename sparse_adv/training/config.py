"""How a model is trained and watched: every number of it, checked when it is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("piecewise", "cosine", "cyclic", "constant")
OBJECTIVES = ("natural", "fgsm", "fgsm-rs", "n-fgsm", "pgd", "free", "trades")
PRECISIONS = ("float32", "bfloat16", "float16")

_ALPHA = {"fgsm": 1.0, "fgsm-rs": 1.25, "n-fgsm": 1.0, "pgd": 0.25, "free": 1.0, "trades": 0.25}
"""Each objective's step size in units of eps, from its paper (PGD and TRADES: 2/255 at 8/255)."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained and watched; runs of one recipe differ in nothing but their model and data.

    Attributes:
        objective: what an update sees: "natural" images, "fgsm" (no random start), "fgsm-rs", "n-fgsm", "pgd", "free"
            or "trades"; `training.objectives` has the formulas and papers.
        epochs: passes over the training images.
        lr, momentum, weight_decay: of SGD.
        schedule: of the learning rate, by step: "piecewise" (a tenth at each of `drops`), "cosine" (to 0), "cyclic"
            (from 0 up to `lr` at half of the epochs and down again) or "constant".
        drops: shares of the epochs after which the piecewise rate falls to a tenth.
        warmup_epochs, warmup_from: in these epochs the rate climbs evenly from `warmup_from` to what the schedule says.
        eps, norm: radius, in image units, and norm ("linf" or "l2") of the ball that training and evaluation attack in.
        alpha: step size in image units; None takes the objective's own: eps for "fgsm", "n-fgsm" and "free", 1.25 eps
            for "fgsm-rs", eps / 4 for "pgd" and "trades".
        steps: of "pgd" and "trades".
        beta: weight of the robust term of "trades".
        replays: how often "free" updates on each batch; compare it at 1 / replays of the epochs.
        clip: largest norm of an update's gradient; 0 leaves it alone.
        ema: decay per step of an averaged copy of the weights, which is then what is evaluated and kept; 0 for none.
        precision: "float32", or what autocast computes in: "bfloat16", or "float16" with gradient scaling (GPU).
        evaluate_every: epochs between evaluations; the last epoch always has one.
        evaluation_steps: of the PGD attack of evaluations, of step size eps / 4.
        guard: whether a collapse of robustness is looked for and rolled back; see `training.guard`.
        seed: of the attacks' random starts, and of whatever the model itself draws (dropout).
    """

    objective: str = "pgd"
    epochs: int = 30
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "piecewise"
    drops: tuple[float, ...] = (0.5, 0.75)
    warmup_epochs: float = 0
    warmup_from: float = 0.0
    eps: float = 8 / 255
    norm: str = "linf"
    alpha: float | None = None
    steps: int = 10
    beta: float = 6.0
    replays: int = 8
    clip: float = 0.0
    ema: float = 0.0
    precision: str = "float32"
    evaluate_every: int = 1
    evaluation_steps: int = 10
    guard: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("objective", OBJECTIVES),
            ("schedule", SCHEDULES),
            ("norm", ("linf", "l2")),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, got "{getattr(self, name)}"')
        for name in ("epochs", "steps", "replays", "evaluate_every", "evaluation_steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "warmup_epochs", "warmup_from", "eps", "alpha", "beta", "clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if any(not 0 <= drop <= 1 for drop in self.drops):
            raise ValueError(f"drops must be shares of the epochs in [0, 1], got {self.drops}")
        if self.norm == "l2" and self.objective in ("n-fgsm", "free", "trades"):
            raise ValueError(f'norm of objective "{self.objective}" must be "linf", got "l2"')

    @property
    def step_size(self) -> float:
        """`alpha`, or the objective's own where that is None."""
        return _ALPHA.get(self.objective, 0.0) * self.eps if self.alpha is None else self.alpha

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of an update, counted from 0.

        With t = step / steps_per_epoch epochs passed of E: "piecewise" lr / 10^(number of drops with t >= drop E);
        "cosine" lr (1 + cos(pi t / E)) / 2 (Loshchilov and Hutter 2017, equation 5); "cyclic" lr (1 - |1 - 2 t / E|)
        (Wong et al. 2020, section 5). A warm-up multiplies it, so that a drop inside the warm-up is not lost.
        """
        passed = step / steps_per_epoch
        share = passed / self.epochs
        if self.schedule == "piecewise":
            factor = 0.1 ** sum(share >= drop for drop in self.drops)
        elif self.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * share))
        elif self.schedule == "cyclic":
            factor = 1 - abs(1 - 2 * (step + 1) / (self.epochs * steps_per_epoch + 1))  # no update at rate 0
        else:
            factor = 1.0
        climbed = min(1.0, (step + 1) / (self.warmup_epochs * steps_per_epoch)) if self.warmup_epochs else 1.0
        return factor * (self.warmup_from + (self.lr - self.warmup_from) * climbed)
