"""`is_transformed`: under function transforms of PyTorch an op needs formulas that a native op does not have."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether the caller runs under `torch.func` (grad, jvp, vmap and others) or inside forward-mode AD.

    A native op would drop the tangents of forward-mode AD without an error, and has no rules for the other transforms.

    Examples:
        >>> torch.func.vmap(lambda x: x + is_transformed())(torch.zeros(2)), is_transformed()
        (tensor([1., 1.]), False)
    """
    # `torch.compile` can trace this: for it both values are constants or guarded.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
