"""Free adversarial training: the backward pass of each update also moves the perturbation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_adv import attacks, ops
from sparse_adv.config import TrainConfig
from sparse_adv.training.objectives.base import Noise, Passes, TrainingObjective


class Free(TrainingObjective):
    """m updates on each batch; each backward pass also moves the perturbation (Shafahi et al. 2019, algorithm 1).

    delta <- project(delta + alpha direction(g)), the step of `ops.pgd_step` in the ball of radius eps around 0, where g
    is the gradient of the images in the update's own backward pass. The next batch starts with the delta of this one.
    """

    has_loss_of_one_batch = False

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        super().__init__(config, check, graphs)
        self.updates = config.replays
        self.delta: Tensor | None = None
        self.adv: Tensor | None = None
        """Images of the update in progress, whose gradient moves `delta`."""

    @property
    def passes(self) -> Passes:
        return Passes(to_image=1)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        x = super().craft(model, x, y, noise)
        if self.delta is None or self.delta.shape[1:] != x.shape[1:] or len(self.delta) < len(x):
            self.delta = torch.zeros_like(x)
        self.adv = (x + self.delta[: len(x)]).clamp_(0, 1).requires_grad_()
        return self.adv

    def after_update(self) -> None:
        assert self.delta is not None and self.adv is not None
        if self.adv.grad is not None:
            config, delta = self.config, self.delta[: len(self.adv)]
            step = {"alpha": config.step_size, "eps": config.eps, "lo": -math.inf, "hi": math.inf}
            delta.copy_(ops.pgd_step(delta, self.adv.grad, torch.zeros_like(delta), norm=config.norm, **step))
        self.adv = None

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.delta is None else {"delta": self.delta}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.delta = state["delta"].clone() if "delta" in state else None
