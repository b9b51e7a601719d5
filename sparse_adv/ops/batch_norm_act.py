"""`batch_norm_act`: BatchNorm with the statistics of the batch, residual and ReLU in two passes over memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_adv.kernels.layout import output_like
from sparse_adv.kernels.tensor_checks import FLOATING
from sparse_adv.ops import reference
from sparse_adv.ops.arguments import check_flag, check_number, check_tensors, overlaps_itself
from sparse_adv.ops.autograd import Saved, register_autograd
from sparse_adv.ops.gate import empty_gate, gate_to_bool
from sparse_adv.ops.transforms import is_transformed


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise with the statistics of the batch, add a residual and apply a ReLU.

    Equivalent to::

        y = F.batch_norm(input, running_mean, running_var, weight, bias, training=True, momentum=momentum, eps=eps)
        y = (y + residual).relu()

    where the residual is left out if it is None, and the ReLU unless relu is True. An estimate of the mean is first
    subtracted from each element. Sums of at most a few hundred elements (256 on CUDA, then pairwise) are then added in
    float64, in the same order for any number of threads. Instead of the ReLU's output, one bit per element is kept for
    the backward pass; on a CPU, forward and backward read each tensor of NCHW images from memory once. It is
    implemented on the CPU and, with Triton, on CUDA. It is differentiable any number of times; second derivatives are
    computed in plain PyTorch. Under `torch.func` and forward-mode AD, plain PyTorch computes the formula above.

    Args:
        input: float tensor [N, C, H, W]; 16-bit images are computed in float32.
        weight, bias: float tensors [C], or None for 1 and 0.
        running_mean, running_var: float tensors [C] that are updated as BatchNorm does, or None.
        residual: float tensor like input, or None.
        relu: whether to end with a ReLU.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        float tensor like input, NCHW or channels_last as the input is.

    Raises:
        TypeError: if an operand is not a dense tensor, or an option has a wrong type.
        ValueError: if a channel has only one value (a single value has no variance), if running statistics do not fit
            the input or require grad, or if eps is not positive.
        RuntimeError: if a shape or dtype does not fit the input.

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithms 1 and 2.

    Examples:
        >>> x = torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 1, 3)
        >>> [round(value, 3) for value in batch_norm_act(x, relu=True).flatten().tolist()]
        [0.0, 0.0, 1.225]
        >>> [round(value, 3) for value in batch_norm_act(x, residual=x).flatten().tolist()]
        [-0.225, 3.0, 6.225]
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check_arguments(input, residual, {name: vector for name, vector in vectors.items() if vector is not None})
    check_flag("relu", relu)
    for name, number in {"momentum": momentum, "eps": eps}.items():
        check_number(name, number)
    momentum, eps = float(momentum), float(eps)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    count = math.prod(input.shape) // max(1, input.shape[1]) if input.dim() == 4 else 0
    if count == 1:
        raise ValueError(f"input must have more than one value per channel, got shape {tuple(input.shape)}")
    if is_transformed():
        statistics = (running_mean, running_var)
        return reference.batch_norm_act(
            input, weight, bias, *statistics, residual=residual, relu=relu, momentum=momentum, eps=eps
        )
    out, mean, var, _ = torch.ops.sparse_adv.batch_norm_act(input, residual, weight, bias, eps, relu)
    if count:
        update_running_statistics([Statistics(running_mean, running_var, momentum, mean, var, count)])
    return out


class Statistics(NamedTuple):
    """A layer's running statistics, and the statistics of the batch that updates them."""

    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    mean: Tensor
    """Mean of each channel in the batch."""
    var: Tensor
    """Biased variance of each channel in the batch."""
    values: int
    """Number of values of each channel in the batch, at least 2."""


@torch.no_grad()
def update_running_statistics(layers: Iterable[Statistics]) -> None:
    """Update the running statistics of several layers, in three calls for all of them together.

    running = (1 - momentum) * running + momentum * (mean, or the unbiased variance).
    """
    running, found, kept, shares = [], [], [], []
    for layer in layers:
        unbiased = layer.values / (layer.values - 1)
        for old, new, factor in ((layer.running_mean, layer.mean, 1.0), (layer.running_var, layer.var, unbiased)):
            if old is not None:
                running.append(old)
                found.append(new)
                kept.append(1 - layer.momentum)
                shares.append(layer.momentum * factor)
    if running:
        torch._foreach_mul_(running, kept)
        torch._foreach_add_(running, torch._foreach_mul(found, shares))


