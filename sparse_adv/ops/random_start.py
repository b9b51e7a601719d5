"""`random_start`: move images to random points of the balls around them, as the start of an attack."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparse_adv.argument_types import shortened
from sparse_adv.ops._library import check_capability, cuda_stand_in
from sparse_adv.ops.arguments import check_floating, check_tensors
from sparse_adv.ops.pgd_step import check_ball

_SEEDS = range(-(2**63), 2**63)


def random_start(
    clean: Tensor,
    eps: float,
    *,
    norm: str = "linf",
    seed: int | Tensor | torch.Generator = 0,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """Add noise that is uniform in the ball of radius eps, then clamp to [lo, hi].

    For "linf", equivalent to::

        (clean + torch.empty_like(clean).uniform_(-eps, eps)).clamp(lo, hi)

    and for "l2", with z one image of normal noise, u uniform in (0, 1] and d the number of its elements, to::

        (clean + eps * u ** (1 / d) * z / norm(z)).clamp(lo, hi)

    The random number generator is counter-based: element i of the batch, in NCHW order, reads word i % 4 of Philox
    block i // 4 + offset. So the numbers depend neither on the number of threads nor on the memory layout. The wider
    noise of N-FGSM is `random_start(clean, 2 * eps, lo=-math.inf, hi=math.inf)`. The output is detached.

    Args:
        clean: float tensor [N, ...]. 16-bit images are computed in float32 and rounded once.
        eps: radius of the ball in image units.
        norm: "linf" or "l2", also written "Linf" or "L2".
        seed: a 64-bit integer; or an int64 tensor [2], Philox key and block offset (the next offset that shares no
            number with this call is `offset + ceil(clean.numel() / 4)`); or a generator, from which one number is
            drawn. The default gives the same noise in each call; attacks draw a number from PyTorch's generator.
        lo, hi: the range of pixel values.

    Returns:
        float tensor of clean's shape and dtype, with the strides of `torch.empty_like(clean)`.

    Raises:
        TypeError: if clean is not floating or seed has another type.
        ValueError: if eps is negative or infinite, lo > hi, the norm is unknown, or a seed tensor is not [2].

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Philox4x32-10; Madry et al. (ICLR
    2018), section 4, for starting at a random point.

    Examples:
        >>> clean = torch.rand(2, 3, 8, 8)
        >>> start = random_start(clean, eps=0.1, seed=7)
        >>> bool((start - clean).abs().max() <= 0.1), torch.equal(start, random_start(clean, eps=0.1, seed=7))
        (True, True)
    """
    check_floating("clean", clean)
    norm = check_ball(eps, norm, lo, hi)
    if eps == float("inf"):
        raise ValueError("eps must be finite, got inf")
    check_capability(clean.device)
    # A blocking copy would wait for all work that the GPU has queued.
    state = as_philox_state(seed).to(clean.device, non_blocking=True)
    return torch.ops.sparse_adv.random_start(clean.detach(), state, eps, norm == "l2", lo, hi)


def as_philox_state(seed: int | Tensor | torch.Generator | None, name: str = "seed") -> Tensor:
    """Convert a seed to the Philox state, an int64 tensor [2] of key and offset.

    None draws the key from PyTorch's global CPU generator. Errors call the seed by `name`.

    Examples:
        >>> as_philox_state(5)
        tensor([5, 0])
    """
    if isinstance(seed, Tensor):
        check_tensors(**{name: seed})
        if seed.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {seed.dtype}")
        if seed.shape != (2,):
            raise ValueError(f"{name} must have shape [2] (key and offset), got {tuple(seed.shape)}")
        return seed
    if seed is None or isinstance(seed, torch.Generator):
        device = seed.device if seed is not None else "cpu"
        key = torch.randint(_SEEDS[0], _SEEDS[-1], (1,), generator=seed, device=device)
        return torch.cat([key, torch.zeros_like(key)])
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"{name} must be an int, an int64 tensor [2] or a torch.Generator, got {shortened(seed)}")
    if int(seed) not in _SEEDS:
        raise ValueError(f"{name} must fit in a signed 64-bit integer, got {shortened(seed)}")
    return torch.tensor([int(seed), 0], device="cpu")


@torch.library.register_fake("sparse_adv::random_start")
def _(clean: Tensor, *_: object) -> Tensor:
    return torch.empty_like(clean)


@cuda_stand_in("random_start")
def _(clean: Tensor, seed: Tensor, eps: float, l2: bool, lo: float, hi: float) -> Tensor:
    from sparse_adv.kernels import random_start as kernels

    return kernels.random_start(clean, seed, eps, l2, lo, hi)
