"""A model whose gradients are averaged over all processes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_adv.attacks.loop import bn_mode
from sparse_adv.nn import CommStats, register_masked_allreduce_hook


def share_gradients(model: nn.Module, x: Tensor) -> tuple[DistributedDataParallel, CommStats]:
    """The model in DistributedDataParallel, exchanging the gradients of kept weights only, and the count of them.

    DistributedDataParallel lays out its buffers anew after the first backward pass, in the order in which the gradients
    came. The layout decides in which order three or more processes are added up, and so the last bits. A run that
    continues would begin with the first layout where the uninterrupted run has the second; so one backward pass on
    blank images comes before all updates, in both.

    Args:
        model: without gradients; left as it was.
        x: a batch on the model's device, of which only shape, dtype and layout count.
    """
    with warnings.catch_warnings():
        # Newer versions have another name for it, which torch 2.10 does not know.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        shared = DistributedDataParallel(model, broadcast_buffers=False)
    with bn_mode(model, "eval"):
        shared(torch.zeros_like(x)).sum().backward()
    model.zero_grad()
    return shared, register_masked_allreduce_hook(shared)