def _check_arguments(input: Tensor, residual: Tensor | None, vectors: dict[str, Tensor]) -> None:
    """Check types, devices and the running statistics, which the op never sees; the op checks the rest."""
    others = vectors if residual is None else vectors | {"residual": residual}
    check_tensors(input=input, **others)
    for name, tensor in others.items():
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, input on {input.device}")
    for name in ("running_mean", "running_var"):
        if name not in vectors:
            continue
        if vectors[name].dtype not in FLOATING or vectors[name].shape != input.shape[1:2]:
            raise ValueError(
                f"{name} must be floating of 16 bits or more, of shape {list(input.shape[1:2])}, got "
                f"{vectors[name].dtype} of shape {tuple(vectors[name].shape)}"
            )
        if vectors[name].requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} is written, and requires grad: detach it first")
        if not torch.compiler.is_compiling() and overlaps_itself(vectors[name]):
            raise ValueError(
                f"{name} is written: its elements must not share memory, got strides {vectors[name].stride()}"
            )


def _statistics_like(input: Tensor) -> Tensor:
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty(input.shape[1], dtype=dtype)


@torch.library.register_fake("sparse_adv::batch_norm_act")
def _(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = output_like(input)
    gate = empty_gate(out) if relu else input.new_empty(0, dtype=torch.uint8)
    return out, _statistics_like(input), _statistics_like(input), gate


@torch.library.register_fake("sparse_adv::batch_norm_act_grad")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    eps: float,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input = output_like(input)
    grad_residual = output_like(input) if needs_residual else input.new_empty(0)
    return grad_input, torch.empty_like(mean), torch.empty_like(mean), grad_residual


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, _, weight, bias, ctx.eps, relu = inputs
    _, mean, var, gate = output
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
    ctx.save_for_backward(input, weight, mean, var, gate if relu else None)
    ctx.mark_non_differentiable(mean, var, gate)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, saved: Saved, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    input, weight, mean, var, gate = saved
    _, needs_residual, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    gated = needs_residual and gate is not None
    of_input, of_weight, of_bias, of_residual = torch.ops.sparse_adv.batch_norm_act_grad(
        grad, input, weight, mean, var, gate, ctx.eps, gated
    )
    weight_dtype, bias_dtype = ctx.dtypes
    return (
        of_input,
        (of_residual if gated else grad) if needs_residual else None,
        of_weight.to(weight_dtype) if needs_weight else None,
        of_bias.to(bias_dtype) if needs_bias else None,
        None,
        None,
    )


def _setup_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, input, weight, mean, _, gate, ctx.eps, ctx.needs_residual = inputs
    ctx.dtype = mean.dtype
    ctx.save_for_backward(grad, input, weight, gate)


def _backward_grad(ctx: Any, saved: Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad, input, weight, gate = saved
    passes = None if gate is None else gate_to_bool(gate, input)
    factor = input.new_ones(input.shape[1]) if weight is None else weight
    outputs = 4 if ctx.needs_residual else 3

    def gradients(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return _gradients(grad, input, weight, passes, ctx.eps)[:outputs]

    _, pull_back, *_ = torch.func.vjp(gradients, *(tensor.to(ctx.dtype) for tensor in (grad, input, factor)))
    of_grad, of_input, of_weight = pull_back(tuple(tensor.to(ctx.dtype) for tensor in grads[:outputs]))
    of_weight = None if weight is None else of_weight.to(weight.dtype)
    return of_grad.to(grad.dtype), of_input.to(input.dtype), of_weight, None, None, None, None, None


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor, passes: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `batch_norm_act_grad` computes, as a formula in the operands alone.

    The statistics are computed again: those given to the op depend on the input, but autograd does not know how.

    Source: Ioffe and Szegedy 2015, "Batch Normalization", the gradients in section 3, simplified.
    """
    var, mean = torch.var_mean(input, (0, 2, 3), correction=0, keepdim=True)
    scale = (var + eps).rsqrt()
    normalized = (input - mean) * scale
    if passes is not None:
        grad = torch.where(passes, grad, 0)
    of_bias = grad.sum((0, 2, 3), keepdim=True)
    of_weight = (grad * normalized).sum((0, 2, 3), keepdim=True)
    count = input.numel() // input.shape[1]
    of_input = weight[:, None, None] * scale * (grad - (of_bias + normalized * of_weight) / count)
    return of_input, of_weight.flatten(), of_bias.flatten(), grad


register_autograd("batch_norm_act", _backward, _setup)
register_autograd("batch_norm_act_grad", _backward_grad, _setup_grad, uses_autograd=True)
