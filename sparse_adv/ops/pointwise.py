"""`pointwise_out`: scale, bias, residual and ReLU or gate in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.ops.arguments import check_flag, check_tensors
from sparse_adv.ops.written import check_written, mark_written, returns_nothing


def pointwise_out(
    input: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
    gate: Tensor | None = None,
    out: Tensor,
    gate_out: Tensor | None = None,
) -> None:
    """Scale, shift, add and activate, into memory that the caller provides.

    Equivalent to::

        y = input * scale[:, None, None] + bias[:, None, None] + residual
        out = y.relu() if relu else y.where(gate_to_bool(gate, out), 0)

    where an operand that is None is left out. This is the epilogue of a convolution on its own: for example BatchNorm
    in eval mode with the operations after it or, with gate, the backward pass of a ReLU whose input has several
    gradients. As in PyTorch, NaN stays NaN, and the gradient of a ReLU passes where its output is NaN. 16-bit tensors
    are computed in float32 and rounded once. It is implemented on the CPU and not differentiable.

    Args:
        input: float tensor [N, C, H, W] in the layout of out.
        scale, bias: float tensors [C], or None.
        residual: float tensor [N, C, H, W] in the layout of out, or None.
        relu: whether to end with a ReLU.
        gate: uint8 tensor of the shape of `empty_gate(out)`, or None: makes the elements 0 whose bit is 0; not together
            with relu.
        out: float tensor [N, C, H, W], NCHW or channels_last without gaps, that is written; it may be input or
            residual.
        gate_out: uint8 tensor of the shape of `empty_gate(out)`, or None: receives the gate of the ReLU.

    Raises:
        TypeError: if an operand is not a dense tensor, or relu neither True nor False.
        ValueError: if devices differ, or a tensor requires grad and gradients are enabled.
        RuntimeError: if a shape, dtype or layout does not fit out, tensors overlap, or relu and the gates do
            not fit together.

    Source: this library's design page "Epilogues and gates".

    Examples:
        >>> from sparse_adv.ops import empty_gate
        >>> x, y = torch.tensor([-1.0, 2.0, 3.0]).view(1, 1, 1, 3), torch.empty(1, 1, 1, 3)
        >>> gate = empty_gate(y)
        >>> pointwise_out(x, bias=torch.tensor([-2.5]), relu=True, out=y, gate_out=gate)
        >>> y.flatten().tolist(), gate.flatten().tolist()
        ([0.0, 0.0, 0.5], [4])
    """
    operands = {"scale": scale, "bias": bias, "residual": residual, "gate": gate, "gate_out": gate_out}
    check_tensors(input=input)
    check_flag("relu", relu)
    check_written("pointwise_out", out, input=input, **operands)
    torch.ops.sparse_adv.pointwise_out(input, scale, bias, residual, relu, gate, out, gate_out)
    mark_written(out, gate_out)


returns_nothing("pointwise_out")
