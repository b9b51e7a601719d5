"""`pgd_step_normalized`: a linf step that also returns the images normalised, in bfloat16, as a network's input."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.kernels.layout import in_layout_of, layout_of
from sparse_adv.ops._library import IMPLEMENTATIONS
from sparse_adv.ops.arguments import check_tensors
from sparse_adv.ops.pgd_step import check_step


def pgd_step_normalized(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    alpha: float,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Make one linf step of an attack, and return the moved images also normalised, in bfloat16 and channels_last.

    Equivalent to::

        adv = pgd_step(adv, grad, clean, alpha=alpha, eps=eps, lo=lo, hi=hi)
        input = ((adv - mean[:, None, None]) / std[:, None, None]).bfloat16().to(memory_format=torch.channels_last)

    On CUDA this is one pass, which moves 18 bytes per element instead of 22, and one kernel launch less. It is meant
    for your own attack loops with a network that takes normalised images; grad is still the gradient at adv. This
    library's attacks do not use it, because they normalise in the network. Where `torch.compile` can be used, the
    compiled formula takes 0.8 to 0.9 times as long (docs/results/gpu.md).

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

    Source: as for `pgd_step`.

    Examples:
        >>> clean = torch.full((1, 1, 1, 2), 0.5)
        >>> mean, std, grad = torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)
        >>> adv, input = pgd_step_normalized(clean, grad, clean, mean, std, alpha=0.125, eps=0.5)
        >>> adv.flatten().tolist(), input.flatten().tolist()
        ([0.625, 0.375], [0.5, -0.5])
    """
    check_step(adv, grad, clean, alpha, eps, "linf", lo, hi)
    if adv.dim() != 4:
        raise ValueError(f"adv must be [N, C, H, W], got shape {tuple(adv.shape)}")
    check_tensors(mean=mean, std=std)
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
    """The implementation for all devices without CUDA ops."""
    moved = torch.ops.sparse_adv.pgd_step(in_layout_of(adv, adv), grad, clean, alpha, eps, False, *pixels)
    normalized = (moved - mean[:, None, None]) / std[:, None, None]
    return moved, normalized.to(torch.bfloat16, memory_format=torch.channels_last)


IMPLEMENTATIONS.impl("pgd_step_normalized", _in_two_passes, "CompositeExplicitAutograd")
