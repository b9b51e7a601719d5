"""The work of masked convolutions for PyTorch's `FlopCounterMode`: two operations per kept weight and output pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_adv.ops._library import host

_OPS = torch.ops.sparse_adv


def _operations(pattern: Sequence[Tensor], output: Tensor) -> int:
    """2 * kept weights * N OH OW, for any kernel; each of the gradients of input and weight takes as many."""
    batch, _, height, width = output.shape
    return 2 * int(pattern[0][host.header_fields["kept"]]) * batch * height * width


@register_flop_formula(_OPS.masked_conv2d, get_raw=True)
def _forward(input: Tensor, weight: Tensor, pattern: Sequence[Tensor], *args: Any, out_val: Tensor, **_: Any) -> int:
    return _operations(pattern, out_val)


@register_flop_formula(_OPS.masked_conv2d_out, get_raw=True)
def _forward_out(input: Tensor, weight: Tensor, pattern: Sequence[Tensor], *args: Any, **_: Any) -> int:
    return _operations(pattern, args[-2])  # out, before gate_out


@register_flop_formula(
    [_OPS.masked_conv2d_grad_input, _OPS.masked_conv2d_grad_input_out, _OPS.masked_conv2d_grad_weight], get_raw=True
)
def _backward(grad_output: Tensor, other: Tensor, pattern: Sequence[Tensor], *args: Any, **_: Any) -> int:
    return _operations(pattern, grad_output)
