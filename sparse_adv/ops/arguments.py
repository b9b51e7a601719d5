"""Checks of the types of arguments, before PyTorch reads them: each names the argument and the value."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

_LONGEST = 80


def shown(value: object) -> str:
    """A value in one short line, for a message.

    Examples:
        >>> shown([1, "a"]), shown(torch.zeros(2, 3))
        ("[1, 'a']", 'a tensor of shape (2, 3)')
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check_tensors(**values: object) -> None:
    """Raises TypeError unless these are dense tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_numbers(**values: object) -> None:
    """Raises TypeError unless these are real numbers; a tensor without dimensions is one."""
    for name, value in values.items():
        scalar = isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex()
        if not scalar and not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {shown(value)}")


def check_integers(**values: Any) -> None:
    """Raises TypeError or ValueError unless these are integers of 64 bits."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral | torch.SymInt) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {shown(value)}")
        if not torch.compiler.is_compiling() and not -(2**63) <= int(value) < 2**63:
            raise ValueError(f"{name} must have at most 64 bits, got {shown(value)}")


def check_flags(**values: object) -> None:
    """Raises TypeError unless these are True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {shown(value)}")
