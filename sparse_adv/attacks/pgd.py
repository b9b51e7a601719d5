"""PGD: projected gradient descent, in both norms."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.gradient_attack import GradientAttack
from sparse_adv.attacks.losses import Loss
from sparse_adv.attacks.options import AttackOptions, LossOptions, check_names
from sparse_adv.attacks.run_attack import run_attack


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor = 2 / 255,
    steps: int = 10,
    random_start: bool = True,
    norm: str = "linf",
    loss: str | Loss = "ce",
    restarts: int = 1,
    targeted: bool = False,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    generator: torch.Generator | Tensor | None = None,
    bn_mode: str = "eval",
    check: bool = True,
    graphs: Graphs | None = None,
    engine: bool = True,
    early_stop: bool = False,
) -> Tensor:
    """Projected gradient descent: repeat adv = project(adv + alpha * direction(d loss / d adv)) `steps` times.

    direction(g) is sign(g) for linf and g / |g| of each image for l2; project returns the nearest point of the ball of
    radius eps around the clean image, then clamps to [lo, hi], see `ops.pgd_step`. The model is left as it was:
    training flags, buffers (except with bn_mode "train"), `requires_grad` and `.grad`.

    Args:
        model: maps images in [lo, hi] to logits [N, classes]; a module, or a plain function, which autograd
            differentiates.
        images: float tensor [N, ...], the clean images.
        labels: integer tensor [N]: the true classes, or the classes to reach if targeted. With a callable loss,
            whatever it takes.
        eps: radius of the ball around each image, in units of the images: a number, or a float tensor [N] of one for
            each image.
        alpha: step size, in units of the images: a number, or a float tensor [N].
        steps: number of steps; each is one forward and one backward pass.
        random_start: start at a random point of the ball instead of the clean image.
        norm: "linf" or "l2", also written "Linf" or "L2".
        loss: "ce" (cross-entropy), "margin" or "dlr", see `attacks.losses`, or a function (logits, labels) -> loss, a
            scalar or one number per image [N].
        restarts: number of random starts. If one of them leads to a misclassified image (or to the target), that image
            is returned, whatever its loss is; else the image with the highest loss. To compare them, a loss that
            returns a scalar is evaluated image by image: with one row of the labels if they are a tensor [N, ...], else
            with all of them.
        targeted: minimise the loss instead of maximising it.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        generator: one number is drawn from it for the random starts; None for PyTorch's global generator; or an int64
            tensor [2] of Philox key and offset, as in `ops.random_start`.
        bn_mode: mode of BatchNorm layers during the attack: "eval" uses the running statistics; "train" uses the
            statistics of the batch and updates the running ones at each step; "batch" uses the statistics of the batch
            and leaves the running ones unchanged. All other layers (dropout) are in eval mode. So are frozen BatchNorm
            layers: layers in eval mode inside a model in training mode.
        check: check the values of images and labels, and correct rounding in the result, so that it lies in the ball
            without slack; on a GPU this synchronises.
        graphs: cache of CUDA graphs, see `Graphs`. The attack runs step by step if this is None, or if eps, alpha, lo
            or hi is a tensor.
        engine: whether the engine may compute the gradients, see `sparse_adv.engine`; False leaves them to autograd.
        early_stop: stop moving an image as soon as a step finds it misclassified (or at its target). The labels must be
            classes.

    Returns:
        The adversarial images, detached, in [lo, hi], with shape, dtype and memory format of `images`.

    Raises:
        TypeError: if model cannot be called, images are not floating point, labels are not integers, or eps, alpha, lo
            or hi is neither a number nor a float tensor.
        ValueError: if a value, shape or name is out of range.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018), section 2.1.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.pgd(model, images, labels, eps=0.2, alpha=0.05, steps=10)
        >>> adv.shape, bool((adv - images).abs().max() <= 0.2 + 1e-6)
        (torch.Size([4, 1, 8, 8]), True)
    """
    options = AttackOptions(
        eps=eps,
        alpha=alpha,
        steps=steps,
        random_start=random_start,
        norm=norm,
        loss=loss,
        restarts=restarts,
        targeted=targeted,
        lo=lo,
        hi=hi,
        generator=generator,
        bn_mode=bn_mode,
        check=check,
        graphs=graphs,
        engine=engine,
        early_stop=early_stop,
    )
    return run_attack(model, images, labels, options)


class PGD(GradientAttack):
    """`attacks.pgd` bound to a model; positional arguments are in the order of torchattacks.PGD.

    Args:
        model, eps, alpha, steps, random_start, norm, restarts, options: as in `attacks.pgd`.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.PGD(models.build("digits_cnn", width=8), eps=0.25, alpha=0.125, steps=4)
        >>> attack
        PGD(eps=0.25, alpha=0.125, steps=4)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        norm: str = "linf",
        restarts: int = 1,
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        check_names(type(self).__name__, options, LossOptions)
        settings = AttackOptions(
            eps=eps, alpha=alpha, steps=steps, random_start=random_start, norm=norm, restarts=restarts, **options
        )
        super().__init__(model, settings, graph)


class PGDL2(PGD):
    """`attacks.pgd` in the l2 ball, bound to a model; positional arguments are in the order of torchattacks.PGDL2.

    Args:
        model, eps, alpha, steps, random_start, restarts, options: as in `attacks.pgd`.
        eps_for_division: accepted, and without effect: a gradient of zero does not move an image.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.PGDL2(models.build("digits_cnn", width=8), eps=0.5, alpha=0.125, steps=4)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> adv = attack(images, torch.tensor([0, 1]))
        >>> bool(((adv - images).flatten(1).norm(dim=1) <= 0.5 + 1e-5).all())
        True
    """

    eps_for_division = 1e-10
    """Accepted, and without effect."""

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 1.0,
        alpha: float | Tensor = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
        *,
        restarts: int = 1,
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        check_names(type(self).__name__, options, LossOptions)
        super().__init__(model, eps, alpha, steps, random_start, norm="l2", restarts=restarts, graph=graph, **options)
