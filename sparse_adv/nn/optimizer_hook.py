"""Keeps pruned weights at zero under every element-wise optimiser of torch.optim, without a call by the user.

The invariant: where the mask is false, a weight, its gradient and every tensor of the optimiser's state for it are
exactly 0. SGD, Adam and other element-wise optimisers map such zeros to zeros, weight decay and momentum included
(Rprop's step sizes are not 0, but they move no weight whose gradient is 0), and the gradient of `masked_conv2d` is
exactly 0 there. So the invariant needs no work in each step. It has to be established once, before an optimiser's first
step with a mask: after a model is sparsified or a mask changes in the middle of training, and after an optimiser's
state is loaded. A hook before the steps of all optimisers of the process detects these cases.

Two optimisers are not element-wise and move pruned weights: `LBFGS`, by its history of steps before a mask changed, and
`Muon`, by products of matrices. After each of their steps the weights are set to zero again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakTensorKeyDictionary

_MIXING = tuple(getattr(torch.optim, name) for name in ("LBFGS", "Muon") if hasattr(torch.optim, name))

_masks = WeakTensorKeyDictionary()
"""The mask of each masked weight. A changed mask is a new tensor, so that masks can be told apart by identity."""

_settled: WeakKeyDictionary[Optimizer, tuple[object, WeakTensorKeyDictionary]] = WeakKeyDictionary()
"""For each optimiser, its state dictionary (loading makes a new one) and the mask last applied to each weight."""


def watch(weight: Tensor, mask: Tensor) -> None:
    """From now on optimisers keep `weight` at zero where `mask` is false."""
    _masks[weight] = mask
    _install_hook()


def unwatch(weight: Tensor) -> None:
    """Optimisers treat the weight as dense again."""
    _masks.pop(weight, None)


def settle(optimizer: Optimizer) -> None:
    """Zero what lies outside the masks of this optimiser's weights; masks that were applied before are skipped."""
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
def _zero_outside(mask: Tensor, values: Iterable[object]) -> None:
    """Zero those of the values that are tensors of the mask's shape; an optimiser's state has scalars too."""
    for value in values:
        if isinstance(value, Tensor) and value.shape == mask.shape:
            value.masked_fill_(~mask.to(value.device), 0)


@functools.cache
def _install_hook() -> None:
    def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if not torch.compiler.is_compiling():
            settle(optimizer)

    def after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if isinstance(optimizer, _MIXING) and not torch.compiler.is_compiling():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    mask = _masks.get(weight)
                    if mask is not None:
                        _zero_outside(mask, [weight])

    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)
