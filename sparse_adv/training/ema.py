"""An exponential moving average of the weights of a model in training."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """Exponential moving average of a model's weights: after each update, theta' <- decay theta' + (1 - decay) theta.

    Differences to `AveragedModel`: an update never makes the host wait for a GPU; buffers are copied only by
    `copy_buffers`, and only those that differ, because masked layers recompile a mask after a write to it.

    Args:
        model: the model to follow; `module` is the average.
        decay: in [0, 1).

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization" (UAI 2018), section 3,
    there with equal weights.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = EMA(model, decay=0.75)
        >>> for value in (1.0, 5.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.follow(model, first=value == 1.0)
        >>> average.module.weight.item()  # 0.75 * 1 + 0.25 * 5
        2.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def follow(self, model: nn.Module, first: bool) -> None:
        """Average the present weights in; after the first update the average is set to them."""
        move = get_ema_multi_avg_fn(0.0 if first else self.decay)
        move(list(self.module.parameters()), list(model.parameters()), None)
        self.n_averaged += 1

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Copy buffers of the model that differ, such as BatchNorm's running statistics; waits for a GPU."""
        for own, followed in zip(self.module.buffers(), model.buffers(), strict=True):
            if not own.equal(followed):
                own.copy_(followed)
