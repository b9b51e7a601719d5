"""`random_start` in Triton, for GPUs if the CUDA library is not built; it gives the CPU kernel's numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_adv.kernels.pgd_step import OPTIONS, clamped
from sparse_adv.kernels.tensor_checks import check_floating

# The third word of the Philox counter, so that elements and radii never read the same numbers.
_ELEMENTS, _RADII = tl.constexpr(0), tl.constexpr(1)
_TURN = tl.constexpr(6.283185307179586)

_WARP_BLOCKS = 32  # Philox blocks of a warp, each of four elements
_MAX_WARPS = 32  # for one image; the noise of larger images than these can keep in registers is drawn twice


def random_start(clean: Tensor, seed: Tensor, eps: float, l2: bool, lo: float, hi: float) -> Tensor:
    """The op `sparse_adv::random_start`, described in `ops.random_start`; it does not synchronise with the GPU.

    The kernels read key and offset from GPU memory, so a CUDA graph whose offset is changed between replays draws new
    numbers.
    """
    check_floating("clean", clean, clean)
    if seed.device != clean.device or seed.shape != (2,) or seed.dtype != torch.int64:
        raise RuntimeError("sparse_adv: seed must be an int64 tensor of size [2] on the device of the images")
    out = torch.empty_like(clean)
    if out.numel() == 0:
        return out
    # Elements are numbered in NCHW order, so that the layout of the images does not change their noise.
    clean = clean.contiguous()
    moved = out if out.is_contiguous() else torch.empty_like(clean)
    arguments = (clean, moved, seed, seed.stride(0))
    with torch.cuda.device_of(out):
        if not l2:
            block = 8 * _WARP_BLOCKS  # by four warps
            grid = (triton.cdiv(out.numel(), 4 * block),)
            linf_kernel[grid](*arguments, out.numel(), eps, lo, hi, BLOCK=block, num_warps=4, **OPTIONS)
        else:
            images = out.shape[0] if out.dim() else 1
            count = out.numel() // images
            most = (count + 6) // 4  # an image may share its first block and its last one with its neighbours
            warps = min(triton.next_power_of_2(triton.cdiv(most, _WARP_BLOCKS)), _MAX_WARPS)
            block = warps * _WARP_BLOCKS
            l2_kernel[(images,)](
                *arguments, count, eps, lo, hi, BLOCK=block, IN_REGISTERS=most <= block, num_warps=warps, **OPTIONS
            )
    if moved is not out:
        out.copy_(moved)
    return out


@triton.jit
def linf_kernel(
    clean: tl.tensor,
    out: tl.tensor,
    seed: tl.tensor,
    seed_stride: tl.tensor,
    count: tl.tensor,
    eps: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    BLOCK: tl.constexpr,
) -> None:
    """Elements of `BLOCK` Philox blocks of the batch.

    For float32 the product of eps and a 24-bit fraction is exact in float64, so contraction into an FMA changes no bit.
    """
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    block = tl.program_id(0).to(tl.int64) * BLOCK
    w0, w1, w2, w3 = _draw(seed, seed_stride, block + tl.arange(0, BLOCK), _ELEMENTS)
    bits = _in_order(w0, w1, w2, w3)
    fraction = (bits >> 8).to(tl.float64) * 2**-23 - 1
    i = 4 * block + tl.arange(0, 4 * BLOCK)
    moved = tl.load(clean + i, i < count).to(tl.float64) + tl.full((), eps, dtype).to(tl.float64) * fraction
    _store(out + i, moved.to(dtype), lo, hi, i < count)


@triton.jit
def l2_kernel(
    clean: tl.tensor,
    out: tl.tensor,
    seed: tl.tensor,
    seed_stride: tl.tensor,
    count: tl.tensor,
    eps: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    BLOCK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
) -> None:
    """One image of `count` elements, in tiles of `BLOCK` Philox blocks: a random direction times a random radius.

    The normal numbers are drawn twice: for their norm, and for the direction. Where one tile is enough (IN_REGISTERS),
    the compiler knows that each loop runs once, and merges the draws.
    """
    dtype: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    image = tl.program_id(0).to(tl.int64)
    begin, end = image * count, image * count + count
    blocks = (end + 3) // 4 - begin // 4
    stop = BLOCK if IN_REGISTERS else blocks

    squares = tl.zeros([4 * BLOCK], tl.float64)
    for first in range(0, stop, BLOCK):
        block = begin // 4 + first
        normal = _normal(seed, seed_stride, block, BLOCK)
        i = 4 * block + tl.arange(0, 4 * BLOCK)
        squares += tl.where((i >= begin) & (i < end), normal * normal, 0)
    total = tl.sum(squares)

    w0, w1, w2, w3 = _draw(seed, seed_stride, image // 4, _RADII)
    place = image % 4
    bits = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
    # The radius has density ~ radius^(count - 1), so it is a power of a uniform number.
    radius = eps * tl.exp(tl.log(_unit(bits)) / tl.full((), count, tl.float64))
    scale = tl.where(total > 0, radius / tl.sqrt(total), 0)

    for first in range(0, stop, BLOCK):
        block = begin // 4 + first
        # Rounded before scaling, as on the CPU.
        normal = _normal(seed, seed_stride, block, BLOCK).to(dtype).to(tl.float64)
        i = 4 * block + tl.arange(0, 4 * BLOCK)
        own = (i >= begin) & (i < end)
        moved = tl.load(clean + i, own).to(tl.float64) + scale * normal
        _store(out + i, moved.to(dtype), lo, hi, own)


@triton.jit
def _draw(
    seed: tl.tensor, seed_stride: tl.tensor, block: tl.tensor, STREAM: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Words of Philox4x32-10 blocks: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)."""
    key, offset = tl.load(seed), tl.load(seed + seed_stride)
    counter = (block + offset).to(tl.uint64)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    return tl.philox(key, low, high, low * 0 + STREAM, low * 0)


