"""The attacks as functions: `pgd`, and the single-step ones of fast adversarial training."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from sparse_adv.attacks.checks import check_batch
from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.loop import MODES, Ball, Loss, Objective, Search, attacked, divergence
from sparse_adv.ops.pgd_step import check_alpha, check_ball
from sparse_adv.ops.random_start import seed_words


class CommonOptions(TypedDict, total=False):
    """Keyword arguments of all attacks, those without labels included; `pgd` documents them."""

    lo: float
    hi: float
    generator: torch.Generator | None
    mode: str
    check: bool
    graphs: Graphs | None


class Options(CommonOptions, total=False):
    """Keyword arguments of all attacks that take labels."""

    loss: str | Loss
    targeted: bool


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
    graphs: Graphs | None = None,
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
        check: look at the values of x and y (on a GPU this waits for them, before anything runs).
        graphs: where attacks on a GPU that come again are kept as CUDA graphs; None runs step by step.

    Returns:
        The adversarial images, detached, of x's shape, dtype and memory format, in [lo, hi].

    Raises:
        TypeError: if x is not floating, y not int64 or model not a module.
        ValueError: if a value, shape or name is out of range.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018), section 2.1.
    """
    if restarts < 1 or (restarts > 1 and not random_start):
        raise ValueError(f"restarts must be 1, or more with random_start=True, got {restarts}")
    start = Ball(eps, norm, lo, hi) if random_start else None
    options: Options = {"loss": loss, "targeted": targeted, "lo": lo, "hi": hi, "mode": mode}
    options |= {"generator": generator, "check": check, "graphs": graphs}
    return _run(model, x, y, start, eps, alpha, steps, norm, restarts, **options)


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
    **options: Unpack[Options],
) -> Tensor:
    """N-FGSM: noise from U(-2 eps, 2 eps), then one linf step of size alpha, by default eps; no projection.

    The result lies in [lo, hi] but may be 2 eps + alpha away from x: it is for training, not for measuring robustness.
    Arguments as in `pgd`.

    Source: de Jorge et al., "Make some noise" (NeurIPS 2022), algorithm 1.
    """
    check_ball(eps, "linf", 0.0, 1.0)
    start = Ball(2 * eps, "linf", -math.inf, math.inf)
    return _run(model, x, y, start, math.inf, eps if alpha is None else alpha, 1, **options)


def tpgd(
    model: nn.Module,
    x: Tensor,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    **options: Unpack[CommonOptions],
) -> Tensor:
    """The attack of TRADES: linf PGD that maximises KL(p(x) || p(adv)), with no labels; arguments as in `pgd`.

    It starts from uniform noise of 0.001, since the divergence has no gradient at x itself. The probabilities of x are
    computed once.

    Source: Zhang et al., "Theoretically principled trade-off between robustness and accuracy" (ICML 2019), algorithm 1,
    whose noise is normal with deviation 0.001.
    """
    start = Ball(min(eps, 0.001), "linf", options.get("lo", 0.0), options.get("hi", 1.0))
    return _run(model, x, None, start, eps, alpha, steps, loss=divergence, targeted=False, **options)


def _run(
    model: nn.Module,
    x: Tensor,
    y: Any,
    start: Ball | None,
    eps: float,
    alpha: float,
    steps: int,
    norm: str = "linf",
    restarts: int = 1,
    /,
    *,
    loss: str | Loss = "ce",
    targeted: bool = False,
    lo: float = 0.0,
    hi: float = 1.0,
    generator: torch.Generator | None = None,
    mode: str = "eval",
    check: bool = True,
    graphs: Graphs | None = None,
) -> Tensor:
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
    labels = check_batch(x, y, not callable(loss), lo, hi) if check else None
    with torch.inference_mode(False):  # or what is made here could not be written to
        words = None
        if start is not None:
            # Without waiting, to a GPU.
            words = seed_words(generator).to(x.device, non_blocking=x.device.type == "cuda")
        if not len(x):
            return x.detach().clone()
        search = Search(
            attacked(model), Objective(loss, targeted), start, Ball(eps, norm, lo, hi), alpha, steps, restarts, mode
        )
        run = search.run if graphs is None else partial(graphs.run, search)
        return run(x, y, words, labels)
