"""`masked_conv2d` and its gradients on CUDA: Triton kernels over the live blocks, or cuDNN on a masked weight.

On tensor cores, unstructured masks and small blocks cannot be faster than cuDNN: of 16 weights that are multiplied
together, at least one is kept in 56 % of cases at density 0.05. Without tensor cores, the break-even is at 96 % zeros.
Such layers use cuDNN on a masked weight. With `pack_pattern` the weight is masked once per optimiser step, else once
per call, which moves 9 bytes per weight. Blocks of 32 or 64 channels run in the Triton kernels wherever
`masked_conv2d_roofline` expects a gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from sparse_adv.kernels.layout import empty_in_layout_of, in_layout_of, layout_of
from sparse_adv.ops._library import IMPLEMENTATIONS
from sparse_adv.ops.masked_conv2d_pattern import BlockPattern, Pattern, unflatten
from sparse_adv.ops.masked_conv2d_plan import missing_kernel, plan_on_cuda


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    pattern = unflatten(tensors)
    if runs_blocks(pattern, "forward", input.shape, input.dtype, stride, padding, dilation):
        from sparse_adv.kernels import masked_conv2d as kernels

        values = _block_values(pattern, weight)
        strides, fused = (stride, padding, dilation), (scale, residual, relu)
        return kernels.forward(
            input, values, pattern.blocks, pattern.rows, weight.shape, bias, *strides, *fused, precision()
        )
    masked = _masked(weight, pattern, layout_of(input))
    if scale is not None:
        masked = masked * scale[:, None, None, None]  # a pass over the weight instead of one over the output
    output = torch.conv2d(input, masked, bias, stride, padding, dilation, groups)
    if not len(output):
        output = output.clone()  # without images it is a view, which autograd lets nobody write to
    if residual is not None:
        output += residual
    return in_layout_of(input, output.relu_() if relu else output)


def masked_conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    tensors: list[Tensor],
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    pattern = unflatten(tensors)
    if runs_blocks(pattern, "grad_input", input_size, grad_output.dtype, stride, padding, dilation):
        from sparse_adv.kernels import masked_conv2d as kernels
        from sparse_adv.kernels.masked_conv2d_phases import select_phases

        values, blocks, strides = _block_values(pattern, weight), pattern.blocks, (stride, padding, dilation)
        lists = select_phases(blocks, pattern.grad_rows, pattern.grad_order, *strides)
        return kernels.grad_input(grad_output, values, blocks, *lists, input_size, *strides, precision=precision())
    masked = _masked(weight, pattern, layout_of(grad_output))
    # cuDNN reads only the input's size and layout, and copies grad_output if its layout differs.
    input = empty_in_layout_of(grad_output, input_size)
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    grad = torch.ops.aten.convolution_backward(grad_output, input, masked, None, *geometry, (True, False, False))[0]
    return in_layout_of(grad_output, grad)


def masked_conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    tensors: list[Tensor],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    pattern = unflatten(tensors)
    mask = pattern.mask
    if runs_blocks(pattern, "grad_weight", input.shape, input.dtype, stride, padding, dilation):
        from sparse_adv.kernels import masked_conv2d_grad_weight as kernels

        block, strides = pattern.block[:2], (stride, padding, dilation)
        return kernels.grad_weight(grad_output, input, pattern.blocks, block, mask.shape, *strides, groups, precision())
    weight = input.new_empty(1).expand(mask.shape)
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    grad = torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, (False, True, False))[1]
    # `where`, not a product: a pruned NaN or infinity must count as 0. `out` has the op's layout: no copy is needed.
    return torch.where(mask, grad, grad.new_zeros(()), out=empty_in_layout_of(input, mask.shape))


def pack_values(weight: Tensor, tensors: list[Tensor], scale: Tensor | None = None) -> list[Tensor]:
    """The values of the live blocks [n, bo, bi], in the order of the blocks; an empty list if no kernel reads them."""
    pattern = unflatten(tensors)
    if missing_kernel(pattern, weight.dtype, "cuda") or not isinstance(pattern, BlockPattern):
        return []
    return [_packed(pattern, weight, scale)]


def runs_blocks(
    pattern: Pattern,
    pass_: str,
    input_size: Sequence[int],
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> TypeGuard[BlockPattern]:
    return plan_on_cuda(pattern, pass_, input_size, dtype, stride, padding, dilation).kernel == "sparse"


def _block_values(pattern: BlockPattern, weight: Tensor) -> Tensor:
    """The packed values; `pack_pattern` may already have added them in this dtype."""
    if pattern.values is not None and pattern.weight_is_masked and pattern.values.dtype == weight.dtype:
        return pattern.values
    return _packed(pattern, weight)


def _packed(pattern: BlockPattern, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    from sparse_adv.kernels import masked_conv2d_pack as kernels

    scale = None if scale is None else scale.contiguous()
    return kernels.pack(weight, pattern.blocks, pattern.block[:2], pattern.groups, weight.dtype, scale)


def _masked(weight: Tensor, pattern: Pattern, layout: torch.memory_format) -> Tensor:
    """The masked weight, written directly in this layout: a copy would take a second pass over the weight."""
    if pattern.weight_is_masked:
        return weight.contiguous(memory_format=layout)
    out = torch.empty_like(weight, memory_format=layout)
    return torch.where(pattern.mask, weight, weight.new_zeros(()), out=out)


def precision() -> str:
    """The precision of products of float32 blocks: that of PyTorch's convolutions, but always on tensor cores."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "tf32x3"  # type: ignore[attr-defined]


for _function in (masked_conv2d, masked_conv2d_grad_input, masked_conv2d_grad_weight, pack_values):
    IMPLEMENTATIONS.impl(_function.__name__, _function, "CUDA")
