"""`pgd_step` in Triton, for GPUs if the CUDA library is not built."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.tensor_checks import check_floating

_WARP_ELEMENTS = 4 * 32  # each thread accesses 16 bytes of float32 at a time
_MAX_WARPS = 32  # for one image; larger images than these can keep in registers are read again in each loop

# Without FMAs the float64 arithmetic needs twice as many instructions. Triton is about to change the default.
OPTIONS = {"enable_fp_fusion": True}


def pgd_step(
    adv: Tensor, grad: Tensor, clean: Tensor, alpha: float, eps: float, l2: bool, lo: float, hi: float
) -> Tensor:
    """The op `sparse_adv::pgd_step`, described in `ops.pgd_step`; it does not synchronise with the GPU."""
    _check(adv, grad, clean)
    out = torch.empty_like(adv)
    _step_into(out, adv, grad, clean, alpha, eps, l2, lo, hi)
    return out


def pgd_step_(
    adv: Tensor, grad: Tensor, clean: Tensor, alpha: float, eps: float, l2: bool, lo: float, hi: float
) -> None:
    """The op `sparse_adv::pgd_step_`: `pgd_step` in place."""
    _check(adv, grad, clean)
    _step_into(adv, adv, grad, clean, alpha, eps, l2, lo, hi)


def _check(adv: Tensor, grad: Tensor, clean: Tensor) -> None:
    for name, tensor in {"adv": adv, "grad": grad, "clean": clean}.items():
        check_floating(name, tensor, adv)
        if tensor.shape != adv.shape:
            raise RuntimeError(f"sparse_adv: {name} must have the sizes of adv")


def _step_into(
    out: Tensor,
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    alpha: float,
    eps: float,
    l2: bool,
    lo: float,
    hi: float,
) -> None:
    if out.numel() == 0:
        return
    moved = out if _has_contiguous_images(out) else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    tensors = [_with_strides_of(moved, tensor) for tensor in (adv, grad, clean)]
    sizes = (alpha, eps, lo, hi)
    with torch.cuda.device_of(out):
        if not l2:
            block = 8 * _WARP_ELEMENTS  # for four warps: also with 16-bit images, each thread accesses 16 bytes
            grid = (triton.cdiv(out.numel(), block),)
            linf_kernel[grid](*tensors, moved, out.numel(), *sizes, BLOCK=block, num_warps=4, **OPTIONS)
        else:
            images = out.shape[0] if out.dim() else 1
            count = out.numel() // images
            warps = min(triton.next_power_of_2(triton.cdiv(count, _WARP_ELEMENTS)), _MAX_WARPS)
            block = warps * _WARP_ELEMENTS
            l2_kernel[(images,)](
                *tensors, moved, count, *sizes, BLOCK=block, IN_REGISTERS=count <= block, num_warps=warps, **OPTIONS
            )
    if moved is not out:
        out.copy_(moved)


def _has_contiguous_images(images: Tensor) -> bool:
    """Whether the memory has no gaps and each image is one range of it, as the l2 norm needs."""
    expected = 1
    axes = [(stride, size) for stride, size in zip(images.stride(), images.shape, strict=True) if size != 1]
    for stride, size in sorted(axes):
        if stride != expected:
            return False
        expected *= size
    return images.dim() == 0 or images.shape[0] == 1 or images.shape[0] * images.stride(0) == images.numel()


def _with_strides_of(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor if it has the strides of `like`, else a copy with these strides."""
    if all(a == b or size == 1 for a, b, size in zip(tensor.stride(), like.stride(), like.shape, strict=True)):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


@triton.jit
def clamped(x: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """NaN stays NaN, as in torch.clamp."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def linf_kernel(
    adv: tl.tensor,
    grad: tl.tensor,
    clean: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    alpha: tl.float64,
    eps: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    BLOCK: tl.constexpr,
) -> None:
    """`BLOCK` elements of the batch."""
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    slope = tl.load(grad + i, inside).to(dtype)
    centre = tl.load(clean + i, inside).to(dtype)
    sign = (slope > 0).to(dtype) - (slope < 0).to(dtype)
    radius = tl.full((), eps, dtype)
    # alpha * sign is exact, so contraction into an FMA changes no bit.
    moved = tl.load(adv + i, inside).to(dtype) + tl.full((), alpha, dtype) * sign
    moved = clamped(moved, centre - radius, centre + radius)
    moved = clamped(moved, tl.full((), lo, dtype), tl.full((), hi, dtype))
    # Clamping to bounds that are NaN changes nothing, so a NaN in clean is copied here.
    moved = tl.where(centre == centre, moved, centre)
    tl.store(out + i, moved.to(out.dtype.element_ty), inside)


@triton.jit
def l2_kernel(
    adv: tl.tensor,
    grad: tl.tensor,
    clean: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    alpha: tl.float64,
    eps: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    BLOCK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
) -> None:
    """One image of `count` elements, in tiles of `BLOCK`.

    Where one tile is enough (IN_REGISTERS), the compiler knows that each loop runs once, and merges their loads.
    """
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    image = tl.program_id(0).to(tl.int64) * count
    end = BLOCK if IN_REGISTERS else count.to(tl.int64)

    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, end, BLOCK):
        slope = _slope(grad + image, first + tl.arange(0, BLOCK), count, dtype)
        squares += slope * slope
    length = tl.sqrt(tl.sum(squares))
    rate = tl.where(length > 0, alpha / length, 0.0)

    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        moved, centre = _moved(adv + image, grad + image, clean + image, i, count, rate, dtype)
        squares += (moved.to(tl.float64) - centre) * (moved.to(tl.float64) - centre)
    distance = tl.sqrt(tl.sum(squares))
    shrink = eps / distance

    for first in range(0, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        moved, centre = _moved(adv + image, grad + image, clean + image, i, count, rate, dtype)
        projected = (centre + shrink * (moved.to(tl.float64) - centre)).to(dtype)
        moved = tl.where(distance <= eps, moved, projected)
        moved = clamped(moved, tl.full((), lo, dtype), tl.full((), hi, dtype))
        tl.store(out + image + i, moved.to(out.dtype.element_ty), i < count)


@triton.jit
def _slope(grad: tl.tensor, i: tl.tensor, count: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The gradient in float64. Entries that are not finite count as 0: one overflow would make the norm infinite."""
    slope = tl.load(grad + i, i < count, other=0).to(dtype)
    return tl.where(slope - slope == 0, slope, 0).to(tl.float64)


@triton.jit
def _moved(
    adv: tl.tensor,
    grad: tl.tensor,
    clean: tl.tensor,
    i: tl.tensor,
    count: tl.tensor,
    rate: tl.tensor,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The pixels before the projection, rounded to `dtype`, and the centre of the ball in float64."""
    start = tl.load(adv + i, i < count, other=0).to(tl.float64)
    centre = tl.load(clean + i, i < count, other=0).to(tl.float64)
    return (start + rate * _slope(grad, i, count, dtype)).to(dtype), centre
