"""The gradients of a run of several processes, which DistributedDataParallel averages over them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_adv.attacks.modes import bn_mode
from sparse_adv.nn import mask_agreement, register_masked_allreduce_hook


class GradientExchange:
    """Averages the gradients of kept weights over processes.

    After its first backward pass, DistributedDataParallel assigns gradients to its buffers anew, in the order of their
    arrival. The buffers determine the order in which the gradients of three or more processes are added, and so the
    last bits. To give a continued run the same buffers as an uninterrupted one, both begin with a backward pass on
    blank images, without an update.

    Args:
        model: whose gradients are averaged.
        trained: the module that the loss calls in place of the model.
        x: a batch; only its shape, dtype and memory layout matter.

    Attributes:
        trained: `trained` in a DistributedDataParallel.
        stats: bytes of gradients that this process has sent.
    """

    def __init__(self, model: nn.Module, trained: nn.Module, x: Tensor) -> None:
        with warnings.catch_warnings():
            # Newer versions of torch have another argument for this, but torch 2.10 does not know it.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.trained = DistributedDataParallel(trained, broadcast_buffers=False)
        # Before the first pass, because there only masked layers would compare them.
        mask_agreement.compare(model, self.trained.process_group)
        with bn_mode(model, "eval"):
            self.trained(torch.zeros_like(x)).sum().backward()
        model.zero_grad()
        self.stats = register_masked_allreduce_hook(self.trained)
        self._model = model
        self._exchanged = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def check_trained(self) -> None:
        """Raise ValueError if the trained parameters are not those whose gradients are exchanged."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad != self._exchanged.get(name, parameter.requires_grad):
                raise ValueError(
                    f"hook must not freeze or unfreeze parameters in a run of several processes, as it did {name!r}: "
                    "DistributedDataParallel exchanges the gradients of those that were trained at the start"
                )
