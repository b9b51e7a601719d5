"""`masked_conv2d` and its gradient with respect to the input, written into memory that the caller provides.

Both have the same epilogue, out = act(sum + bias + residual). So a whole network runs, in both directions, as a list of
such calls into buffers that are allocated once. In the forward pass act is the ReLU, and writes one bit per element
(`gate.py`). In the backward pass, the gradient of a ReLU's input is stored in place of its output's: the call that
computes the last part of it adds the other parts as `residual` and applies the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.ops.arguments import Pair, check_flag, check_integer, check_tensors
from sparse_adv.ops.conv_geometry import read_geometry
from sparse_adv.ops.masked_conv2d_pattern import Pattern, check_pattern
from sparse_adv.ops.written import check_written, mark_written, returns_nothing


def masked_conv2d_out(
    input: Tensor,
    weight: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor,
    gate_out: Tensor | None = None,
) -> None:
    """Convolve as `masked_conv2d` does, into memory that the caller provides.

    Equivalent to::

        geometry = (stride, padding, dilation, groups)
        out = masked_conv2d(input, weight, pattern, bias, *geometry, residual=residual, relu=relu)

    with the same bits. The sparse kernels write to out directly, and with a packed pattern (`pack_pattern`) allocate
    nothing of the size of the images; the dense convolution goes through a temporary tensor. It is implemented on the
    CPU and not differentiable.

    Args:
        input: float tensor [N, C, H, W], NCHW or channels_last.
        weight, pattern, bias, stride, padding, dilation, groups: as for `masked_conv2d`.
        residual: float tensor [N, K, P, Q] in the layout of out, or None: added before the ReLU; it may be out.
        relu: whether to end with a ReLU.
        out: float tensor [N, K, P, Q] in the layout of the input, without gaps, that is written.
        gate_out: uint8 tensor of the shape of `empty_gate(out)`, or None: receives the gate of the ReLU. A bit is 1
            where the output is above 0 or NaN, as `torch.ops.aten.threshold_backward` passes the gradient there.

    Raises:
        TypeError: if the pattern is not a `Pattern`, an operand not a dense tensor, groups not an integer, or relu
            neither True nor False.
        ValueError: if stride, padding or dilation is invalid, devices differ, or a tensor requires grad and gradients
            are enabled.
        RuntimeError: if shapes, dtypes or layouts do not fit together, the pattern belongs to another weight,
            tensors overlap, or there is a gate_out without ReLU.

    Source: this library's design page "masked_conv2d" has the algorithm, "Epilogues and gates" the epilogue.

    Examples:
        >>> from sparse_adv import ops
        >>> weight = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
        >>> pattern, out = ops.compile_pattern(weight != 0), torch.empty(1, 1, 1, 3)
        >>> gate = ops.empty_gate(out)
        >>> input = torch.tensor([-1.0, 0.5, 1.0]).expand(1, 2, 1, 3).contiguous()
        >>> masked_conv2d_out(input, weight, pattern, relu=True, out=out, gate_out=gate)
        >>> out.flatten().tolist(), ops.gate_to_bool(gate, out).flatten().tolist()
        ([0.0, 1.0, 2.0], [False, True, True])
    """
    check_pattern(pattern)
    check_integer("groups", groups)
    check_tensors(input=input, weight=weight)
    check_flag("relu", relu)
    geometry = read_geometry(pattern.mask.shape[2:], stride, padding, dilation)
    operands = {"input": input, "weight": weight, "bias": bias, "residual": residual}
    check_written("masked_conv2d_out", out, **operands, gate_out=gate_out)
    torch.ops.sparse_adv.masked_conv2d_out(
        input, weight, pattern.flatten(), bias, *geometry, groups, residual, relu, out, gate_out
    )
    mark_written(out, gate_out)


def masked_conv2d_grad_input_out(
    grad_output: Tensor,
    weight: Tensor,
    pattern: Pattern,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor,
) -> None:
    """The gradient of `masked_conv2d` with respect to its input, added to others and gated, into given memory.

    Equivalent to::

        sum = conv2d_input(out.shape, weight * mask, grad_output, stride, padding, dilation, groups) + residual
        out = sum.where(gate_to_bool(gate, out), 0)

    If the input is the output of a ReLU with this gate, out is the gradient of that ReLU's input. As in
    `masked_conv2d_out`, the sparse kernels write to out directly. It is implemented on the CPU and not differentiable.

    Args:
        grad_output: float tensor [N, K, P, Q], NCHW or channels_last.
        weight, pattern, stride, padding, dilation, groups: as for `masked_conv2d`.
        residual: float tensor [N, C, H, W] in the layout of out, or None: the gradient that other uses of the input
            contribute; it may be out.
        gate: uint8 tensor of the shape of `empty_gate(out)`, or None: makes the elements 0 whose bit is 0.
        out: float tensor [N, C, H, W] in the layout of grad_output, without gaps, that is written; it has the size of
            the convolution's input.

    Raises:
        TypeError: if the pattern is not a `Pattern`, an operand not a dense tensor, or groups not an integer.
        ValueError: if stride, padding or dilation is invalid, devices differ, or a tensor requires grad and gradients
            are enabled.
        RuntimeError: if shapes, dtypes or layouts do not fit together, the pattern belongs to another weight,
            or tensors overlap.

    Source: this library's design page "masked_conv2d" has the algorithm, "Epilogues and gates" the epilogue.

    Examples:
        >>> from sparse_adv import ops
        >>> weight = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
        >>> pattern, out = ops.compile_pattern(weight != 0), torch.empty(1, 2, 1, 3)
        >>> gate = torch.tensor([5, 7], dtype=torch.uint8).view(1, 2, 1, 1)
        >>> masked_conv2d_grad_input_out(torch.ones(1, 1, 1, 3), weight, pattern, gate=gate, out=out)
        >>> out
        tensor([[[[2., 0., 2.]],
        <BLANKLINE>
                 [[0., 0., 0.]]]])
    """
    check_pattern(pattern)
    check_integer("groups", groups)
    check_tensors(grad_output=grad_output, weight=weight)
    geometry = read_geometry(pattern.mask.shape[2:], stride, padding, dilation)
    operands = {"grad_output": grad_output, "weight": weight, "residual": residual, "gate": gate}
    check_written("masked_conv2d_grad_input_out", out, **operands)
    torch.ops.sparse_adv.masked_conv2d_grad_input_out(
        grad_output, weight, pattern.flatten(), *geometry, groups, residual, gate, out
    )
    mark_written(out)


returns_nothing("masked_conv2d_out", "masked_conv2d_grad_input_out")
