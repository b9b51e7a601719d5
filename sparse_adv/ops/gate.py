"""Gates: one bit for each element of a ReLU's output, set where the gradient passes.

The rows of the tensor's innermost memory dimension are padded to whole bytes. Bit i % 8, the lowest first, of byte
i // 8 belongs to element i of its row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.kernels.layout import layout_of
from sparse_adv.kernels.tensor_checks import check, check_device, check_size
from sparse_adv.ops.arguments import check_tensors


def empty_gate(like: Tensor) -> Tensor:
    """An uninitialised gate for a tensor, as `masked_conv2d_out` and `pointwise_out` write it.

    It takes a 32nd of a float32 tensor's memory, if its rows are multiples of 8 elements. A tensor that is both NCHW
    and channels_last (one channel, or one pixel) counts as NCHW.

    Args:
        like: tensor [N, C, H, W], NCHW or channels_last.

    Returns:
        uint8 tensor [N, C, H, ceil(W / 8)] if like is NCHW, [N, H, W, ceil(C / 8)] if it is channels_last.

    Raises:
        TypeError: if like is not a dense tensor.
        ValueError: if like does not have four dimensions.

    Examples:
        >>> empty_gate(torch.empty(2, 64, 5, 9)).shape
        torch.Size([2, 64, 5, 2])
        >>> empty_gate(torch.empty(2, 64, 5, 9, memory_format=torch.channels_last)).shape
        torch.Size([2, 5, 9, 8])
    """
    check_tensors(like=like)
    return torch.empty(_shape_of_gate(like), dtype=torch.uint8, device=like.device)


def gate_to_bool(gate: Tensor, like: Tensor) -> Tensor:
    """The bits of a gate as a bool tensor with the shape and layout of `like`: true where the gradient passes.

    Args:
        gate: uint8 tensor of the shape of `empty_gate(like)`.
        like: tensor [N, C, H, W], NCHW or channels_last.

    Returns:
        bool tensor [N, C, H, W].

    Raises:
        TypeError: if like is not a dense tensor or gate not a uint8 tensor.
        ValueError: if like does not have four dimensions or the gate has another shape.

    Examples:
        >>> gate_to_bool(torch.tensor([[[[5]]]], dtype=torch.uint8), torch.empty(1, 1, 1, 4))
        tensor([[[[ True, False,  True, False]]]])
    """
    check_tensors(gate=gate, like=like)
    if gate.dtype != torch.uint8:
        raise TypeError(f"gate must be uint8, got {gate.dtype}")
    expected = _shape_of_gate(like)
    if tuple(gate.shape) != expected:
        raise ValueError(f"gate must have shape {expected}, got {tuple(gate.shape)}")
    bits = gate[..., None] >> torch.arange(8, dtype=torch.uint8, device=gate.device) & 1
    passes = bits.bool().flatten(-2)[..., : _in_memory_order(like).shape[3]]
    return passes if layout_of(like) == torch.contiguous_format else passes.permute(0, 3, 1, 2)


def check_gate(gate: Tensor, like: Tensor) -> None:
    """Raises RuntimeError unless this is a gate of the tensor `like`, without gaps and on its device."""
    check_device("gate", gate, like)
    check_size("gate", gate, _shape_of_gate(like))
    fits = gate.dtype == torch.uint8 and gate.is_contiguous()
    check(fits, f"gate must be uint8 and contiguous, got {gate.dtype} with strides {list(gate.stride())}")


def _shape_of_gate(like: Tensor) -> tuple[int, ...]:
    if like.dim() != 4:
        raise ValueError(f"like must be [N, C, H, W], got shape {tuple(like.shape)}")
    sizes = _in_memory_order(like).shape
    return (*sizes[:3], -(-sizes[3] // 8))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A view whose last dimension is the innermost one in memory."""
    return tensor if layout_of(tensor) == torch.contiguous_format else tensor.permute(0, 2, 3, 1)
