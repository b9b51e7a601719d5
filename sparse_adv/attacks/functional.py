"""The attacks as functions: `pgd`, and the single-step ones of fast adversarial training."""

from __future__ import annotations

import math
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv import ops
from sparse_adv.attacks.search import MODES, Loss, Objective, ascend, attacked, crafting, random_starts
from sparse_adv.ops.pgd_step import check_alpha, check_ball, check_floating


class Options(TypedDict, total=False):
    """Keyword arguments that all attacks share; `pgd` documents them."""

    loss: str | Loss
    targeted: bool
    lo: float
    hi: float
    generator: torch.Generator | None
    mode: str
    check: bool


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    random_start: bool = True,
    *,
    norm: str = "linf",
    loss: str | Loss = "ce",
    restarts: int = 1,
    targeted: bool = False,
    lo: float = 0.0,
    hi: float = 1.0,
    generator: torch.Generator | None = None,
    mode: str = "eval",
    check: bool = True,
) -> Tensor:
    """Projected gradient descent: `steps` times adv = project(adv + alpha * direction(gradient of the loss)).

    Args:
        model: maps images in [lo, hi] to logits [N, classes].
        x: float tensor [N, ...], the clean images.
        y: int64 tensor [N]: the true classes, or the classes to reach if targeted. With a callable loss, whatever it
            takes.
        eps: radius of the ball around each image, in image units.
        alpha: step size in image units.
        steps: number of steps, each one forward and one backward pass.
        random_start: start at a random point of the ball rather than at x.
        norm: "linf" or "l2".
        loss: "ce" (cross-entropy) or a callable, see `Loss`.
        restarts: number of random starts; per image the result of highest loss is kept. With more than one, a scalar
            loss is called image by image to compare them.
        targeted: descend the loss towards y instead of ascending it.
        lo, hi: the range of pixel values.
        generator: where the random start's one number is drawn; None draws it from PyTorch's global generator.
        mode: what BatchNorm layers do meanwhile: "eval" uses their running statistics, "train" those of the batch and
            updates the running ones, "batch" those of the batch and leaves the running ones. All else (dropout) is in
            eval mode.
        check: look at the values of x and y (on a GPU this waits for them).

    Returns:
        The adversarial images, detached, of x's shape, dtype and memory format, in [lo, hi].

    Raises:
        TypeError: if x is not floating, y not int64 or model not a module.
        ValueError: if a value, shape or name is out of range.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018), section 2.1.
    """
    _check_settings(model, eps, alpha, norm, lo, hi, steps, loss, mode)
    if restarts < 1 or (restarts > 1 and not random_start):
        raise ValueError(f"restarts must be 1, or more with random_start=True, got {restarts}")
    if check:
        check_batch(x, y, loss, lo, hi)

    def step(adv: Tensor, grad: Tensor) -> Tensor:
        return ops.pgd_step(adv, grad, x, alpha, eps, norm, lo, hi)

    starts = random_starts(x, restarts, eps, norm, lo, hi, generator) if random_start else [x.detach]
    return ascend(model, x, y, starts, step, steps, Objective(loss, targeted, check), mode)


def fgsm(
    model: nn.Module, x: Tensor, y: Tensor, eps: float = 8 / 255, *, norm: str = "linf", **options: Unpack[Options]
) -> Tensor:
    """The fast gradient (sign) method: one step of size eps from x; arguments as in `pgd`.

    Source: Goodfellow et al., "Explaining and harnessing adversarial examples" (ICLR 2015), section 4.
    """
    return pgd(model, x, y, eps, eps, 1, False, norm=norm, **options)


def fgsm_rs(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    alpha: float | None = None,
    *,
    norm: str = "linf",
    **options: Unpack[Options],
) -> Tensor:
    """FGSM from a random start: one step of size alpha, by default 1.25 eps; arguments as in `pgd`.

    Source: Wong et al., "Fast is better than free" (ICLR 2020), algorithm 3.
    """
    return pgd(model, x, y, eps, 1.25 * eps if alpha is None else alpha, 1, True, norm=norm, **options)


