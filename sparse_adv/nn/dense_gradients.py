"""Gradients of all weights of masked layers, also of those that the masks prune."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparse_adv.nn.masked_layer import MaskedLayer

GradWeight = Callable[[Tensor, Tensor], Tensor]
"""(input, gradient of the output) -> gradient of the weight, with and without kept weights."""
Receiver = Callable[[Tensor], None]
"""Called with the gradient of a whole weight in each backward pass."""

_collecting: WeakKeyDictionary[nn.Module, Receiver] = WeakKeyDictionary()
"""Maps each layer in a `dense_gradients` block to the function that receives its gradients. It is no attribute of the
layer, because the engine traces a model anew when attributes of its modules change."""


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A context in which backward passes also form the loss's gradients of pruned weights.

    It is for methods that let a mask grow where the gradient is large. In the block, masked layers compute
    their weight gradient with the dense kernel; the other passes stay as they are. `weight.grad` stays 0 where the mask
    is false.

    Args:
        model: any module.

    Returns:
        A context manager that yields a dict, which fills in backward passes of forward passes in the block: module name
        of a masked layer -> gradient of its whole weight, added up over all its calls. Passes under
        `nn.frozen_weights` and `torch.no_grad` add nothing.

    Examples:
        >>> from sparse_adv.nn import MaskedLinear
        >>> layer = MaskedLinear(2, 1, bias=False, mask=torch.tensor([[True, False]]))
        >>> with dense_gradients(nn.Sequential(layer)) as gradients:
        ...     layer(torch.tensor([3.0, 5.0])).sum().backward()
        >>> gradients["0"], layer.weight.grad
        (tensor([[3., 5.]]), tensor([[3., 0.]]))
    """
    gradients: dict[str, Tensor] = {}

    def receiver(name: str) -> Receiver:
        def receive(gradient: Tensor) -> None:
            gradients[name] = gradients[name] + gradient if name in gradients else gradient

        return receive

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MaskedLayer)}
    for name, layer in layers.items():
        _collecting[layer] = receiver(name)
    try:
        yield gradients
    finally:
        for layer in layers.values():
            _collecting.pop(layer, None)


def is_collecting(layer: nn.Module) -> bool:
    """Whether a forward pass of the layer now has to end with `with_dense_gradient`."""
    if torch.compiler.is_compiling() or not _collecting or not torch.is_grad_enabled():
        return False
    return layer in _collecting


def with_dense_gradient(layer: MaskedLayer, input: Tensor, output: Tensor, grad_weight: GradWeight) -> Tensor:
    """Return the output of a layer, computed with `weight.detach()`, with a backward pass to all of the weight.

    Args:
        layer: for which `is_collecting` holds.
        input, output: of its call.
        grad_weight: computes the gradient of the whole weight.
    """
    result: Tensor = _DenseGradient.apply(output, input, layer.weight, grad_weight, _collecting[layer])
    return result


class _DenseGradient(torch.autograd.Function):
    """The identity of the output, whose gradient also flows to the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        grad_weight: GradWeight,
        receive: Receiver,
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.dtype, ctx.grad_weight, ctx.receive = weight.dtype, grad_weight, receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        gradient = ctx.grad_weight(input.to(grad_output.dtype), grad_output).to(ctx.dtype)
        ctx.receive(gradient.detach())
        return grad_output, None, gradient, None, None
