"""What the value of a flag, or of a key of a config file, means; a wrong one is refused in one sentence."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeVar

T = TypeVar("T")


def number(name: str, value: str | float) -> float:
    """A decimal number or a fraction: "0.03", "8/255"."""
    try:
        if not isinstance(value, bool):  # YAML's "yes" and "on"
            return float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    except (TypeError, ValueError, ArithmeticError):
        pass
    raise ArgumentTypeError(f"{name} must be a number or a fraction such as 8/255, got {value!r}")


def integer(name: str, value: str | float) -> int:
    """A whole number."""
    try:
        if isinstance(value, str):
            return int(value) if value.lstrip("+-").isdecimal() else integer(name, float(value))
        if value == int(value) and not isinstance(value, bool):
            return int(value)
    except (TypeError, ValueError, ArithmeticError):
        pass
    raise ArgumentTypeError(f"{name} must be a whole number, got {value!r}")


def comma_separated(parse: Callable[[str, Any], T], name: str, value: str | Sequence[Any]) -> tuple[T, ...]:
    """ "4,1" or, in a config file, [4, 1]."""
    try:
        parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return tuple(parse(name, part) for part in parts)
    except (TypeError, ArgumentTypeError):
        raise ArgumentTypeError(f"{name} must be numbers separated by commas, got {value!r}") from None


def one_of(choices: tuple[str, ...], name: str, value: object) -> str:
    """One of several words, in lower or upper case: torchattacks writes "Linf"."""
    if not isinstance(value, str) or value.lower() not in choices:
        raise ArgumentTypeError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value.lower()


def or_null(parse: Callable[[str, Any], T], name: str, value: object) -> T | None:
    """A value, or the word null for none, as in a config file."""
    return None if value == "null" else parse(name, value)


def text(name: str, value: object) -> str:
    """Text."""
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be text, got {value!r}")
    return value


def path(name: str, value: object) -> str:
    """A path; an empty one would be the present folder."""
    given = text(name, value)
    if not given.strip():
        raise ArgumentTypeError(f"{name} must be a path, got {value!r}")
    return given
