"""What an update of adversarial training minimises: the images it crafts, and the loss on them.

Each objective is used by `training.train`, and `adversarial_loss` gives its loss to anyone's own loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sparse_adv import attacks
from sparse_adv.attacks import CommonOptions
from sparse_adv.attacks.checks import check_batch
from sparse_adv.config import Objective, TrainConfig


class Passes(NamedTuple):
    """Passes through the network for each image of an update, of forward kind and of backward kind."""

    attack_forward: int = 0
    attack_backward: int = 0
    """To the image, forming no gradient of weights."""
    update: int = 1
    """Forward, and backward to the weights."""
    to_image: bool = False
    """Whether the update's backward goes on to the image."""


class Natural:
    """Cross-entropy on the images as they are: loss = CE(f(x), y)."""

    updates = 1
    """Updates that are made of each batch."""

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        self.config, self.check, self.graphs = config, check, graphs

    @property
    def passes(self) -> Passes:
        return Passes()

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        """The images that the update sees."""
        if self.check:
            check_batch(x, y)
        return x

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """The mean loss of the batch, to be differentiated."""
        return F.cross_entropy(model(adv), y)

    def after_update(self) -> None:
        """Learn from the gradients that the update has formed."""

    def state_dict(self) -> dict[str, Any]:
        """What the next batch needs of the ones before."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def _with(self, noise: Generator | None) -> CommonOptions:
        """What all attacks are given."""
        return {"generator": noise, "check": self.check, "graphs": self.graphs}


class FGSM(Natural):
    """One signed step of size eps from x (Goodfellow et al. 2015, section 4): loss = CE(f(x + eps sign(g)), y)."""

    @property
    def passes(self) -> Passes:
        return Passes(1, 1)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        config = self.config
        return attacks.pgd(
            model,
            x,
            y,
            eps=config.eps,
            alpha=config.step_size,
            steps=1,
            random_start=False,
            norm=config.norm,
            **self._with(noise),
        )


class FGSMRS(FGSM):
    """One step of size alpha from a random point of the ball, projected (Wong et al. 2020, algorithm 3)."""

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        config = self.config
        return attacks.fgsm_rs(
            model, x, y, eps=config.eps, alpha=config.step_size, norm=config.norm, **self._with(noise)
        )


class NFGSM(FGSM):
    """Noise from U(-2 eps, 2 eps), then one step of size alpha, not projected (de Jorge et al. 2022, algorithm 1)."""

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        return attacks.n_fgsm(model, x, y, eps=self.config.eps, alpha=self.config.step_size, **self._with(noise))


class PGD(Natural):
    """`steps` projected steps of size alpha from a random point of the ball (Madry et al. 2018, section 2.1)."""

    @property
    def passes(self) -> Passes:
        return Passes(self.config.steps, self.config.steps)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        config = self.config
        return attacks.pgd(
            model,
            x,
            y,
            eps=config.eps,
            alpha=config.step_size,
            steps=config.steps,
            norm=config.norm,
            **self._with(noise),
        )


class TRADES(Natural):
    """loss = CE(f(x), y) + beta KL(p(x) || p(adv)), adv maximising the divergence (Zhang et al. 2019, equation 5)."""

    @property
    def passes(self) -> Passes:
        return Passes(self.config.steps + 1, self.config.steps, update=2)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        config = self.config
        return attacks.tpgd(model, x, eps=config.eps, alpha=config.step_size, steps=config.steps, **self._with(noise))

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        clean = model(x)
        divergence = F.kl_div(F.log_softmax(model(adv), 1), F.softmax(clean, 1), reduction="batchmean")
        return F.cross_entropy(clean, y) + self.config.beta * divergence


class Free(Natural):
    """Each batch is seen m times; every backward pass moves the weights and the perturbation (Shafahi et al. 2019).

    delta <- clamp(delta + alpha sign(g), -eps, eps) with the gradient that the update forms anyway; delta is kept from
    batch to batch (their algorithm 1).
    """

    def __init__(self, config: TrainConfig, check: bool = False, graphs: attacks.Graphs | None = None) -> None:
        super().__init__(config, check, graphs)
        self.updates = config.replays
        self.delta: Tensor | None = None
        self.seen: Tensor | None = None

    @property
    def passes(self) -> Passes:
        return Passes(to_image=True)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator | None) -> Tensor:
        x = super().craft(model, x, y, noise)
        if self.delta is None or self.delta.shape[1:] != x.shape[1:] or len(self.delta) < len(x):
            self.delta = torch.zeros_like(x)
        self.seen = (x + self.delta[: len(x)]).clamp_(0, 1).requires_grad_()
        return self.seen

    def after_update(self) -> None:
        assert self.delta is not None and self.seen is not None
        if self.seen.grad is not None:
            moved = self.delta[: len(self.seen)]
            moved.add_(self.seen.grad.sign(), alpha=self.config.step_size).clamp_(-self.config.eps, self.config.eps)
        self.seen = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.delta is None else {"delta": self.delta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
    """The objective of a config, at its start; `check` looks at the values of every batch, `graphs` is `pgd`'s."""
    return _BY_NAME[config.objective](config, check, graphs)


def adversarial_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective = "pgd",
    *,
    generator: Generator | None = None,
    **settings: Any,
) -> Tensor:
    """The loss of one batch under an objective, for a training loop of your own.

    `adversarial_loss(model, x, y, "trades", eps=8 / 255, beta=6).backward()`; the crafting leaves the model's mode,
    gradients and BatchNorm statistics as they are, the loss is formed in the mode that the model is in.

    Args:
        model: maps images [N, C, H, W] in [0, 1] to logits [N, classes].
        x: float images in [0, 1].
        y: int64 classes [N].
        objective: as in `TrainConfig`, except "free", which is a loop and no loss.
        generator: where the random start's one number is drawn; None draws it from PyTorch's global generator.
        settings: `eps`, `alpha`, `steps`, `norm`, `beta`, as in `TrainConfig`.

    Returns:
        The mean loss, a scalar with a gradient.

    Raises:
        ValueError: if a setting is out of range.
    """
    config = TrainConfig(objective=objective, **settings)
    if config.objective == "free":
        raise ValueError('objective must be a loss for one update, got "free": use training.train for it')
    loss = build(config, check=True)
    return loss.loss(model, x, loss.craft(model, x, y, generator), y)
