"""Shared by the ops that write into their arguments: checks, version counts and fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.ops.arguments import check_tensors
from sparse_adv.ops.transforms import is_transformed


def returns_nothing(*ops: str) -> None:
    """Register fake kernels that do nothing, for ops that only write into their arguments."""
    for op in ops:
        torch.library.register_fake(f"sparse_adv::{op}", lambda *_: None)


def check_written(function: str, out: Tensor, **operands: Tensor | None) -> None:
    """Check the operands of an op that writes into out, including meta tensors, which the native op never sees.

    Raises:
        TypeError: if one of them is not a tensor.
        ValueError: if an operand is on another device than out, one requires grad while gradients are enabled, or a
            transform of PyTorch is in force.
    """
    if is_transformed():
        raise ValueError(f"{function} writes into out: it cannot run under torch.func or forward-mode AD")
    given = {name: tensor for name, tensor in operands.items() if tensor is not None}
    check_tensors(out=out, **given)
    for name, tensor in {"out": out, **given}.items():
        if tensor.device != out.device:
            raise ValueError(f"{name} is on {tensor.device}, out on {out.device}")
        if not torch.compiler.is_compiling() and tensor.is_neg():
            raise ValueError(f"{name} is a negated view: call torch.resolve_neg({name}) first")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad: {function} is not differentiable, call it under torch.no_grad()")


def mark_written(*tensors: Tensor | None) -> None:
    """Increment the versions of tensors that an op has written.

    An op from outside PyTorch must do this itself. Otherwise a backward pass that saved one of the tensors would not
    notice that its values have changed.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
