"""Objectives of adversarial training: how an update crafts its images, and the loss on them.

`training.train` uses them; `adversarial_loss` computes the loss of one batch for a training loop of your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sparse_adv import attacks
from sparse_adv.attacks import CommonOptions
from sparse_adv.attacks.checks import check_batch
from sparse_adv.config import Norm, Objective, TrainConfig


class Passes(NamedTuple):
    """Passes through the network for each image of an update."""

    attack_forward: int = 0
    attack_backward: int = 0
    """Backward passes down to the image, without gradients of weights."""
    update: int = 1
    """Forward passes that are followed by a backward pass with gradients of weights."""
    to_image: bool = False
    """Whether the backward pass of the update continues down to the image."""


class _AttackOptions(CommonOptions):
    """The options that all attacks of objectives have in common."""

    eps: float
    alpha: float


class Natural:
    """Training without attack: loss = CE(f(x), y). Base class of the other objectives.

    Args:
        config: of the training.
        check: whether to validate the values of every batch.
        graphs: CUDA graphs of the attack to use again.
    """

    updates = 1
    """Number of updates on each batch."""

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        self.config, self.check, self.graphs = config, check, graphs

    @property
    def passes(self) -> Passes:
        """Passes of one update."""
        return Passes()

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        """Return the images of the update: float [N, C, H, W] in [0, 1]."""
        if self.check:
            check_batch(x, y)
        return x

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of the batch, a scalar with a gradient."""
        return F.cross_entropy(model(adv), y)

    def after_update(self) -> None:
        """Use the gradients of the update, if the objective needs them."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what an update needs of the updates before it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from this state."""

    def _options(self, noise: Generator | None) -> _AttackOptions:
        return {
            "eps": self.config.eps,
            "alpha": self.config.step_size,
            "generator": noise,
            "check": self.check,
            "graphs": self.graphs,
            "engine": self.config.engine,
        }


class FGSM(Natural):
    """One signed step of size eps from x (Goodfellow et al. 2015, section 4): loss = CE(f(x + eps sign(g)), y)."""

    @property
    def passes(self) -> Passes:
        return Passes(1, 1)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        options = self._options(noise)
        return attacks.pgd(model, x, y, steps=1, random_start=False, norm=self.config.norm, **options)


class FGSMRS(FGSM):
    """One step of size alpha from a random point of the ball, projected (Wong et al. 2020, algorithm 3)."""

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        return attacks.fgsm_rs(model, x, y, norm=self.config.norm, **self._options(noise))


class NFGSM(FGSM):
    """Noise from U(-2 eps, 2 eps), then one step of size alpha, not projected (de Jorge et al. 2022, algorithm 1)."""

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        return attacks.n_fgsm(model, x, y, **self._options(noise))


class PGD(Natural):
    """`steps` projected steps of size alpha from a random point of the ball (Madry et al. 2018, section 2.1)."""

    @property
    def passes(self) -> Passes:
        return Passes(self.config.steps, self.config.steps)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        return attacks.pgd(model, x, y, steps=self.config.steps, norm=self.config.norm, **self._options(noise))


class TRADES(Natural):
    """loss = CE(f(x), y) + beta KL(p(x) || p(adv)), adv maximising the divergence (Zhang et al. 2019, equation 5)."""

    @property
    def passes(self) -> Passes:
        return Passes(self.config.steps + 1, self.config.steps, update=2)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        return attacks.tpgd(model, x, steps=self.config.steps, **self._options(noise))

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        clean = model(x)
        divergence = F.kl_div(F.log_softmax(model(adv), 1), F.softmax(clean, 1), reduction="batchmean")
        return F.cross_entropy(clean, y) + self.config.beta * divergence


class Free(Natural):
    """m updates on each batch; each backward pass also moves the perturbation (Shafahi et al. 2019, algorithm 1).

    delta <- clamp(delta + alpha sign(g), -eps, eps), where g is the gradient of the images in the update's own backward
    pass. The next batch starts with the delta of this one.
    """

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        super().__init__(config, check, graphs)
        self.updates = config.replays
        self.delta: Tensor | None = None
        self.adv: Tensor | None = None
        """Images of the update in progress, whose gradient moves `delta`."""

    @property
    def passes(self) -> Passes:
        return Passes(to_image=True)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        x = super().craft(model, x, y, noise)
        if self.delta is None or self.delta.shape[1:] != x.shape[1:] or len(self.delta) < len(x):
            self.delta = torch.zeros_like(x)
        self.adv = (x + self.delta[: len(x)]).clamp_(0, 1).requires_grad_()
        return self.adv

    def after_update(self) -> None:
        assert self.delta is not None and self.adv is not None
        if self.adv.grad is not None:
            delta = self.delta[: len(self.adv)]
            delta.add_(self.adv.grad.sign(), alpha=self.config.step_size).clamp_(-self.config.eps, self.config.eps)
        self.adv = None

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.delta is None else {"delta": self.delta}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.delta = state["delta"].clone() if "delta" in state else None


_BY_NAME: dict[str, type[Natural]] = {
    "natural": Natural,
    "fgsm": FGSM,
    "fgsm-rs": FGSMRS,
    "n-fgsm": NFGSM,
    "pgd": PGD,
    "free": Free,
    "trades": TRADES,
}


def build(config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> Natural:
    """Return the objective of a configuration; the arguments are those of `Natural`."""
    return _BY_NAME[config.objective](config, check, graphs)


def adversarial_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective = "pgd",
    *,
    generator: Generator | None = None,
    eps: float = TrainConfig.eps,
    norm: Norm = TrainConfig.norm,
    alpha: float | None = None,
    steps: int = TrainConfig.steps,
    beta: float = TrainConfig.beta,
) -> Tensor:
    """Craft adversarial images from a batch and return the loss on them, for a training loop of your own.

    Crafting changes neither the model's mode nor its gradients or BatchNorm statistics; the loss is computed in the
    mode that the model is in.

    Args:
        model: maps images [N, C, H, W] in [0, 1] to logits [N, classes].
        x: float images [N, C, H, W] in [0, 1].
        y: int64 labels [N].
        objective: as in `TrainConfig`, except "free", which is a training loop and has no loss of its own.
        generator: CPU generator of the random start; None for PyTorch's global generator.
        eps, norm, alpha, steps, beta: as in `TrainConfig`.

    Returns:
        The mean loss, a scalar with a gradient.

    Raises:
        TypeError: if x is not floating or y not int64.
        ValueError: if an argument is out of range, or the objective is "free".

    Examples:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> x, y = torch.rand(8, 1, 2, 2), torch.randint(0, 2, (8,))
        >>> adversarial_loss(model, x, y, "trades", eps=0.1, beta=3.0).backward()
        >>> model[1].weight.grad.shape
        torch.Size([2, 4])
    """
    config = TrainConfig(objective, eps=eps, norm=norm, alpha=alpha, steps=steps, beta=beta)
    if objective == "free":
        raise ValueError('objective must have a loss for one batch, got "free": use training.train for it')
    loss = build(config, check=True)
    return loss.loss(model, x, loss.craft(model, x, y, generator), y)
