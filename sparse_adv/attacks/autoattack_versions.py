"""The versions of AutoAttack: their attacks and budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from sparse_adv.argument_types import check_count, shortened
from sparse_adv.attacks.apgd import apgd, apgd_t
from sparse_adv.attacks.ball import Ball, checked_ball
from sparse_adv.attacks.fab import fab, fab_t
from sparse_adv.attacks.options import SETTINGS, check_settings
from sparse_adv.attacks.square import square
from sparse_adv.ops.arguments import check_flag, check_integer


class _Checked:
    """Settings that are checked when they are set; only existing settings can be set."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("n_") or name == "eot_iter":
            check_count(name, value, least=1)
        elif name == "resc_schedule":
            check_flag(name, value)
        elif name in SETTINGS:
            check_settings(**{name: value})
        object.__setattr__(self, name, value)


@dataclass(slots=True)
class APGDSettings(_Checked):
    """Settings of apgd-ce and apgd-dlr, by the reference's names; `attacks.apgd` documents them."""

    n_restarts: int = 1
    n_iter: int = 100
    eot_iter: int = 1
    rho: float = 0.75


@dataclass(slots=True)
class TargetedAPGDSettings(APGDSettings):
    """Settings of apgd-t."""

    n_target_classes: int = 9


@dataclass(slots=True)
class FABSettings(_Checked):
    """Settings of fab and fab-t; fab-t ignores n_restarts and has one start. `attacks.fab` documents them."""

    n_restarts: int = 1
    n_iter: int = 100
    n_target_classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9


@dataclass(slots=True)
class SquareSettings(_Checked):
    """Settings of square; `attacks.square` documents them."""

    n_queries: int = 5000
    n_restarts: int = 1
    p_init: float = 0.8
    resc_schedule: bool = False


@dataclass(slots=True)
class Settings:
    """The settings of all attacks; the defaults are those of version "standard"."""

    apgd: APGDSettings = field(default_factory=APGDSettings)
    apgd_targeted: TargetedAPGDSettings = field(default_factory=TargetedAPGDSettings)
    fab: FABSettings = field(default_factory=FABSettings)
    square: SquareSettings = field(default_factory=SquareSettings)

    @classmethod
    def of(cls, version: str) -> Settings:
        """The settings of a version; "custom" has the defaults of the authors' implementation."""
        settings = cls()
        if version in ("plus", "custom"):
            settings.apgd.n_restarts = settings.fab.n_restarts = 5
        elif version == "rand":
            settings.apgd.eot_iter = 20
        return settings


_WORDS = {"n_iter": "{} steps", "n_queries": "{} queries"}
_UNLESS_ONE = {"n_restarts": "{} restarts", "eot_iter": "gradients averaged over {}"}
_STEPS = {"n_iter": "steps", "n_restarts": "restarts"}
_ASCENT = {**_STEPS, "eot_iter": "eot_iter", "rho": "rho"}
_BOUNDARY = {"alpha_max": "alpha_max", "eta": "eta", "beta": "beta"}


@dataclass(frozen=True)
class Member:
    """One attack of the sequence: the name of its settings, the attack, and the attack's argument for each setting."""

    settings: str
    attack: Callable[..., Tensor]
    arguments: Mapping[str, str]

    def options(self, settings: Settings) -> dict[str, Any]:
        """The arguments of the attack."""
        own = getattr(settings, self.settings)
        return {argument: getattr(own, name) for name, argument in self.arguments.items()}

    def budget(self, settings: Settings, classes: int) -> str:
        """The settings in words: steps, queries, targets, restarts of apgd and fab, and others only if they are
        unusual.

        There are at most `classes - 1` target classes.
        """
        own, usual = getattr(settings, self.settings), getattr(Settings(), self.settings)
        words = []
        for name in self.arguments:
            value = getattr(own, name)
            if name == "n_target_classes":
                words.append(f"{min(value, classes - 1)} targets")
            elif name in _WORDS:
                words.append(_WORDS[name].format(value))
            elif name == "n_restarts" and value == 1 and self.settings in ("apgd", "fab"):
                words.append("1 restart")
            elif value != getattr(usual, name):
                words.append(_UNLESS_ONE.get(name, f"{name} {{}}").format(value))
        return ", ".join(words)


