"""Objectives with a single-step attack and a second term that compares two outputs: NU-AT, FGSM-UAP."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_adv import attacks, ops
from sparse_adv.attacks.losses import loss_to_raise, loss_values
from sparse_adv.attacks.queries import Queries, run_search
from sparse_adv.config import TrainConfig
from sparse_adv.ops.random_start import as_philox_state
from sparse_adv.training.objectives.base import Noise, Passes, TrainingObjective
from sparse_adv.training.objectives.epoch_number import EpochNumber
from sparse_adv.training.objectives.nuclear_norm import nuclear_norm


class NuAT(TrainingObjective):
    """Keeps the nuclear norm of the difference between clean and adversarial outputs small.

    With ||.||_* the sum of the singular values of a matrix [N, classes]::

        loss = CE(f(x), y) + w ||f(x) - f(adv)||_* / N

    where w is 0 in the first epoch and rises by beta / epochs with each epoch. The attack starts at clamp(x + eps / 2 *
    s), where s are random signs, and makes one step of size alpha, projected. It raises CE, and in every second update
    of an epoch CE + w ||f(x) - f(start)||_* / N. The paper has linf only; for l2 the start is also at distance eps / 2.

    FastAT Benchmark (Pan and Yao 2026, arXiv 2604.22853), ResNet-18: clean 80.98 %, AutoAttack 50.10 %, 2,937 s, with
    beta 4. In the loss of one batch w is beta.

    Source: Sriramanan et al., "Towards efficient and effective adversarial training" (NeurIPS 2021), algorithm 1.
    """

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        super().__init__(config, check, graphs)
        self.weight = EpochNumber(config.second_weight)
        self.count = 0
        """Number of updates of this epoch before the present one."""

    @property
    def passes(self) -> Passes:
        return Passes(2 if self.compares else 1, 1, update=2)

    @property
    def compares(self) -> bool:
        """Whether the attack of this update compares two outputs."""
        return self.count % 2 == 1

    @property
    def variant(self) -> bool:
        return self.compares

    def begin_epoch(self, epoch: int) -> None:
        self.weight.set(self.config.second_weight * epoch / self.config.epochs)
        self.count = 0

    def draws(self, x: Tensor) -> bool:
        return True

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        config = self.config
        signs = _random_signs(x, noise)
        length = config.eps / 2
        if config.norm == "l2":
            length /= math.sqrt(max(1, x[0].numel() if len(x) else 1))
        start = (x + length * signs).clamp(0, 1)

        def search(queries: Queries, x: Tensor, y: Tensor) -> Tensor:
            clean = queries.logits(x) if self.compares else None

            def raised(logits: Tensor) -> Tensor:
                value = loss_values(self.attack_loss, logits, y, len(y)).sum()
                return value if clean is None else value + self._weighted_norm(clean, logits)

            gradient = queries.gradient(start, raised)
            return ops.pgd_step(start, gradient, x, alpha=config.step_size, eps=config.eps, norm=config.norm)

        return run_search(search, model, x, y, 0.0, 1.0, self.check, config.engine)

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        attacked, clean = model(adv), model(x)
        return self.cross_entropy(clean, y) + self._weighted_norm(clean, attacked) / len(x)

    def _weighted_norm(self, clean: Tensor, attacked: Tensor) -> Tensor:
        norm = nuclear_norm(_difference(clean, attacked))
        return self.weight.like(norm) * norm

    def count_update(self) -> None:
        self.count += 1


class FGSMUAP(TrainingObjective):
    """FGSM from a universal perturbation that all images share and every update moves.

    start = clamp(x + project(u)), adv = one step of size alpha from there, projected, and::

        loss = CE(f(adv), y) + beta mean((f(adv) - f(start))^2)

    With g the gradient of the attack for the whole batch, m <- 0.3 m + mean over the images of g / ||g||_1, where the
    norm is one number, the sum over all images. Then u moves by 1.25 eps along sign(m) in the ball of radius 1.25 eps.
    In a run of several processes, each has its own u.

    This is the authors' variant with one perturbation (`fat/fgsm_one_uap.py` of github.com/fzjcdt/fgsm_uap), which the
    benchmark calls FGSM-UAP. In the FGSM-UAP of the paper a classifier of the network's features chooses one of
    50 perturbations for each image.

    FastAT Benchmark (Pan and Yao 2026, arXiv 2604.22853), ResNet-18: clean 80.61 %, AutoAttack 49.44 %, 2,552 s.

    Source: Pan et al., "Adversarial initialization with universal adversarial perturbation: a new approach to fast
    adversarial training" (AAAI 2024).
    """

    has_loss_of_one_batch = False
    _MOMENTUM, _RADIUS = 0.3, 1.25

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        super().__init__(config, check, graphs)
        self.prior: Tensor | None = None
        """u, [1, ...]."""
        self.momentum: Tensor | None = None
        self.start: Tensor | None = None
        """Starts of the update in progress."""

    @property
    def passes(self) -> Passes:
        return Passes(1, 1, update=2)

    def draws(self, x: Tensor) -> bool:
        return self.prior is None or self.prior.shape[1:] != x.shape[1:]

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        config = self.config
        if self.prior is None or self.momentum is None or self.draws(x):
            self.momentum = torch.zeros_like(x[:1])
            self.prior = self._moved(self.momentum, _random_signs(self.momentum, noise), self._RADIUS * config.eps)
        self.start = start = (x + self._moved(self.prior, self.momentum, 0.0, config.eps)).clamp(0, 1)

        def search(queries: Queries, x: Tensor, y: Tensor) -> Tensor:
            gradient = queries.gradient(start, loss_to_raise(self.attack_loss, y, targeted=False))
            self._follow(gradient)
            return ops.pgd_step(start, gradient, x, alpha=config.step_size, eps=config.eps, norm=config.norm)

        return run_search(search, model, x, y, 0.0, 1.0, self.check, config.engine)

    def _follow(self, gradient: Tensor) -> None:
        """Move the perturbation along the gradient of a batch."""
        assert self.prior is not None and self.momentum is not None
        scale = gradient.abs().sum().clamp_min(torch.finfo(gradient.dtype).tiny)
        self.momentum.copy_((gradient / scale).mean(0, keepdim=True) + self._MOMENTUM * self.momentum)
        self.prior.copy_(self._moved(self.prior, self.momentum, self._RADIUS * self.config.eps))

    def _moved(self, prior: Tensor, direction: Tensor, alpha: float, radius: float | None = None) -> Tensor:
        """A step of this size in the ball of this radius, by default the step size, around 0."""
        radius = alpha if radius is None else radius
        ball = {"eps": radius, "lo": -math.inf, "hi": math.inf}
        return ops.pgd_step(prior, direction, torch.zeros_like(prior), alpha=alpha, norm=self.config.norm, **ball)

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        assert self.start is not None
        attacked = model(adv)
        difference = _difference(attacked, model(self.start)).square().mean()
        return self.cross_entropy(attacked, y) + self.config.second_weight * difference

    def after_update(self) -> None:
        self.start = None

    def state_dict(self) -> dict[str, Tensor]:
        if self.prior is None or self.momentum is None:
            return {}
        return {"prior": self.prior, "momentum": self.momentum}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.prior = state["prior"].clone() if "prior" in state else None
        self.momentum = state["momentum"].clone() if "momentum" in state else None


def _random_signs(like: Tensor, noise: Noise) -> Tensor:
    """Values of 1 or -1, of the shape of a tensor."""
    seed = as_philox_state(noise)
    return ops.random_start(torch.zeros_like(like), 1.0, norm="linf", seed=seed, lo=-1.0, hi=1.0).sign()


def _difference(first: Tensor, second: Tensor) -> Tensor:
    """first - second, but 0 for classes that a model masks by the same infinity in both outputs."""
    return (first - second).masked_fill(first.isinf() & (first == second), 0)
