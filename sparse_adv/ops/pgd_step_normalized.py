"""`pgd_step_normalized`: a linf step that also leaves the next pass's input as a network in bfloat16 wants it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.kernels.layout import in_layout_of, layout_of
from sparse_adv.ops._library import IMPLEMENTATIONS
from sparse_adv.ops.pgd_step import check_step


def pgd_step_normalized(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    mean: Tensor,
    std: Tensor,
    alpha: float,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One linf step of an attack, and the moved images normalised, in bfloat16 and channels_last.

    Equivalent to::

        adv = pgd_step(adv, grad, clean, alpha, eps, "linf", lo, hi)
        input = ((adv - mean[:, None, None]) / std[:, None, None]).bfloat16().to(memory_format=torch.channels_last)

    On CUDA in one pass: 18 bytes an element instead of 22, with the conversion's launch saved. For a loop of your own
    whose network takes normalised images; the gradient is still the one with respect to adv.

    Args:
        adv: float32 tensor [N, C, H, W], the images to move.
        grad: float tensor of adv's shape, of any float dtype: the loss's gradient at adv.
        clean: float32 tensor of adv's shape: the centre of the ball.
        mean, std: float32 tensors [C].
        alpha, eps, lo, hi: as for `pgd_step`.

    Returns:
        The moved images, float32, and the network's input, bfloat16, both of adv's shape.

    Raises:
        TypeError: if an image tensor or statistic is not float32.
        ValueError: as for `pgd_step`, and if adv is not [N, C, H, W] or mean or std not [C].
    """
    check_step(adv, grad, clean, alpha, eps, "linf", lo, hi)
    if adv.dim() != 4:
        raise ValueError(f"adv must be [N, C, H, W], got shape {tuple(adv.shape)}")
    for name, tensor in {"adv": adv, "mean": mean, "std": std}.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")
    for name, statistic in {"mean": mean, "std": std}.items():
        if statistic.shape != adv.shape[1:2]:
            raise ValueError(f"{name} must have shape [{adv.shape[1]}], got {tuple(statistic.shape)}")
        if statistic.device != adv.device:
            raise ValueError(f"{name} is on {statistic.device}, adv on {adv.device}")
    images = (adv.detach(), grad.detach(), clean.detach(), mean.detach().contiguous(), std.detach().contiguous())
    return torch.ops.sparse_adv.pgd_step_normalized(*images, alpha, eps, lo, hi)


@torch.library.register_fake("sparse_adv::pgd_step_normalized")
def _(adv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(adv, memory_format=layout_of(adv)),
        torch.empty_like(adv, dtype=torch.bfloat16, memory_format=torch.channels_last),
    )


def _in_two_passes(
    adv: Tensor, grad: Tensor, clean: Tensor, mean: Tensor, std: Tensor, alpha: float, eps: float, *pixels: float
) -> tuple[Tensor, Tensor]:
    """Wherever the CUDA ops are not."""
    moved = torch.ops.sparse_adv.pgd_step(in_layout_of(adv, adv), grad, clean, alpha, eps, "linf", *pixels)
    normalized = (moved - mean[:, None, None]) / std[:, None, None]
    return moved, normalized.to(torch.bfloat16, memory_format=torch.channels_last)


IMPLEMENTATIONS.impl("pgd_step_normalized", _in_two_passes, "CompositeExplicitAutograd")
