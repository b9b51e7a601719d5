"""Values that are probably wrong: of another type, dtype, shape, layout or device, or out of range."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_PLAIN: list[Callable[[], object]] = [
    lambda: None,
    lambda: "x",
    lambda: "sparse",
    lambda: "l2",
    lambda: b"",
    lambda: True,
    lambda: 0,
    lambda: 1,
    lambda: -1,
    lambda: 3,
    lambda: 2**31,
    lambda: 2**62,
    lambda: 2**63,
    lambda: -(2**70),
    lambda: 1.5,
    lambda: 0.0,
    lambda: math.nan,
    lambda: math.inf,
    lambda: -math.inf,
    lambda: 1j,
    list,
    lambda: [1],
    lambda: (2, 2),
    lambda: (1, 2, 3),
    lambda: (-1, 0),
    lambda: (2**62, 2**62),
    lambda: ("a", "b"),
    lambda: (None, 1),
    dict,
    object,
    lambda: np.zeros(3),
    lambda: np.float32(0.25),
    lambda: np.int64(2),
    lambda: torch.float32,
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.ones(2, dtype=torch.int64),
    lambda: torch.zeros(2, 3, 4, 5),
    lambda: torch.Generator(),
]

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


def _expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape) if tensor.dim() and tensor.shape[0] else tensor.expand(2, *tensor.shape)


def _overlapping(tensor: Tensor) -> Tensor:
    return tensor.flatten().as_strided(tensor.shape, [min(stride, 1) for stride in tensor.stride()])


_OF_TENSORS: list[Callable[[Tensor], object]] = [
    lambda t: t.unsqueeze(0),
    lambda t: t[0] if t.dim() and t.shape[0] else t,
    lambda t: t[:0],
    lambda t: t[1:],
    lambda t: t[..., 1:],
    lambda t: t.flatten(),
    lambda t: torch.cat([t, t]),
    lambda t: torch.cat([t, t], -1),
    lambda t: torch.cat([t, t], -1)[..., ::2],
    lambda t: t.transpose(0, -1),
    lambda t: t.mT,
    lambda t: t.permute(*reversed(range(t.dim()))),
    lambda t: t.contiguous(memory_format=torch.channels_last),
    _expanded,
    _overlapping,
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.detach().float().requires_grad_(),
    lambda t: t.tolist(),
    lambda t: t.numpy(),
    lambda t: t * math.nan,
    lambda t: t / 0.0,
    lambda t: torch.nn.Parameter(t),
    lambda t: t.to(torch.complex64).imag,
    lambda t: t.float().neg().view_as(t),
    lambda t: torch._neg_view(t),
]


def spoil(rng: random.Random, value: object) -> object:
    """Another value in place of an argument; what it is depends on the generator alone."""
    if isinstance(value, Tensor) and rng.random() < 0.7:
        try:
            changed = value.to(rng.choice(_DTYPES)) if rng.random() < 0.3 else rng.choice(_OF_TENSORS)(value)
            if isinstance(changed, Tensor) and changed.layout == torch.strided:
                changed.detach().clone()  # of some dtypes there is nothing but the tensor
            return changed
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None  # there is no such tensor
    return rng.choice(_PLAIN)()
