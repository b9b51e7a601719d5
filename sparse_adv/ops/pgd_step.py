"""`pgd_step`: one fused step of projected gradient ascent: move along the gradient, project, clamp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_adv.argument_types import shortened
from sparse_adv.ops._library import check_capability, cuda_stand_in
from sparse_adv.ops.arguments import check_floating, check_number, overlap_partly, overlaps_itself
from sparse_adv.ops.written import mark_written, returns_nothing

NORMS = ("linf", "l2")


def pgd_step(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    *,
    alpha: float,
    eps: float,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """Move images along the gradient by alpha, project them on the ball around the clean ones, clamp to [lo, hi].

    For "linf", equivalent bit for bit (the sign of NaN is 0) to::

        adv = adv + alpha * grad.sign()
        adv = adv.clamp(clean - eps, clean + eps).clamp(lo, hi)

    and for "l2", with g one image's gradient and d one image's offset, to::

        adv = adv + alpha * g / norm(g)
        d = adv - clean
        adv = (clean + d * min(1, eps / norm(d))).clamp(lo, hi)

    where entries of g that are not finite count as 0, a zero gradient does not move the image, and norms are summed in
    float64. The step is not differentiable: the output is detached. Results do not depend on the number of threads.

    Args:
        adv: float tensor [N, ...], the images to move. 16-bit images are computed in float32 and rounded once.
        grad: float tensor of adv's shape, of any float dtype: the loss's gradient at adv.
        clean: float tensor of adv's shape and dtype: the centre of the ball.
        alpha: step size in image units; negative to descend.
        eps: radius of the ball in image units; `math.inf` for no projection.
        norm: "linf" or "l2", also written "Linf" or "L2".
        lo, hi: the range of pixel values.

    Returns:
        float tensor of adv's shape and dtype, with the strides of `torch.empty_like(adv)`.

    Raises:
        TypeError: if an image tensor is not floating, the dtypes of adv and clean differ, or alpha, eps, lo or hi is
            not a number.
        ValueError: if shapes or devices differ, alpha is not finite, eps is negative, lo > hi, or the norm is unknown.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018), section 2.1.

    Examples:
        >>> clean, grad = torch.full((1, 3), 0.5), torch.tensor([[2.0, 0.0, -3.0]])
        >>> pgd_step(clean, grad, clean, alpha=0.25, eps=0.125)
        tensor([[0.6250, 0.5000, 0.3750]])
    """
    norm = check_step(adv, grad, clean, alpha, eps, norm, lo, hi)
    return torch.ops.sparse_adv.pgd_step(adv.detach(), grad.detach(), clean.detach(), alpha, eps, norm == "l2", lo, hi)


def pgd_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    *,
    alpha: float,
    eps: float,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """`pgd_step` in place: writes the moved images into adv, whatever its strides, and returns it.

    Args:
        adv: as for `pgd_step`, and written to. Its elements must not share memory with each other, or with other
            elements of grad or clean; adv may be clean itself. If it requires grad, the call must be under
            `torch.no_grad()`, as everywhere in PyTorch.
        grad, clean, alpha, eps, norm, lo, hi: as for `pgd_step`.

    Returns:
        adv.

    Raises:
        TypeError: as for `pgd_step`.
        ValueError: as for `pgd_step`, and if adv requires grad and gradients are enabled, or memory is shared.

    Source: as for `pgd_step`.

    Examples:
        >>> adv, clean = torch.full((1, 2), 0.5), torch.full((1, 2), 0.5)
        >>> pgd_step_(adv, torch.tensor([[1.0, -1.0]]), clean, alpha=0.25, eps=0.125) is adv
        True
        >>> adv
        tensor([[0.6250, 0.3750]])
    """
    norm = check_step(adv, grad, clean, alpha, eps, norm, lo, hi)
    if adv.requires_grad and torch.is_grad_enabled():
        raise ValueError("adv requires grad: call pgd_step_ under torch.no_grad(), or use pgd_step")
    if not torch.compiler.is_compiling():
        _check_memory(adv, grad, clean)
        if adv.is_neg():  # a view of a complex tensor: its memory holds -adv
            with torch.no_grad():
                return adv.copy_(pgd_step(adv, grad, clean, alpha=alpha, eps=eps, norm=norm, lo=lo, hi=hi))
        grad, clean = grad.resolve_neg(), clean.resolve_neg()
    torch.ops.sparse_adv.pgd_step_(adv.detach(), grad.detach(), clean.detach(), alpha, eps, norm == "l2", lo, hi)
    mark_written(adv)
    return adv


def _check_memory(adv: Tensor, grad: Tensor, clean: Tensor) -> None:
    """Raises ValueError if a write to adv would change elements that are still to be read."""
    if overlaps_itself(adv):
        raise ValueError(f"several elements of adv share memory (strides {adv.stride()}): clone it first")
    for name, tensor in {"grad": grad, "clean": clean}.items():
        if overlap_partly(adv, tensor):
            raise ValueError(f"adv and {name} share a part of their memory: clone one of them first")


def check_ball(eps: float, norm: str, lo: float, hi: float) -> str:
    """Returns the norm in lower case; TypeError or ValueError unless eps, norm and range describe a ball of images."""
    for name, number in {"eps": eps, "lo": lo, "hi": hi}.items():
        check_number(name, number)
    if not isinstance(norm, str) or norm.lower() not in NORMS:
        raise ValueError(f'norm must be "linf" or "l2", got {shortened(norm)}')
    if not eps >= 0:
        raise ValueError(f"eps must not be negative or NaN, got {eps}")
    if not lo <= hi:
        raise ValueError(f"lo must not exceed hi, got lo={lo} and hi={hi}")
    return norm.lower()  # torchattacks writes "Linf" and "L2"


def check_alpha(alpha: float) -> None:
    """Raises TypeError or ValueError unless this is a step size."""
    check_number("alpha", alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")


def check_step(
    adv: Tensor, grad: Tensor, clean: Tensor, alpha: float, eps: float, norm: str, lo: float, hi: float
) -> str:
    """Returns the norm as `check_ball`; TypeError or ValueError unless these are arguments of a step."""
    norm = check_ball(eps, norm, lo, hi)
    check_alpha(alpha)
    check_floating("adv", adv)
    for name, tensor in {"grad": grad, "clean": clean}.items():
        check_floating(name, tensor)
        if tensor.shape != adv.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, adv {tuple(adv.shape)}: they must agree")
        if tensor.device != adv.device:
            raise ValueError(f"{name} is on {tensor.device}, adv on {adv.device}")
    if clean.dtype != adv.dtype:
        raise TypeError(f"clean is {clean.dtype}, adv is {adv.dtype}: they must agree")
    check_capability(adv.device)
    return norm


@torch.library.register_fake("sparse_adv::pgd_step")
def _(adv: Tensor, *_: object) -> Tensor:
    return torch.empty_like(adv)


returns_nothing("pgd_step_")


# Triton is imported only when it is needed, because torch for CPUs does not install it.
@cuda_stand_in("pgd_step")
def _(adv: Tensor, grad: Tensor, clean: Tensor, alpha: float, eps: float, l2: bool, lo: float, hi: float) -> Tensor:
    from sparse_adv.kernels import pgd_step as kernels

    return kernels.pgd_step(adv, grad, clean, alpha, eps, l2, lo, hi)


@cuda_stand_in("pgd_step_")
def _(adv: Tensor, grad: Tensor, clean: Tensor, alpha: float, eps: float, l2: bool, lo: float, hi: float) -> None:
    from sparse_adv.kernels import pgd_step as kernels

    kernels.pgd_step_(adv, grad, clean, alpha, eps, l2, lo, hi)
