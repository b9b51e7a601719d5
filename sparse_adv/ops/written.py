"""What the ops that write into their arguments have in common."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_gradients(function: str, **tensors: Tensor | None) -> None:
    """Raises ValueError if gradients are enabled and a tensor requires one, as the function is not differentiable."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, and {function} is not differentiable: call it under torch.no_grad()"
            )


def mark_written(*tensors: Tensor | None) -> None:
    """Increment the versions of tensors that an op has written.

    An op from outside PyTorch must do this itself, or a backward pass that saved one of them would not notice that its
    values have changed.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
