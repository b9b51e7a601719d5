"""Checks of arguments that are not specific to one op. Each error names the argument and the value, shortened."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_adv.argument_types import shortened
from sparse_adv.kernels.tensor_checks import FLOATING

Pair = int | tuple[int, int]
"""One integer for rows and columns, or one for each."""


def check_tensors(**tensors: object) -> None:
    """Raises TypeError unless all of them are dense tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got a nested one")


def check_floating(name: str, tensor: object) -> None:
    """Raises TypeError unless this is a dense floating point tensor of 16 bits or more."""
    check_tensors(**{name: tensor})
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in FLOATING:
        kind = "a floating point tensor of 16 bits or more" if tensor.is_floating_point() else "a floating point tensor"
        raise TypeError(f"{name} must be {kind}, got {tensor.dtype}")


def check_number(name: str, value: object) -> None:
    """Raises TypeError unless this is a real number, and ValueError if it is an integer too large for a float or
    kernel.

    Examples:
        >>> check_number("alpha", "0.1")
        Traceback (most recent call last):
        TypeError: alpha must be a number, got '0.1'
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shortened(value)
        raise TypeError(f"{name} must be a number, got {got}")
    if isinstance(value, int):
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"{name} must be finite, got {shortened(value)}, which no float holds") from None
        if not is_integer(value):
            raise ValueError(f"{name} must be a float or an integer of 64 bits, got {shortened(value)}")


def check_numbers(**numbers: object) -> None:
    """Raises TypeError or ValueError unless all of them are real numbers, see `check_number`."""
    for name, value in numbers.items():
        check_number(name, value)


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless this is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shortened(value)}")


def check_flags(**flags: object) -> None:
    """Raises TypeError unless all of them are True or False."""
    for name, value in flags.items():
        check_flag(name, value)


def is_integer(value: object) -> bool:
    """Whether this is an integer of 64 bits and not a bool; the symbolic sizes of `torch.compile` count as integers."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer | torch.SymInt):
        return False
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def as_integer(value: Any) -> Any:
    """Return a NumPy integer as a Python one, whose arithmetic does not overflow, and any other value unchanged."""
    return int(value) if isinstance(value, np.integer) else value


def check_integer(name: str, value: object) -> None:
    """Raises TypeError unless this is an integer of 64 bits."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {shortened(value)}")


def read_pair(name: str, value: object) -> tuple[int, int]:
    """Complete an integer to (rows, columns); raises ValueError unless the value is one or two integers.

    Examples:
        >>> read_pair("stride", 2), read_pair("stride", [2, 1])
        ((2, 2), (2, 1))
    """
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(map(is_integer, pair)):
        raise ValueError(f"{name} must be one or two integers, got {shortened(value)}")
    return as_integer(pair[0]), as_integer(pair[1])


def overlap_partly(written: Tensor, read: Tensor) -> bool:
    """Whether a write to `written` may change elements of `read` before they are read.

    It does not if the two are views of the same elements in the same order.
    """
    if written.numel() == 0 or not torch._C._is_alias_of(written, read):  # type: ignore[attr-defined]
        return False
    start = [tensor.storage_offset() * tensor.element_size() for tensor in (written, read)]
    if start[0] == start[1] and written.stride() == read.stride() and written.dtype == read.dtype:
        return False
    end = [_end(tensor) * tensor.element_size() for tensor in (written, read)]
    if start[0] >= end[1] or start[1] >= end[0]:
        return False
    if written.element_size() != read.element_size():
        return True  # views of the same memory with two dtypes: an answer for each element is not needed
    if written.stride() == read.stride() and written.shape == read.shape and _is_nested(written):
        return _is_reached(int(written.storage_offset() - read.storage_offset()), _dimensions(written))
    marks = _marked(written, max(_end(written), _end(read)))
    return bool(marks.as_strided(read.shape, read.stride(), read.storage_offset()).any())


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of the tensor share memory."""
    if tensor.numel() == 0 or _is_nested(tensor):
        return False
    return int(_marked(tensor, _end(tensor)).count_nonzero()) < tensor.numel()  # elements may be interleaved


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    """Stride and size of each dimension with more than one element, smallest stride first."""
    return sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _is_nested(tensor: Tensor) -> bool:
    """Whether each stride is larger than the range that the dimensions with smaller strides cover."""
    inner = 0
    for stride, size in _dimensions(tensor):
        if stride <= inner:
            return False
        inner += stride * (size - 1)
    return True


def _is_reached(distance: int, dimensions: list[tuple[int, int]]) -> bool:
    """Whether a view with nested dimensions shares an element with the same view moved by a distance."""
    if not dimensions:
        return distance == 0
    *inner, (stride, size) = dimensions
    steps = distance // stride
    return any(abs(n) < size and _is_reached(distance - n * stride, inner) for n in (steps, steps + 1))


def _end(tensor: Tensor) -> int:
    """One more than the place of the last element in the storage."""
    return int(tensor.storage_offset()) + sum(stride * (size - 1) for stride, size in _dimensions(tensor)) + 1


def _marked(tensor: Tensor, elements: int) -> Tensor:
    """For each of the first elements of the storage, whether it belongs to the tensor; bool [elements]."""
    marks = torch.zeros(elements, dtype=torch.bool, device="cpu")
    marks.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return marks
