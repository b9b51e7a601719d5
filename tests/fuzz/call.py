"""A call of an op, and what it must compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Arguments = dict[str, Any]
Results = Mapping[str, tuple[Any, Any]]
"""By name the actual and the expected value."""


@dataclass(frozen=True)
class Call:
    """A legal call; `results` compares the arguments before and after it, and what it returned."""

    function: Callable[..., Any]
    arguments: Arguments
    results: Callable[[Arguments, Arguments, Any], Results]
    tolerance: str = "elementwise"


def wide(value: Any) -> Any:
    """Floating tensors in float64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def all_wide(arguments: Arguments, *without: str) -> Arguments:
    return {name: wide(value) for name, value in arguments.items() if name not in without}
