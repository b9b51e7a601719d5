"""`masked_conv2d` and its gradients on CUDA: the dense convolution on a masked weight.

On tensor cores unstructured masks and small blocks cannot win: of 16 weights that are multiplied together, some survive
in 56 % of cases at density 0.05; and without tensor cores the break-even lies at 96 % of zeros. So these take cuDNN's
time, on a weight that is masked once per optimiser step where the caller holds it constant (`pack_pattern`), else once
per call: 9 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_adv.ops.layout import in_layout_of
from sparse_adv.ops.pattern import PATHS, Pattern, weight_is_masked


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    kept = _kept(weight, pattern)
    if scale is not None:
        kept = kept * scale[:, None, None, None]  # a pass over the weight instead of one over the output
    output = torch.conv2d(input, in_layout_of(input, kept), bias, stride, padding, dilation, groups)
    if residual is not None:
        output += residual
    return in_layout_of(input, output.relu_() if relu else output)


def masked_conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    pattern: Pattern,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    kept = in_layout_of(grad_output, _kept(weight, pattern))
    # Of the input only the size is read. The weight's layout, then, is what makes cuDNN take this one.
    input = grad_output.new_empty(1).expand(*input_size)
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    grad = torch.ops.aten.convolution_backward(grad_output, input, kept, None, *geometry, (True, False, False))[0]
    return in_layout_of(grad_output, grad)


def masked_conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    pattern: Pattern,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    mask = pattern[1]
    weight = input.new_empty(1).expand(mask.shape)
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    grad = torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, (False, True, False))[1]
    # Selected and not multiplied, as a pruned NaN or infinity counts as 0; in one pass into the layout that the op has.
    return torch.where(mask, grad, grad.new_zeros(()), out=torch.empty_like(mask, dtype=grad.dtype))


def chosen_paths(
    pattern: Pattern,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    return [PATHS.index("dense")] * 3


def _kept(weight: Tensor, pattern: Pattern) -> Tensor:
    return weight if weight_is_masked(pattern) else weight.where(pattern[1], 0)


_LIBRARY = torch.library.Library("sparse_adv", "IMPL")
for _function in (masked_conv2d, masked_conv2d_grad_input, masked_conv2d_grad_weight, chosen_paths):
    _LIBRARY.impl(_function.__name__, _function, "CUDA")
