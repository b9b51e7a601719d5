"""The epilogue of a convolution on its own, in Triton: scale, bias, residual and a ReLU or a gate in one pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.layout import layout_of

_BLOCK = 2048


def pointwise(
    input: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    gate: Tensor | None = None,
) -> Tensor:
    """act(scale[c] * input + bias[c] + residual), where act is a ReLU, a gate or nothing; in float32 or float64.

    Args:
        input: float tensor [N, C, ...], contiguous or channels_last.
        scale, bias: float tensors [C], or None.
        residual: float tensor of the input's shape and layout, or None.
        relu: whether to end with a ReLU.
        gate: float tensor of the input's shape and layout, or None: the result is 0 where it is not positive.

    Raises:
        ValueError: if a tensor has another shape or layout.
    """
    layout = layout_of(input)
    for name, operand in {"input": input, "residual": residual, "gate": gate}.items():
        # Strides of dimensions of size 1 may differ, so they cannot be compared.
        if operand is not None and not (operand.shape == input.shape and operand.is_contiguous(memory_format=layout)):
            raise ValueError(f"{name} must be {str(layout)[6:]} and have the input's shape {tuple(input.shape)}")
    output = torch.empty_like(input)
    inner = 1 if layout == torch.channels_last else math.prod(input.shape[2:])  # elements of one channel in a row
    with torch.cuda.device_of(input):
        pointwise_kernel[(triton.cdiv(input.numel(), _BLOCK),)](
            input, scale, bias, residual, gate, output, input.numel(), input.shape[1], inner, RELU=relu, BLOCK=_BLOCK
        )
    return output


@triton.jit
def pointwise_kernel(
    input,  # [elements]
    scale,  # [channels] or None, and so is bias
    bias,
    residual,  # as input, or None, and so is gate
    gate,
    output,  # [elements]
    elements,
    channels,
    inner,  # elements of one channel in a row
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of consecutive elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < elements
    accumulate: tl.constexpr = tl.float64 if output.dtype.element_ty == tl.float64 else tl.float32
    y = tl.load(input + i, mask=mask).to(accumulate)
    if scale is not None or bias is not None:
        channel = (i // inner) % channels
        if scale is not None:
            y *= tl.load(scale + channel, mask=mask).to(accumulate)
        if bias is not None:
            y += tl.load(bias + channel, mask=mask).to(accumulate)
    if residual is not None:
        y += tl.load(residual + i, mask=mask).to(accumulate)
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    if gate is not None:
        y = tl.where(tl.load(gate + i, mask=mask) <= 0, 0.0, y)
    tl.store(output + i, y.to(output.dtype.element_ty), mask=mask)
