"""Registers the gradient of an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparse_adv.ops._library import IMPLEMENTATIONS

Saved = tuple[Any, ...]
"""The tensors that a context has saved, None where one was absent."""


def register_autograd(
    name: str,
    backward: Callable[..., tuple[Any, ...]],
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    *,
    uses_autograd: bool = False,
) -> None:
    """Register the gradient of an op whose schema has neither defaults nor keyword-only arguments.

    `torch.library.register_autograd` does the same for every schema. To find tensors in lists it flattens all arguments
    and gradients. That takes half the time of a convolution of a few pixels (400 us forward and backward, 200 us
    without). Here lists are constants.

    Args:
        name: of the op.
        backward: from the context, the tensors that it saved and a gradient for each output, a gradient for each
            argument, None for constants.
        setup: called with the context, the arguments and the outputs after each call that needs gradients.
        uses_autograd: whether `backward` itself calls functions that differentiate. The ops of other backward passes
            skip autograd unless second derivatives are asked for, which saves 15 us each.
    """
    op = getattr(torch.ops.sparse_adv, name).default

    def below(keyset: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    # The key set comes last, so that `ctx.needs_input_grad[i]` belongs to the op's argument i.
    def run(ctx: Any, *arguments: Any) -> Any:
        *inputs, keyset = arguments
        outputs = below(keyset, tuple(inputs))
        setup(ctx, tuple(inputs), outputs)
        return outputs

    def differentiate(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors  # above the guard: torch.utils.checkpoint computes them here, and only once
        # torch.compile, in compiled autograd, cannot trace the guard.
        if uses_autograd or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return *backward(ctx, saved, *grads), None
        with torch._C._AutoDispatchBelowAutograd():
            return *backward(ctx, saved, *grads), None

    methods = {"forward": staticmethod(run), "backward": staticmethod(differentiate)}
    function: Any = type(name, (torch.autograd.Function,), methods)  # results show this name in their grad_fn

    def call(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments, keyset)
        return below(keyset, arguments)

    IMPLEMENTATIONS.impl(name, call, "Autograd", with_keyset=True)
