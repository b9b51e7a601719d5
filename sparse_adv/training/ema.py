"""The averaged copy of a model that is being trained."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """Exponential moving average of a model's weights, theta' <- decay theta' + (1 - decay) theta after each update.

    It is PyTorch's, but for two things: no update makes the host wait for a GPU, and buffers are copied only when asked
    for, and only those that have changed: a mask that is written to counts as a new one.

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization" (UAI 2018), section 3,
    with weights that decay.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def follow(self, model: nn.Module, first: bool) -> None:
        """Go towards the weights of this moment, at the first update all the way."""
        move = get_ema_multi_avg_fn(0.0 if first else self.decay)
        move(list(self.module.parameters()), list(model.parameters()), None)
        self.n_averaged += 1

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Take over the model's buffers, such as BatchNorm's statistics; waits for a GPU."""
        for own, followed in zip(self.module.buffers(), model.buffers(), strict=True):
            if not own.equal(followed):
                own.copy_(followed)