MEMBERS = {
    "apgd-ce": Member("apgd", partial(apgd, loss="ce"), _ASCENT),
    "apgd-dlr": Member("apgd", partial(apgd, loss="dlr"), _ASCENT),
    "apgd-t": Member("apgd_targeted", apgd_t, {"n_iter": "steps", "n_target_classes": "n_target_classes"} | _ASCENT),
    "fab": Member("fab", fab, _STEPS | _BOUNDARY),
    "fab-t": Member("fab", fab_t, {"n_iter": "steps", "n_target_classes": "n_target_classes"} | _BOUNDARY),
    "square": Member(
        "square",
        square,
        {"n_queries": "queries", "n_restarts": "restarts", "p_init": "p_init", "resc_schedule": "resc_schedule"},
    ),
}
"""The attacks by the reference's names."""

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "custom": (),
}
"""Names of the attacks of each version, in their order."""


_LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
"""Least number of classes for which the loss of an attack is defined."""


def with_enough_classes(names: Sequence[str], classes: int) -> int:
    """Return the number of classes; raise ValueError if one of the attacks needs more.

    Examples:
        >>> with_enough_classes(["apgd-ce", "apgd-t"], 3)
        Traceback (most recent call last):
        ...
        ValueError: apgd-t needs at least 4 classes, the model has 3: take version "custom" with ...
    """
    for name in names:
        if classes < (least := _LEAST_CLASSES.get(name, 2)):
            others = sorted(set(MEMBERS) - set(_LEAST_CLASSES))
            advice = (
                f': take version "custom" with attacks_to_run of {", ".join(others[:-1])} and {others[-1]}, or, for '
                "evaluate, --attack bound"
            )
            raise ValueError(
                f"{name} needs at least {least} classes, the model has {classes}" + (advice if classes >= 2 else "")
            )
    return classes


def _of_ball(name: str) -> property:
    """A property that reads and replaces one value of the ball; all of its values are then checked again."""

    def read(attack: Versioned) -> Any:
        return getattr(attack.ball, name)

    def write(attack: Versioned, value: Any) -> None:
        attack.ball = checked_ball(*attack.ball._replace(**{name: value}))

    return property(read, write, doc=f"`{name}` of `attacks.AutoAttack`; it may be set between two runs.")


class Versioned:
    """An object with a version, its attacks, their settings, a ball and a seed; all may be set between two runs."""

    version: str
    settings: Settings
    ball: Ball
    norm = _of_ball("norm")
    eps = _of_ball("eps")
    lo = _of_ball("lo")
    hi = _of_ball("hi")

    @property
    def seed(self) -> int | None:
        """Seed of all random numbers; None to draw one for each run."""
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        if seed is not None:
            check_integer("seed", seed)
        self._seed = None if seed is None else int(seed)  # NumPy's integers overflow in arithmetic

    def set_version(self, version: str = "standard", attacks_to_run: Sequence[str] = ()) -> None:
        """Choose the budgets and attacks of a version; "custom" takes the given attacks. Earlier settings are lost."""
        if not isinstance(version, str) or version not in VERSIONS:
            raise ValueError(f"version must be {', '.join(map(repr, VERSIONS))}, got {shortened(version)}")
        names = _names(attacks_to_run)
        if names and version != "custom":
            raise ValueError(f'attacks_to_run is for version "custom" only, got {list(names)} with {version!r}')
        self.version, self.settings, self.attacks_to_run = version, Settings.of(version), names or VERSIONS[version]

    @property
    def attacks_to_run(self) -> tuple[str, ...]:
        """Names of the attacks, in their order; they may also be set after construction."""
        return self._attacks_to_run

    @attacks_to_run.setter
    def attacks_to_run(self, names: Sequence[str]) -> None:
        self._attacks_to_run = _names(names)

    @property
    def apgd(self) -> APGDSettings:
        """Settings of apgd-ce and apgd-dlr: n_restarts, n_iter, eot_iter, rho; they may be set between two runs."""
        return self.settings.apgd

    @property
    def apgd_targeted(self) -> TargetedAPGDSettings:
        """Settings of apgd-t: those of `apgd`, and n_target_classes."""
        return self.settings.apgd_targeted

    @property
    def fab(self) -> FABSettings:
        """Settings of fab and fab-t: n_restarts (only of fab), n_iter, n_target_classes, alpha_max, eta, beta."""
        return self.settings.fab

    @property
    def square(self) -> SquareSettings:
        """Settings of square: n_queries, n_restarts, p_init, resc_schedule."""
        return self.settings.square


def _names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of attacks; raises TypeError or ValueError for anything else."""
    if isinstance(names, str | bytes) or not isinstance(names, Sequence):
        raise TypeError(f"attacks_to_run must be a sequence of names, got {shortened(names)}")
    for name in names:
        if not isinstance(name, str) or name not in MEMBERS:
            raise ValueError(f"attacks_to_run must be of {', '.join(MEMBERS)}, got {shortened(name)}")
    if len(set(names)) < len(names):
        raise ValueError(f"attacks_to_run must name each attack once, got {list(names)}")
    return tuple(names)