def n_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    alpha: float | None = None,
    *,
    loss: str | Loss = "ce",
    targeted: bool = False,
    lo: float = 0.0,
    hi: float = 1.0,
    generator: torch.Generator | None = None,
    mode: str = "eval",
    check: bool = True,
) -> Tensor:
    """N-FGSM: noise from U(-2 eps, 2 eps), then one linf step of size alpha, by default eps; no projection.

    The result lies in [lo, hi] but may be 2 eps + alpha away from x: it is for training, not for measuring robustness.
    Arguments as in `pgd`.

    Source: de Jorge et al., "Make some noise" (NeurIPS 2022), algorithm 1.
    """
    alpha = eps if alpha is None else alpha
    _check_settings(model, eps, alpha, "linf", lo, hi, 1, loss, mode)
    if check:
        check_batch(x, y, loss, lo, hi)

    def step(adv: Tensor, grad: Tensor) -> Tensor:
        return ops.pgd_step(adv, grad, x, alpha, math.inf, "linf", lo, hi)

    starts = random_starts(x, 1, 2 * eps, "linf", -math.inf, math.inf, generator)
    return ascend(model, x, y, starts, step, 1, Objective(loss, targeted, check), mode)


def tpgd(
    model: nn.Module,
    x: Tensor,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    *,
    lo: float = 0.0,
    hi: float = 1.0,
    generator: torch.Generator | None = None,
    mode: str = "eval",
    check: bool = True,
) -> Tensor:
    """The attack of TRADES: linf PGD that maximises KL(p(x) || p(adv)), with no labels; arguments as in `pgd`.

    It starts from uniform noise of 0.001, since the divergence has no gradient at x itself. The probabilities of x are
    computed once.

    Source: Zhang et al., "Theoretically principled trade-off between robustness and accuracy" (ICML 2019), algorithm 1,
    whose noise is normal with deviation 0.001.
    """
    _check_settings(model, eps, alpha, "linf", lo, hi, steps, "ce", mode)
    if check:
        _check_images(x, lo, hi)
    with crafting(model, mode), torch.no_grad():
        clean = F.log_softmax(attacked(model)(x), 1)

    def divergence(logits: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, 1), target, reduction="none", log_target=True).sum(1)

    def step(adv: Tensor, grad: Tensor) -> Tensor:
        return ops.pgd_step(adv, grad, x, alpha, eps, "linf", lo, hi)

    starts = random_starts(x, 1, min(eps, 0.001), "linf", lo, hi, generator)
    return ascend(model, x, clean, starts, step, steps, Objective(divergence, False, check), mode)


def _check_settings(
    model: nn.Module,
    eps: float,
    alpha: float,
    norm: str,
    lo: float,
    hi: float,
    steps: int,
    loss: str | Loss,
    mode: str,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_ball(eps, norm, lo, hi)
    check_alpha(alpha)
    if loss != "ce" and not callable(loss):
        raise ValueError(f'loss must be "ce" or a callable, got {loss!r}')
    if mode not in MODES:
        raise ValueError(f'mode must be "eval", "train" or "batch", got {mode!r}')
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer that is not negative, got {steps!r}")


def check_batch(x: Tensor, y: Tensor, loss: str | Loss = "ce", lo: float = 0.0, hi: float = 1.0) -> None:
    """Refuse images outside [lo, hi] or not finite, and labels that do not fit them."""
    _check_images(x, lo, hi)
    if callable(loss):
        return
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y must be an int64 tensor, got {y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have one label per image, shape [{len(x)}], got {tuple(y.shape)}")


def _check_images(x: Tensor, lo: float, hi: float) -> None:
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be a batch of images [N, ...], got shape {tuple(x.shape)}")
    if x.numel():
        low, high = (value.item() for value in x.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("x must be finite, got NaN or infinite values")
        if low < lo or high > hi:
            raise ValueError(
                f"x must lie in [{lo:g}, {hi:g}], got values from {low:g} to {high:g}: put the normalisation inside "
                "the model"
            )
