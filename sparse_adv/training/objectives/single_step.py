"""Objectives whose attack is one step, with cross-entropy as the only loss: FGSM, FGSM-RS, N-FGSM, FGSM-RS-CS."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv import attacks, ops
from sparse_adv.config import TrainConfig
from sparse_adv.ops.random_start import as_philox_state
from sparse_adv.training import distributed
from sparse_adv.training.objectives.base import Noise, Passes, TrainingObjective
from sparse_adv.training.objectives.epoch_number import EpochNumber


class FGSM(TrainingObjective):
    """One step of size alpha, by default eps, from x (Goodfellow et al. 2015, section 4), projected.

    loss = CE(f(x + alpha sign(g)), y).
    """

    @property
    def passes(self) -> Passes:
        return Passes(1, 1)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        config, options = self.config, self._options(noise)
        return attacks.pgd(model, x, y, steps=1, random_start=False, norm=config.norm, loss=self.attack_loss, **options)


class FGSMRS(FGSM):
    """One step of size alpha from a random point of the ball, projected (Wong et al. 2020, algorithm 3).

    FastAT Benchmark (Pan and Yao 2026, arXiv 2604.22853), ResNet-18: clean 77.66 %, AutoAttack 43.09 %, 1,902 s.
    """

    def draws(self, x: Tensor) -> bool:
        return True

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return attacks.fgsm_rs(model, x, y, norm=self.config.norm, loss=self.attack_loss, **self._options(noise))


class NFGSM(FGSM):
    """Noise from U(-2 eps, 2 eps), then one step of size alpha, not projected (de Jorge et al. 2022, algorithm 1).

    The paper has linf only; for l2 the noise is uniform in the ball of radius 2 eps.

    FastAT Benchmark, ResNet-18: clean 78.59 %, AutoAttack 47.77 %, 1,941 s.
    """

    def draws(self, x: Tensor) -> bool:
        return True

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        return attacks.n_fgsm(model, x, y, norm=self.config.norm, loss=self.attack_loss, **self._options(noise))


class FGSMRSCS(TrainingObjective):
    """FGSM from noise, with a loss on the noisy images that keeps the convergence smooth.

    x' = clamp(x + U(-eps, eps)), adv = clamp(x' + alpha sign(g)), not projected onto the ball. With d the CE of x' in
    this batch minus its mean over the epoch before::

        loss = CE(f(adv), y) + beta sign(d) [|d| > 0.03] CE(f(x'), y)

    So the second term acts against a change of a batch's loss since the last epoch. It is left out where the loss is
    expected to change: in the first two epochs, next to a milestone of the piecewise schedule and at the end. It costs
    a backward pass even if it is 0, because to skip it the host would have to wait for the GPU.

    With label smoothing s, the labels in these two CE terms are smoothed twice, as in the benchmark: 1 - s for the
    label and s / (classes - 1) for each other class are scaled by 1 - s, and s / classes is added to all. With s = 0.4
    and ten classes that is 0.4 for the label and 0.0667 for each other class. The CE of the attack is smoothed once.

    FastAT Benchmark, ResNet-18: clean 80.54 %, AutoAttack 48.64 %, 1,824 s.

    Source: Zhao et al., "Fast adversarial training with smooth convergence" (ICCV 2023), equations of section 4, in the
    form of FGSM-RS-CS in the FastAT Benchmark.
    """

    has_loss_of_one_batch = False
    _LARGEST_CHANGE = 0.03

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        super().__init__(config, check, graphs)
        self.start: Tensor | None = None
        """x' of the update in progress."""
        self.start_loss: Tensor | None = None
        self.total: Tensor | None = None
        """float64 [2]: the CE of x', summed over the images of this epoch or the last, and the number of images."""
        self.compares = False
        """Whether the loss of this epoch has the second term."""
        self.level = EpochNumber(0.0)
        """Mean CE of x' in the epoch before one with the second term."""

    @property
    def passes(self) -> Passes:
        return Passes(1, 1, update=2) if self.compares else Passes(2, 1)

    @property
    def variant(self) -> bool:
        return self.compares

    def begin_epoch(self, epoch: int) -> None:
        self.compares = self.total is not None and self._is_smooth(epoch)
        if self.total is not None:
            if self.compares:
                loss, images = distributed.all_reduce_sum(self.total.tolist(), self.total.device)
                self.level.set(loss / images)
            self.total.zero_()

    def _is_smooth(self, epoch: int) -> bool:
        config = self.config
        drops = config.milestones if config.schedule == "piecewise" else ()
        borders = sorted({0, *(round(drop * config.epochs) for drop in drops), config.epochs})
        return any(begin + 1 < epoch < end - 1 for begin, end in itertools.pairwise(borders))

    def draws(self, x: Tensor) -> bool:
        return True

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> Tensor:
        config, options = self.config, self._options(noise)
        self.start = ops.random_start(x, config.eps, norm=config.norm, seed=as_philox_state(noise))
        options["eps"] = config.step_size  # this ball is around the start
        return attacks.pgd(
            model, self.start, y, steps=1, random_start=False, norm=config.norm, loss=self.attack_loss, **options
        )

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        assert self.start is not None
        loss = self.cross_entropy(model(adv), y)
        with torch.set_grad_enabled(self.compares and torch.is_grad_enabled()):
            start_loss = self.cross_entropy(model(self.start), y)
        self.start_loss = start_loss.detach()
        if not self.compares:
            return loss
        change = self.start_loss - self.level.like(self.start_loss)
        return loss + self.config.second_weight * change.sign() * (change.abs() > self._LARGEST_CHANGE) * start_loss

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        # In 16 bits the smoothed labels would not add up to 1.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        classes, smoothing = logits.shape[1], self.config.label_smoothing
        others = smoothing / max(1, classes - 1)
        wanted = torch.full_like(logits, others).scatter_(1, y[:, None], 1 - smoothing)
        return F.cross_entropy(logits, wanted, label_smoothing=smoothing)  # the second time

    def after_update(self) -> None:
        assert self.start is not None and self.start_loss is not None
        images = len(self.start)
        loss = self.start_loss.double() * images
        new = torch.stack([loss, torch.full_like(loss, images)])
        self.total = new if self.total is None else self.total.add_(new)
        self.start = self.start_loss = None

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.total is None else {"total": self.total}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.total = state["total"].clone() if "total" in state else None
