"""Objectives of adversarial training: how an update crafts its images, and the loss on them.

`training.train` uses them; `adversarial_loss` computes the loss of one batch for your own training loop.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Generator, Tensor, nn

from sparse_adv import attacks
from sparse_adv.argument_types import shortened
from sparse_adv.attacks.checks import int64_labels
from sparse_adv.config import Norm, Objective, TrainConfig
from sparse_adv.training.objectives.base import Natural, Passes, TrainingObjective, state_of
from sparse_adv.training.objectives.free import Free
from sparse_adv.training.objectives.multi_step import MART, PGD, TRADES
from sparse_adv.training.objectives.regularized import FGSMUAP, NuAT
from sparse_adv.training.objectives.single_step import FGSM, FGSMRS, FGSMRSCS, NFGSM

__all__ = ["Passes", "TrainingObjective", "adversarial_loss", "build", "state_of"]

_BY_NAME: dict[str, type[TrainingObjective]] = {
    "natural": Natural,
    "fgsm": FGSM,
    "fgsm-rs": FGSMRS,
    "n-fgsm": NFGSM,
    "fgsm-rs-cs": FGSMRSCS,
    "fgsm-uap": FGSMUAP,
    "nu-at": NuAT,
    "pgd": PGD,
    "free": Free,
    "trades": TRADES,
    "mart": MART,
}


def build(
    config: TrainConfig,
    check: bool = False,
    graphs: attacks.Graphs | None = None,
    own: Callable[..., TrainingObjective] | None = None,
) -> TrainingObjective:
    """Return the objective of a configuration, or the one that `own` makes from the arguments of `TrainingObjective`.

    Raises:
        TypeError: if `own` makes anything else, or an objective whose state is not a dict of tensors.
    """
    built = (_BY_NAME[config.objective] if own is None else own)(config, check, graphs)
    if not isinstance(built, TrainingObjective):
        raise TypeError(f"objective must make a TrainingObjective, got {shortened(built)}")
    state_of(built)
    return built


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
    beta: float | None = None,
    label_smoothing: float = TrainConfig.label_smoothing,
) -> Tensor:
    """Craft adversarial images from a batch and return the loss on them, for your own training loop.

    Crafting changes neither the model's mode nor its gradients or BatchNorm statistics; the loss is computed in the
    mode that the model is in.

    Args:
        model: maps images [N, C, H, W] in [0, 1] to logits [N, classes].
        x: float images [N, C, H, W] in [0, 1].
        y: integer labels [N].
        objective: as in `TrainConfig`, except "free", "fgsm-rs-cs" and "fgsm-uap": their loss of a batch depends on
            earlier batches. The second term of "nu-at" has its full weight, beta.
        generator: CPU generator of the random start; None for PyTorch's global generator.
        eps, norm, alpha, steps, beta, label_smoothing: as in `TrainConfig`; values that the objective does not use are
            ignored.

    Returns:
        The mean loss, a scalar with a gradient.

    Raises:
        TypeError: if x is not floating or y not integer.
        ValueError: if an argument is out of range, or the objective has no loss of one batch.

    Source: see the docstring of each objective's class in `training/objectives`.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> x, y = torch.rand(8, 1, 2, 2), torch.randint(0, 2, (8,))
        >>> adversarial_loss(model, x, y, "trades", eps=0.1, beta=3.0).backward()
        >>> model[1].weight.grad.shape
        torch.Size([2, 4])
    """
    config = TrainConfig(
        objective, eps=eps, norm=norm, alpha=alpha, steps=steps, beta=beta, label_smoothing=label_smoothing
    )
    if not _BY_NAME[objective].has_loss_of_one_batch:
        raise ValueError(f"objective must have a loss of one batch, got {objective!r}: use training.train for it")
    loss, y = build(config, check=True), int64_labels(y)
    return loss.loss(model, x, loss.craft(model, x, y, generator), y)