@triton.jit
def _in_order(x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor) -> tl.tensor:
    """Interleave: element 4 i + k of the result is element i of xk, so that a thread has consecutive elements."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape([4 * x0.shape[0]])


@triton.jit
def _unit(bits: tl.tensor) -> tl.tensor:
    """A number in (0, 1], so that its logarithm is finite."""
    return (bits.to(tl.float64) + 1) * 2**-32


@triton.jit
def _normal(seed: tl.tensor, seed_stride: tl.tensor, block: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Box-Muller on two neighbouring words: the cosine for the even element, the sine for the odd one."""
    w0, w1, w2, w3 = _draw(seed, seed_stride, block + tl.arange(0, BLOCK), _ELEMENTS)
    radius0, radius2 = tl.sqrt(-2 * tl.log(_unit(w0))), tl.sqrt(-2 * tl.log(_unit(w2)))
    cos0, sin0 = _cos_and_sin(_unit(w1))
    cos2, sin2 = _cos_and_sin(_unit(w3))
    return _in_order(radius0 * cos0, radius0 * sin0, radius2 * cos2, radius2 * sin2)


@triton.jit
def _cos_and_sin(turns: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Cosine and sine of an angle in turns, 0 to 1, by Taylor series around the nearest quarter turn.

    `tl.cos` accepts angles of any size, but needs three times as many registers, and stack memory.
    """
    quarter = (4 * turns + 0.5).to(tl.int32)
    angle = (turns - 0.25 * quarter.to(tl.float64)) * _TURN
    square = angle * angle
    cos, sin = tl.full(turns.shape, 1, tl.float64), tl.full(turns.shape, 1, tl.float64)
    for k in tl.static_range(16, 0, -2):
        cos = 1 - cos * square * (1 / (k * (k - 1)))
        sin = 1 - sin * square * (1 / (k * (k + 1)))
    sin *= angle
    cos, sin = tl.where(quarter % 2 == 0, cos, -sin), tl.where(quarter % 2 == 0, sin, cos)
    back = (quarter == 2) | (quarter == 3)
    return tl.where(back, -cos, cos), tl.where(back, -sin, sin)


@triton.jit
def _store(out: tl.tensor, moved: tl.tensor, lo: tl.tensor, hi: tl.tensor, mask: tl.tensor) -> None:
    moved = clamped(moved, tl.full((), lo, moved.dtype), tl.full((), hi, moved.dtype))
    tl.store(out, moved.to(out.dtype.element_ty), mask)
