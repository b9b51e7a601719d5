"""`batch_norm_act` and its gradient on CUDA: checks, and the memory that the Triton kernels write."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.kernels.layout import in_layout_of, output_like
from sparse_adv.kernels.tensor_checks import check, check_dtype, check_floating, check_size
from sparse_adv.ops._library import IMPLEMENTATIONS, has_triton
from sparse_adv.ops.gate import check_gate, empty_gate


def batch_norm_act(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_input(input, weight, bias)
    out = output_like(input)
    if residual is not None:
        _check_like(input, "residual", residual)
        residual = in_layout_of(out, residual)
    mean, var = _vectors_like(input)
    gate = empty_gate(out) if relu else out.new_empty(0, dtype=torch.uint8)
    if out.numel():
        from sparse_adv.kernels import batch_norm_act as kernels

        weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
        input = in_layout_of(out, input)
        kernels.forward(input, residual, weight, bias, eps, out, mean, var, gate if relu else None)
    return out, mean, var, gate


def batch_norm_act_grad(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    eps: float,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_input(input, weight, None)
    _check_like(input, "grad_output", grad_output)
    grad_input = output_like(input)
    if gate is not None:
        check_gate(gate, grad_input)
    grad_weight, grad_bias = _vectors_like(input)
    for name, vector in {"mean": mean, "var": var}.items():
        check_floating(name, vector, input)
        check_size(name, vector, input.shape[1:2])
        check_dtype(name, vector, grad_weight.dtype)
    grad_residual = torch.empty_like(grad_input) if needs_residual else grad_input.new_empty(0)
    if grad_input.numel():
        from sparse_adv.kernels import batch_norm_act as kernels

        grad_output, input = in_layout_of(grad_input, grad_output), in_layout_of(grad_input, input)
        weight = None if weight is None else weight.contiguous()
        operands = grad_output, input, weight, mean.contiguous(), var.contiguous(), gate, eps
        kernels.backward(*operands, grad_input, grad_weight, grad_bias, grad_residual if needs_residual else None)
    return grad_input, grad_weight, grad_bias, grad_residual


def _check_input(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check(has_triton(), "batch_norm_act on CUDA needs Triton, which cannot be imported")
    check(input.dim() == 4, f"input must have 4 dimensions, got {input.dim()}")
    check_floating("input", input, input)
    for name, vector in {"weight": weight, "bias": bias}.items():
        if vector is not None:
            check_size(name, vector, input.shape[1:2])
            check_floating(name, vector, input)


def _check_like(input: Tensor, name: str, tensor: Tensor) -> None:
    check_floating(name, tensor, input)
    check_size(name, tensor, input.shape)
    check_dtype(name, tensor, input.dtype)


def _vectors_like(input: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors [C] in the dtype of the arithmetic; zeros for an empty batch."""
    make = torch.empty if input.numel() else torch.zeros
    dtype = torch.promote_types(input.dtype, torch.float32)
    first, second = (make(input.shape[1], dtype=dtype, device=input.device) for _ in range(2))
    return first, second


for _function in (batch_norm_act, batch_norm_act_grad):
    IMPLEMENTATIONS.impl(_function.__name__, _function, "CUDA")
