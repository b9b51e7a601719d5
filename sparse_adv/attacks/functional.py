"""The attacks as functions: `pgd`, the single-step attacks of fast adversarial training, and the attack of TRADES."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from sparse_adv.attacks.checks import Model
from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.loop import run_attack
from sparse_adv.attacks.options import AttackOptions, CommonOptions, Loss, LossOptions


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
        restarts: number of random starts. An image that one of them misclassifies (or that reaches its target) is
            returned, whatever its loss; of the others the one with the highest loss. To compare them, a loss that
            returns a scalar is evaluated image by image: with one row of labels that are a tensor [N, ...], and with
            all of any others.
        targeted: minimise the loss instead of maximising it.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        generator: generator of the random starts, of which one number is drawn; None for PyTorch's global generator; or
            an int64 tensor [2] of Philox key and offset, as `ops.random_start` takes it.
        bn_mode: mode of BatchNorm layers during the attack: "eval" uses the running statistics; "train" uses the
            statistics of the batch and updates the running ones at each step; "batch" uses the statistics of the batch
            and leaves the running ones unchanged. All other layers (dropout) are in eval mode, and so are
            frozen BatchNorm layers: those in eval mode inside of a model in training mode.
        check: check the values of images and labels, and take rounding out of the result, so that it lies in the ball
            without slack; on a GPU this synchronises.
        graphs: cache of CUDA graphs, see `Graphs`; None runs the attack step by step, and so does a tensor as eps,
            alpha, lo or hi.
        engine: whether the engine may form the gradients, see `sparse_adv.engine`; False leaves them to autograd.
        early_stop: leave an image where it is as soon as a step finds it misclassified (or at its target). The
            labels must be classes.

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


def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    norm: str = "linf",
    **options: Unpack[LossOptions],
) -> Tensor:
    """Fast gradient (sign) method: one step of size eps from the clean images.

    Args:
        model, images, labels, eps, norm, options: as in `pgd`; options are loss, targeted, lo, hi, generator, bn_mode,
            check, graphs, engine and early_stop.

    Returns:
        The adversarial images, detached, as in `pgd`.

    Raises:
        TypeError, ValueError: as in `pgd`.

    Source: Goodfellow et al., "Explaining and harnessing adversarial examples" (ICLR 2015), section 4.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])
        >>> adv = attacks.fgsm(model, images, labels, eps=0.25)
        >>> (adv - images).unique()  # -eps, +eps
        tensor([-0.2500,  0.2500])
    """
    return run_attack(model, images, labels, AttackOptions.fgsm(eps, norm, **options))


def fgsm_rs(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor | None = None,
    norm: str = "linf",
    **options: Unpack[LossOptions],
) -> Tensor:
    """FGSM with a random start: one step of size alpha from a random point of the ball, then projection.

    Args:
        alpha: step size; None for 1.25 eps.
        model, images, labels, eps, norm, options: as in `pgd`; options are loss, targeted, lo, hi, generator, bn_mode,
            check, graphs, engine and early_stop.

    Returns:
        The adversarial images, detached, as in `pgd`.

    Raises:
        TypeError, ValueError: as in `pgd`.

    Source: Wong et al., "Fast is better than free" (ICLR 2020), algorithm 3.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
        >>> adv = attacks.fgsm_rs(model, images, labels, eps=0.1)
        >>> bool((adv - images).abs().max() <= 0.1 + 1e-6)
        True
    """
    return run_attack(model, images, labels, AttackOptions.fgsm_rs(eps, alpha, norm, **options))


def n_fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor | None = None,
    norm: str = "linf",
    **options: Unpack[LossOptions],
) -> Tensor:
    """N-FGSM: noise from U(-2 eps, 2 eps), then one signed step of size alpha, without projection.

    The result is clamped to [lo, hi] but may be 2 eps + alpha away from the clean image: use it for training, not for
    measuring robustness. The paper has linf only; for l2 the noise is uniform in the ball of radius 2 eps.

    Args:
        alpha: step size; None for eps.
        model, images, labels, eps, norm, options: as in `pgd`; options are loss, targeted, lo, hi, generator, bn_mode,
            check, graphs, engine and early_stop.

    Returns:
        The adversarial images, detached, as in `pgd`.

    Raises:
        TypeError, ValueError: as in `pgd`.

    Source: de Jorge et al., "Make some noise" (NeurIPS 2022), algorithm 1.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
        >>> adv = attacks.n_fgsm(model, images, labels, eps=0.1)
        >>> bool((adv - images).abs().max() <= 0.3 + 1e-6)  # 2 eps + alpha
        True
    """
    return run_attack(model, images, labels, AttackOptions.n_fgsm(eps, alpha, norm, **options))


def tpgd(
    model: Model,
    images: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    alpha: float | Tensor = 2 / 255,
    steps: int = 10,
    norm: str = "linf",
    **options: Unpack[CommonOptions],
) -> Tensor:
    """The attack of TRADES: PGD that maximises KL(p(images) || p(adv)), without labels.

    It starts from uniform noise in [-0.001, 0.001], for l2 in the ball of radius 0.05 (as long as noise of 0.001 on an
    image of CIFAR), because the divergence has no gradient at the clean images. Their probabilities p(images) are
    computed once.

    Args:
        model, images, eps, alpha, steps, norm, options: as in `pgd`; options are lo, hi, generator, bn_mode, check,
            graphs and engine.

    Returns:
        The adversarial images, detached, as in `pgd`.

    Raises:
        TypeError, ValueError: as in `pgd`.

    Source: Zhang et al., "Theoretically principled trade-off between robustness and accuracy" (ICML 2019), algorithm 1;
    the noise there is normal with standard deviation 0.001.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> adv = attacks.tpgd(model, images, eps=0.1, alpha=0.025)
        >>> bool((adv - images).abs().max() <= 0.1 + 1e-6)
        True
    """
    return run_attack(model, images, None, AttackOptions.tpgd(eps, alpha, steps, norm, **options))
