"""Objectives whose attack has several steps: PGD, TRADES, MART."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv import attacks
from sparse_adv.attacks.losses import kl_divergence
from sparse_adv.training.objectives.base import Noise, Passes, TrainingObjective


class PGD(TrainingObjective):
    """`steps` projected steps of size alpha from a random point of the ball (Madry et al. 2018, section 2.1).

    FastAT Benchmark (Pan and Yao 2026, arXiv 2604.22853), ResNet-18, 10 steps with averaged weights: clean 82.36 %,
    AutoAttack 50.49 %, 7,027 s.
    """

    @property
    def passes(self) -> Passes:
        return Passes(self.config.steps, self.config.steps)

    def draws(self, x: Tensor) -> bool:
        return True

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return attacks.pgd(model, x, y, steps=self.config.steps, norm=self.config.norm, **self._options(noise))


class TRADES(TrainingObjective):
    """loss = CE(f(x), y) + beta KL(p(x) || p(adv)), adv maximising the divergence (Zhang et al. 2019, equation 5)."""

    @property
    def passes(self) -> Passes:
        return Passes(self.config.steps + 1, self.config.steps, update=2)

    def draws(self, x: Tensor) -> bool:
        return True

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return attacks.tpgd(model, x, steps=self.config.steps, norm=self.config.norm, **self._options(noise))

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        clean = model(x)
        divergence = kl_divergence(model(adv), F.log_softmax(clean, 1)).mean()
        return self.cross_entropy(clean, y) + self.config.second_weight * divergence


class MART(PGD):
    """PGD training that puts weight on images that the network misclassifies.

    With p = softmax(f(x)), q = softmax(f(adv)) and c the likeliest class of q other than the label y::

        loss = CE(f(adv), y) - log(1 - q_c) + beta mean(KL(p || q) (1 - p_y))

    adv is crafted by PGD. As in the authors' code, 0.0001 is added to 1 - q_c, because its logarithm could be infinite.

    Source: Wang et al., "Improving adversarial robustness requires revisiting misclassified examples" (ICLR 2020),
    equation 10 and algorithm 1. The FastAT Benchmark does not include it.
    """

    @property
    def passes(self) -> Passes:
        return super().passes._replace(update=2)

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        clean, attacked = model(x), model(adv)
        log_p = F.log_softmax(clean, 1)
        wrong = F.softmax(attacked, 1).scatter(1, y[:, None], 0).amax(1)
        margin = -(1.0001 - wrong).log().mean()
        weights = 1 - log_p.gather(1, y[:, None]).squeeze(1).exp()
        weighted = (kl_divergence(attacked, log_p) * weights).mean()
        return self.cross_entropy(attacked, y) + margin + self.config.second_weight * weighted
