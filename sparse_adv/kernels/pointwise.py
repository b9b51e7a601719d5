"""The epilogue of a convolution on its own, in Triton: scale, bias, residual and a ReLU or a gate in one pass."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.gate_tiles import packed, unpacked
from sparse_adv.kernels.layout import WIDE_FROM, layout_of
from sparse_adv.kernels.tensor_checks import check_bits

_BLOCK = 2048  # elements of a program: not tuned


def pointwise(
    input: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    gate: Tensor | None = None,
    gate_out: Tensor | None = None,
) -> Tensor:
    """act(scale[c] * input + bias[c] + residual), where act is a ReLU, a gate or nothing; in float32 or float64.

    Args:
        input: float tensor [N, C, ...], contiguous or channels_last.
        scale, bias: float tensors [C], or None.
        residual: float tensor of the input's shape and layout, or None.
        relu: whether to end with a ReLU.
        gate: float tensor of the input's shape and layout (the result is 0 where it is not positive), or uint8 tensor
            laid out as in `ops.empty_gate` (the result is 0 where the bit is 0), or None.
        gate_out: uint8 tensor that receives the gate of the ReLU, or None.

    Raises:
        ValueError: if a tensor has another shape or layout.
        RuntimeError: if a gate of bits does not fit the input, which must be channels_last with a multiple of 8
            channels.
    """
    layout = layout_of(input)
    values = {"input": input, "residual": residual, "gate": gate}
    for name, bits in {"gate": gate, "gate_out": gate_out}.items():
        if bits is not None and bits.dtype == torch.uint8:
            check_bits(name, bits, input)
            values.pop(name, None)
    for name, operand in values.items():
        # Strides of dimensions of size 1 may differ, so they cannot be compared.
        if operand is not None and not (operand.shape == input.shape and operand.is_contiguous(memory_format=layout)):
            raise ValueError(f"{name} must be {str(layout)[6:]} and have the input's shape {tuple(input.shape)}")
    output = torch.empty_like(input)
    inner = 1 if layout == torch.channels_last else math.prod(input.shape[2:])  # elements of one channel in a row
    with torch.cuda.device_of(input):
        pointwise_kernel[(triton.cdiv(input.numel(), _BLOCK),)](
            *(input, scale, bias, residual, gate, gate_out, output, input.numel(), input.shape[1], inner),
            RELU=relu,
            WIDE=input.numel() + _BLOCK >= WIDE_FROM,
            BLOCK=_BLOCK,
        )
    return output


@triton.jit
def pointwise_kernel(
    input,  # [elements]
    scale,  # [channels] or None, and so is bias
    bias,
    residual,  # as input, or None
    gate,  # as input, or a bit for each element, or None
    gate_out,  # a bit for each element, or None
    output,  # [elements]
    elements,
    channels,
    inner,  # elements of one channel in a row
    RELU: tl.constexpr,
    WIDE: tl.constexpr,  # whether 64 bits number the elements; to divide those takes longer than to load them
    BLOCK: tl.constexpr,
):
    """A block of consecutive elements."""
    program = tl.program_id(0).to(tl.int64 if WIDE else tl.int32)
    i = program * BLOCK + tl.arange(0, BLOCK)
    mask = i < elements
    byte = program * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
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
        if gate.dtype.element_ty == tl.uint8:
            bytes = tl.load(gate + byte, mask=byte * 8 < elements, other=0)
            passes = tl.reshape(unpacked(tl.reshape(bytes, [BLOCK // 8, 1]), True, BLOCK // 8, 8), [BLOCK])
            y = tl.where(passes, y, 0.0)
        else:
            y = tl.where(tl.load(gate + i, mask=mask) <= 0, 0.0, y)
    result = y.to(output.dtype.element_ty)
    if gate_out is not None:
        passes = tl.reshape((result > 0) | (result != result), [BLOCK // 8, 8])  # NaN passes
        bytes = tl.reshape(packed(passes, True, BLOCK // 8, 8), [BLOCK // 8])
        tl.store(gate_out + byte, bytes.to(tl.uint8), mask=byte * 8 < elements)
    tl.store(output + i, result, mask=mask)
