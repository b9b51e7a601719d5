"""Keeps pruned weights at zero under any element-wise optimiser of torch.optim, with nothing to remember.

The invariant: outside the mask, a weight, its gradient and every tensor that the optimiser keeps for it are exactly 0.
SGD, Adam and their like map such zeros to zeros, weight decay and momentum included (Rprop keeps step sizes that are
not 0, but moves no weight by them), and the gradient of `masked_conv2d` is exactly 0 there. So nothing needs doing from
step to step. It is enough to establish the invariant once whenever an optimiser first meets a mask: when a model is
sparsified or its mask changes after steps have been taken, or an old optimiser state is loaded. One hook before every
optimiser's step looks for that case.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

_masks = WeakTensorKeyDictionary()
"""Of each masked layer's weight, its mask. Each change of a mask makes a new tensor, so identity tells them apart."""

_settled: WeakKeyDictionary[Optimizer, tuple[Any, WeakTensorKeyDictionary]] = WeakKeyDictionary()
"""Of each optimiser, its state dictionary (loading makes a new one) and the mask last met of each weight."""


def watch(weight: Tensor, mask: Tensor) -> None:
    """From now on optimisers keep `weight` at zero outside `mask`."""
    _masks[weight] = mask
    _install_hook()


def unwatch(weight: Tensor) -> None:
    """The weight is dense again."""
    _masks.pop(weight, None)


def settle(optimizer: Optimizer) -> None:
    """Zero what lies outside the masks of this optimiser's weights, if they are new to it."""
    state, settled = _settled.get(optimizer, (None, None))
    if settled is None or state is not optimizer.state:
        settled = WeakTensorKeyDictionary()
        _settled[optimizer] = (optimizer.state, settled)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            mask = _masks.get(weight)
            if mask is not None and settled.get(weight) is not mask:
                _zero_outside(mask, [weight, weight.grad, *optimizer.state.get(weight, {}).values()])
                settled[weight] = mask


@torch.no_grad()
def _zero_outside(mask: Tensor, candidates: list[Any]) -> None:
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.shape == mask.shape:
            tensor.masked_fill_(~mask.to(tensor.device), 0)


@functools.cache
def _install_hook() -> None:
    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            settle(optimizer)

    register_optimizer_step_pre_hook(before_step)
