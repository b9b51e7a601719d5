"""Gradients of all weights of masked layers, including those that the masks prune."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from sparse_adv.argument_types import checks_types
from sparse_adv.nn.masked_layer import MaskedLayer, masked_layers
from sparse_adv.ops import Pattern, masked_conv2d
from sparse_adv.ops.masked_conv2d_autocast import dtype_under_autocast
from sparse_adv.ops.transforms import is_transformed

Receiver = Callable[[Tensor], None]
"""Called with the gradient of a whole weight in each backward pass."""
Convolution = tuple[Any, ...]
"""Stride, padding, dilation, groups."""

_receivers: WeakKeyDictionary[nn.Module, list[Receiver]] = WeakKeyDictionary()
"""Maps each layer to the functions that receive its gradients, one for each `dense_gradients` block around it. This is
no attribute of the layer, because an update is captured anew when attributes of its modules change."""
_uncompiled = ExitStack()
"""Entered by the first block, closed by the last. Meanwhile models run uncompiled, as compiled code sees no block."""
_lock = Lock()
"""For the two above and for adding gradients: several threads may have blocks and backward passes."""


@checks_types
@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A context in which backward passes also compute the gradients of pruned weights.

    It is for methods that let a mask grow where the gradient is large. In the block, masked layers compute their weight
    gradient with the dense kernel; the other passes stay as they are. `weight.grad` stays 0 where the mask is false.
    With `create_graph=True` the dense kernel also computes the gradient of the input, so that there are second
    derivatives by pruned weights. Forward passes of compiled models run uncompiled.

    Args:
        model: any module.

    Returns:
        A context manager that yields a dict: module name of a masked layer -> gradient of its whole weight, added up
        over all its calls. Backward passes fill it if their forward pass was in the block, in any thread and in inner
        blocks too. Passes under `nn.frozen_weights`, `torch.no_grad` and `torch.func` add nothing, nor do layers whose
        weight requires no gradient. With `torch.utils.checkpoint` the backward pass must also be in the block.

    Source: growing by gradient is that of Evci et al., "Rigging the lottery" (ICML 2020), section 3.

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
            with _lock:
                gradients[name] = gradients[name] + gradient if name in gradients else gradient

        return receive

    layers = {layer: receiver(name) for name, layer in masked_layers(model).items()}
    with _lock:
        if not any(_receivers.values()):
            _uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
        for layer, receive in layers.items():
            _receivers.setdefault(layer, []).append(receive)
    try:
        yield gradients
    finally:
        with _lock:
            for layer, receive in layers.items():
                _receivers[layer].remove(receive)
            if not any(_receivers.values()):
                _uncompiled.close()


def is_collecting(layer: MaskedLayer) -> bool:
    """Whether a forward pass of the layer must now take its weight from `with_dense_gradient`."""
    if torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled():
        return False
    return bool(_receivers.get(layer)) and layer.weight.requires_grad


def with_dense_gradient(layer: MaskedLayer, weight: Tensor) -> Tensor:
    """Return the layer's masked weight as a function of its Parameter, so that the receivers will get its gradients.

    Args:
        layer: one that `is_collecting`.
        weight: 0 where the mask is false. Its consumers must compute the gradients of all its elements.
    """
    receivers = tuple(_receivers[layer])

    def observe(gradient: Tensor) -> None:
        for receive in receivers:
            receive(gradient.detach())

    weight.register_hook(observe)
    return weight


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern, convolution: Convolution) -> Tensor:
    """`masked_conv2d` of a weight that is 0 where the mask is false, with the gradient of all its elements."""
    operands = (None if tensor is None else tensor.to(dtype_under_autocast(tensor)) for tensor in (input, weight, bias))
    result: Tensor = _Convolution.apply(*operands, pattern, convolution)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern, convolution: Convolution
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.pattern, ctx.convolution = pattern, convolution
        return masked_conv2d(input, weight, pattern, bias, *convolution)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        of_input = of_weight = None
        if needs_input and torch.is_grad_enabled():  # the op's derivative by the weight would leave out pruned weights
            of_input = conv2d_input(input.shape, *_wide(weight, grad), *ctx.convolution).to(input.dtype)
        elif needs_input:
            grad_input = torch.ops.sparse_adv.masked_conv2d_grad_input
            of_input = grad_input(grad, weight, ctx.pattern.flatten(), input.shape, *ctx.convolution)
        if needs_weight:
            wide_input, wide_grad = _wide(input, grad)
            of_weight = conv2d_weight(wide_input, weight.shape, wide_grad, *ctx.convolution).to(weight.dtype)
        return of_input, of_weight, grad.sum((0, 2, 3)) if needs_bias else None, None, None


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """At least float32 on a CPU: PyTorch 2.13 gives wrong bfloat16 gradients of some strided convolutions."""
    return tuple(
        tensor.float() if tensor.device.type == "cpu" and tensor.itemsize < 4 else tensor for tensor in tensors
    )
