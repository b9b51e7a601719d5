"""Keeps pruned weights at zero under every optimiser, without a call by the user.

The invariant: after each step, a weight is exactly 0 where the mask is false. A hook after the steps of all optimisers
of the process zeroes it there. It does so after every step, because not every write by hand can be detected:
`weight.data.copy_`, which averages of weights use, does not change the version. Some optimisers also move pruned
weights themselves: `LBFGS` by its history from before a mask changed, `Muon` by products of matrices. On a CPU the hook
takes 3 ms for the 11 million weights of a ResNet-18, less than 1 % of an update of 64 images.

Gradients and the optimiser's state are 0 there too, so that a weight which another mask revives does not get its old
momentum back. SGD, Adam and other element-wise optimisers keep such zeros, also with weight decay and momentum (Rprop's
step sizes are not 0, but they move no weight whose gradient is 0). So zeros are needed before an optimiser's first step
with a mask: after a model is sparsified, a mask changes during training, an optimiser's state is loaded or a weight was
written to. A hook before the steps detects these cases. In compiled steps the hooks run uncompiled.

A masked layer's gradient is exactly 0 where the mask is false, but other code may read its weight: an attention that
calls `F.linear(x, self.qkv.weight)`, or a regulariser in the loss. So a hook on the weight masks each gradient as it
arrives, before it is clipped or exchanged between processes, unless only the layer's op computed it.

A CUDA graph of an update keeps the masks that these hooks read: a replay would not notice that they were freed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from threading import Lock
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle, unserializable_hook
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_adv.ops import cuda_graph
from sparse_adv.ops.masked_conv2d_gradients import is_masked

_masks = WeakTensorKeyDictionary()
"""The mask of each masked weight. A changed mask is a new tensor, so masks can be compared by identity."""

_hooks = WeakTensorKeyDictionary()
"""The handle of the hook that masks the gradients of each masked weight."""

_bits = WeakTensorKeyDictionary()
"""For each mask, integers as wide as its weights: all bits set where the mask is true, none where it is false."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype for each number of bytes; there is none for the 16 bytes of complex128."""

_settled: WeakKeyDictionary[Optimizer, tuple[object, WeakTensorKeyDictionary]] = WeakKeyDictionary()
"""For each optimiser: its state dictionary (loading makes a new one), and for each weight the mask applied last,
reduced by later masks, and the weight's version after the last step."""

_lock = Lock()
"""For `_settled`: a mask may change in one thread while an optimiser makes its first step in another."""


def watch(weight: Tensor, mask: Tensor) -> None:
    """Make all optimisers keep `weight` at zero where `mask` is false, from now on."""
    if weight not in _hooks and not weight.is_inference():
        _hooks[weight] = _mask_gradients_of(weight)
    _masks[weight] = mask
    with _lock:
        for _, settled in _settled.values():
            applied, version = settled.get(weight, (mask, None))
            if applied is not mask:  # before the next step, a later mask may revive what this one prunes
                settled[weight] = mask & applied.to(mask.device), version
    _install_hook()


def unwatch(weight: Tensor) -> None:
    """Make all optimisers treat the weight as dense again, and drop every reference to it."""
    _masks.pop(weight, None)
    hook = _hooks.pop(weight, None)
    if hook is not None:
        hook.remove()
    with _lock:
        for _, settled in _settled.values():
            settled.pop(weight, None)


def mask_of(weight: Tensor) -> Tensor | None:
    """The mask by which optimisers keep the weight at zero; None if they treat the weight as dense."""
    mask: Tensor | None = _masks.get(weight)
    return mask


def own_hooks(weight: Tensor) -> int:
    """How many hooks `watch` made on the gradient of this weight."""
    return int(weight in _hooks)


def settle(optimizer: Optimizer) -> None:
    """Zero this optimiser's weights, gradients and state outside of the masks, for masks that were not applied yet."""
    state, settled = _settled.get(optimizer, (None, None))
    if settled is None or state is not optimizer.state:
        settled = WeakTensorKeyDictionary()
        with _lock:
            _settled[optimizer] = (optimizer.state, settled)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            mask = _masks.get(weight)
            if mask is None:
                continue
            cuda_graph.keep(mask)  # the hook on the gradient may run in autograd's thread, where `keep` has no effect
            applied, version = settled.get(weight, (None, None))
            if applied is not mask:
                _zero_outside(mask, [weight, weight.grad])
                kept = mask if applied is None else applied  # revived entries start at 0
                _zero_outside(kept, optimizer.state.get(weight, {}).values())
            elif version != version_of(weight):  # the weight was written since the last step
                _zero_outside(mask, [weight])
            settled[weight] = mask, version_of(weight)


def version_of(tensor: Tensor) -> object:
    """A value that is equal until the tensor is written to; never for an inference tensor, which counts no writes."""
    return object() if tensor.is_inference() else tensor._version


def _mask_gradients_of(weight: Tensor) -> RemovableHandle:
    reference = ref(weight)

    @unserializable_hook  # in another process the layer makes its own hook
    def mask_gradient(gradient: Tensor) -> Tensor:
        weight = reference()
        mask = None if weight is None else _masks.get(weight)
        if mask is None or is_masked(gradient, mask):
            return gradient
        return gradient.masked_fill(~mask.to(gradient.device), 0)

    # PyTorch accepts a hook only while a gradient is required; that may be switched on later.
    required = weight.requires_grad
    try:
        return weight.requires_grad_().register_hook(mask_gradient)
    finally:
        weight.requires_grad_(required)


@torch.no_grad()
def _zero_outside(mask: Tensor, values: Iterable[object]) -> None:
    """Zero the values that are tensors of the mask's shape; an optimiser's state also has scalars."""
    cuda_graph.keep(mask)
    for value in values:
        if isinstance(value, Tensor) and value.shape == mask.shape:
            value.masked_fill_(~mask.to(value.device), 0)


@torch.no_grad()
def _zero_after_step(mask: Tensor, weight: Tensor) -> None:
    """Zero a weight outside its mask as integers, `weight & bits`: a fifth of the time of `masked_fill_` on a CPU."""
    integer, bits = _INTEGERS.get(weight.element_size()), _bits.get(mask)
    if integer is None or type(weight) not in (Tensor, nn.Parameter) or weight.shape != mask.shape:
        return _zero_outside(mask, [weight])
    if bits is None or bits.dtype != integer or bits.device != weight.device:
        _bits[mask] = bits = torch.empty_like(weight, dtype=integer, requires_grad=False).copy_(mask).neg_()
    cuda_graph.keep(bits)
    weight.detach().view(integer).bitwise_and_(bits)


@functools.cache
def _install_hook() -> None:
    # The same as torch.compiler.disable, but without importing torch._dynamo at once (2.5 s).
    @torch._disable_dynamo
    def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        settle(optimizer)

    @torch._disable_dynamo
    def after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        settled = _settled[optimizer][1] if optimizer in _settled else {}
        for weight, (mask, _) in list(settled.items()):
            _zero_after_step(mask, weight)
            settled[weight] = mask, version_of(weight)

    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(after_step)
