"""`AttackOptions`: all settings of an attack, validated in one place and passed on unchanged to the PGD loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count, shortened
from sparse_adv.attacks.ball import Ball, check_alphas, check_radius, checked_ball
from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.losses import Loss, kl_divergence, loss_function
from sparse_adv.ops.arguments import check_flags, check_number
from sparse_adv.ops.random_start import as_philox_state

BN_MODES = ("eval", "train", "batch")
"""The modes of BatchNorm layers during an attack, see `pgd`."""


class BasicOptions(TypedDict, total=False):
    """Keyword arguments of all attacks; `pgd` documents them."""

    lo: float | Tensor
    hi: float | Tensor
    check: bool
    engine: bool


class CommonOptions(BasicOptions, total=False):
    """Keyword arguments of PGD, and of the attacks that are PGD with other settings; `pgd` documents them."""

    generator: torch.Generator | Tensor | None
    bn_mode: str
    graphs: Graphs | None


class LossOptions(CommonOptions, total=False):
    """Keyword arguments of the PGD attacks that use labels; `pgd` documents them."""

    loss: str | Loss
    targeted: bool
    early_stop: bool


class FABTOptions(BasicOptions, total=False):
    """Keyword arguments of `FABT`; `FAB` documents them."""

    n_restarts: int
    alpha_max: float
    eta: float
    beta: float
    verbose: bool
    seed: int
    n_classes: int


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """All settings of an attack; `pgd` documents the settings that are not documented here.

    The class methods give the settings of the other attacks.

    Raises:
        TypeError: if eps, alpha, lo or hi is neither a number nor a float tensor.
        ValueError: if a value is out of range, naming the argument and the value.

    Examples:
        >>> from sparse_adv.attacks import AttackOptions
        >>> options = AttackOptions.fgsm_rs(eps=0.1, lo=-1.0)
        >>> options.alpha, options.steps, options.ball
        (0.125, 1, Ball(eps=0.1, norm='linf', lo=-1.0, hi=1.0))
    """

    eps: float | Tensor = 8 / 255
    alpha: float | Tensor = 2 / 255
    steps: int = 10
    random_start: bool = True
    norm: str = "linf"
    loss: str | Loss = "ce"
    restarts: int = 1
    targeted: bool = False
    lo: float | Tensor = 0.0
    hi: float | Tensor = 1.0
    generator: torch.Generator | Tensor | None = None
    bn_mode: str = "eval"
    check: bool = True
    graphs: Graphs | None = None
    engine: bool = True
    early_stop: bool = False
    start_eps: float | Tensor | None = None
    """Radius of the ball in which the random start lies; None for `eps`."""
    project: bool = True
    """Whether the start is clamped to [lo, hi] and each step projected onto the ball; False only for N-FGSM."""

    def __post_init__(self) -> None:
        check_flags(random_start=self.random_start, targeted=self.targeted, early_stop=self.early_stop)
        check_flags(check=self.check, engine=self.engine, project=self.project)
        check_generator(self.generator)
        if self.graphs is not None and not isinstance(self.graphs, Graphs):
            raise TypeError(f"graphs must be attacks.Graphs or None, got {shortened(self.graphs)}")
        ball = checked_ball(self.eps, self.norm, self.lo, self.hi)
        object.__setattr__(self, "norm", ball.norm)
        check_alphas(self.alpha)
        check_count("steps", self.steps, least=0)
        check_count("restarts", self.restarts, least=1)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts must be 1 without a random start, got {self.restarts}")
        loss_function(self.loss)
        if not isinstance(self.bn_mode, str) or self.bn_mode not in BN_MODES:
            raise ValueError(f'bn_mode must be "eval", "train" or "batch", got {shortened(self.bn_mode)}')

    @property
    def varies(self) -> bool:
        """Whether values differ between images or channels: eps, alpha, lo or hi is a tensor."""
        return any(isinstance(value, Tensor) for value in (self.eps, self.alpha, self.lo, self.hi))

    @property
    def ball(self) -> Ball:
        """The ball onto which each step is projected; its radius is infinite without projection."""
        return Ball(self.eps if self.project else math.inf, self.norm, self.lo, self.hi)

    @property
    def start(self) -> Ball | None:
        """The ball in which the random start lies; None for a start at the clean images."""
        if not self.random_start:
            return None
        eps = self.eps if self.start_eps is None else self.start_eps
        return Ball(eps, self.norm, *((self.lo, self.hi) if self.project else (-math.inf, math.inf)))

    @classmethod
    def fgsm(cls, eps: float | Tensor, norm: str = "linf", **options: Unpack[LossOptions]) -> AttackOptions:
        """FGSM: one step of size eps from the clean images."""
        check_names("fgsm", options, LossOptions)
        return cls(eps=eps, alpha=eps, steps=1, random_start=False, norm=norm, **options)

    @classmethod
    def fgsm_rs(
        cls,
        eps: float | Tensor,
        alpha: float | Tensor | None = None,
        norm: str = "linf",
        **options: Unpack[LossOptions],
    ) -> AttackOptions:
        """FGSM-RS: one step of size alpha, by default 1.25 eps, from a random start."""
        check_names("fgsm_rs", options, LossOptions)
        check_radius(eps)
        return cls(eps=eps, alpha=1.25 * eps if alpha is None else alpha, steps=1, norm=norm, **options)

    @classmethod
    def n_fgsm(
        cls,
        eps: float | Tensor,
        alpha: float | Tensor | None = None,
        norm: str = "linf",
        **options: Unpack[LossOptions],
    ) -> AttackOptions:
        """N-FGSM: one step of size alpha, by default eps, from noise in the ball of 2 eps, without projection."""
        check_names("n_fgsm", options, LossOptions)
        check_radius(eps)
        alpha = eps if alpha is None else alpha
        return cls(eps=eps, alpha=alpha, steps=1, norm=norm, start_eps=2 * eps, project=False, **options)

    @classmethod
    def tpgd(
        cls,
        eps: float | Tensor,
        alpha: float | Tensor,
        steps: int,
        norm: str = "linf",
        **options: Unpack[CommonOptions],
    ) -> AttackOptions:
        """The attack of TRADES: maximises KL(p(clean) || p(adversarial)) from little noise, see `attacks.tpgd`."""
        check_names("tpgd", options, CommonOptions)
        start_eps = tpgd_start(eps, norm)
        return cls(eps=eps, alpha=alpha, steps=steps, norm=norm, start_eps=start_eps, loss=kl_divergence, **options)


def tpgd_start(eps: float | Tensor, norm: str) -> float | Tensor:
    """Radius of the ball in which the attack of TRADES starts: little noise, at most eps."""
    noise = 0.05 if checked_ball(eps, norm, 0.0, 1.0).norm == "l2" else 0.001
    return eps.clamp(max=noise) if isinstance(eps, Tensor) else min(eps, noise)


SETTINGS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "rho": ("lie in [0, 1]", lambda value: 0 <= value <= 1),
    "alpha_max": ("lie in [0, 1]", lambda value: 0 <= value <= 1),
    "eta": ("be at least 1", lambda value: value >= 1),
    "beta": ("lie between 0 and 1", lambda value: 0 < value < 1),
    "p_init": ("lie in (0, 1]", lambda value: 0 < value <= 1),
}
"""Settings of searches and of AutoAttack: the range in words and as a condition."""


def check_settings(**settings: object) -> None:
    """Raise TypeError or ValueError unless each of these settings of a search is a number in its range."""
    for name, value in settings.items():
        check_number(name, value)
        words, lies_within = SETTINGS[name]
        if not lies_within(value):  # type: ignore[arg-type]
            raise ValueError(f"{name} must {words}, got {value}")


def check_generator(generator: object) -> None:
    """Raise TypeError or ValueError unless this is None or random numbers can be drawn from it."""
    if not isinstance(generator, torch.Generator | None):
        as_philox_state(generator, "generator")  # type: ignore[arg-type]


def check_names(attack: str, options: Mapping[str, object], allowed: type) -> None:
    """Raise TypeError for unknown keyword arguments: Python does not check `Unpack`, only type checkers do."""
    for name in options:
        if name not in allowed.__annotations__:
            raise TypeError(f"{attack}() got an unexpected keyword argument {name!r}")
