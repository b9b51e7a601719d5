"""Values of configurations: made Python's own numbers, and checked; errors name the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from numbers import Real
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_LARGEST = 3.4e38
"""Largest number that a float32 can hold, rounded down."""


def make_plain(record: DataclassInstance) -> None:
    """Replace scalars of NumPy and PyTorch in the fields of a dataclass by Python's numbers, and lists by tuples.

    Only such values can be written to JSON, read with `torch.load(weights_only=True)` and compared after reading.

    Raises:
        ValueError: if a field declared as bool has another value: the text "no" would count as true.

    Examples:
        >>> import numpy as np
        >>> from sparse_adv.config import TrainConfig
        >>> TrainConfig(lr=np.float64(0.1), milestones=[np.float32(0.5)]).milestones
        (0.5,)
    """
    for field in fields(record):
        value = _plain(getattr(record, field.name))
        wanted = {"bool": (bool,), "bool | None": (bool, NoneType)}.get(str(field.type))
        if wanted and not isinstance(value, wanted):
            raise ValueError(f"{field.name} must be true or false, got {value!r}")
        object.__setattr__(record, field.name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        return tuple(value.tolist())
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def require_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def require_number(name: str, value: object) -> None:
    if not is_number(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    if value > _LARGEST:
        raise ValueError(f"{name} must be at most {_LARGEST:g}, got {value!r}")


def require_density(value: object) -> None:
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"density must be in (0, 1], got {value!r}")


def require_part(value: object) -> None:
    """Raise ValueError unless this is a part of the training images to hold out for validation."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf or (number > 1 and not number.is_integer()):
        raise ValueError(f"validation must be a fraction in (0, 1) or a whole number of images, got {value!r}")


def require_radius(eps: float, norm: str, name: str = "eps") -> None:
    """Raise ValueError for a radius, or a step size, beyond all images, such as 8 for 8/255.

    Examples:
        >>> require_radius(8, "linf")
        Traceback (most recent call last):
        ...
        ValueError: eps must be at most 1 for norm 'linf', as 8/255 for images in [0, 1], got 8
    """
    if norm == "linf" and eps > 1:
        raise ValueError(f"{name} must be at most 1 for norm 'linf', as 8/255 for images in [0, 1], got {eps!r}")


def refuse_unused(config: object, default: object, without_effect: Mapping[str, str]) -> None:
    """Raise ValueError if a field without effect differs from its default, naming its flag.

    Args:
        config: the configuration to check.
        default: a configuration with the default values.
        without_effect: maps the name of each field of `config` that has no effect to the reason, which ends the
            sentence "--name has no effect ...".

    Examples:
        >>> from sparse_adv.config import TrainConfig
        >>> config = TrainConfig("pgd", replays=4)
        >>> refuse_unused(config, TrainConfig(), config.without_effect())
        Traceback (most recent call last):
        ...
        ValueError: --replays 4 has no effect with objective 'pgd': leave it out, or at its default 8
    """
    for name, because in without_effect.items():
        value, usual = getattr(config, name), getattr(default, name)
        if value != usual:  # the value may be a config file's, which a flag can only set back
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            given = flag if isinstance(value, bool) else f"{flag} {_as_typed(value)}"
            raise ValueError(f"{given} has no effect {because}: leave it out, or at its default {_as_typed(usual)}")


def _as_typed(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "null" if value is None else str(value)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
