"""Checks of the launchers' tensors, as in csrc/common/tensor_checks.h for the CPU; errors name the tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_adv.kernels.layout import layout_of

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, message: str) -> None:
    """Raises RuntimeError with the message if the condition does not hold."""
    if not condition:
        raise RuntimeError(f"sparse_adv: {message}")


def check_device(name: str, tensor: Tensor, first: Tensor) -> None:
    """Raises RuntimeError unless the tensor is on the device of `first`."""
    check(tensor.device == first.device, f"{name} must be on the device of the images")


def check_floating(name: str, tensor: Tensor, first: Tensor) -> None:
    """Raises RuntimeError unless the kernels can read the tensor: of a dtype in FLOATING, on the device of `first`."""
    check_device(name, tensor, first)
    got = f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}"
    check(tensor.dtype in FLOATING, got)


def check_size(name: str, tensor: Tensor, size: Sequence[int]) -> None:
    """Raises RuntimeError unless the tensor has this size."""
    check(list(tensor.shape) == list(size), f"{name} must have size {list(size)}, got {list(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises RuntimeError unless the tensor has this dtype."""
    check(tensor.dtype == dtype, f"{name} must be {dtype}, got {tensor.dtype}")


def check_layout(name: str, tensor: Tensor, layout: torch.memory_format) -> None:
    """Raises RuntimeError unless the tensor has this layout and no gaps."""
    fits = tensor.is_contiguous(memory_format=layout)
    names = "NCHW" if layout == torch.contiguous_format else "channels_last"
    check(fits, f"{name} must be {names} without gaps, got strides {list(tensor.stride())}")


def check_apart(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises RuntimeError if two tensors without gaps share memory."""
    first, second = tensor.data_ptr(), other.data_ptr()
    apart = first + tensor.nbytes <= second or second + other.nbytes <= first
    check(apart, f"{name} shares memory with {other_name}")


def check_bits(name: str, gate: Tensor, images: Tensor) -> None:
    """Raises RuntimeError unless this is a gate as `ops.empty_gate` makes it, and bit i belongs to element i."""
    fits = gate.dtype == torch.uint8 and gate.is_contiguous() and 8 * gate.numel() == images.numel()
    whole = images.shape[1] % 8 == 0 and images.dim() == 4 and layout_of(images) == torch.channels_last
    check(
        fits and whole,
        f"{name} must have a bit for each element of channels_last images with a multiple of 8 channels, got "
        f"{gate.dtype} of shape {list(gate.shape)} for images of shape {list(images.shape)}",
    )
