"""BatchNorm in eval mode as a factor and a summand for each channel, of all layers of a program together.

The vectors are short, so on a GPU folding costs only launches: more than 100 if 20 layers are folded one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class FoldedNorm(NamedTuple):
    """A BatchNorm as scale * x + shift, in at least float32."""

    scale: Tensor
    shift: Tensor
    bias: Tensor
    """The shift in the dtype of the arithmetic."""


def fold_norms(norms: Sequence[_BatchNorm], dtype: torch.dtype) -> list[FoldedNorm]:
    """Fold the present weights and statistics of layers in eval mode.

    Args:
        dtype: of the arithmetic.
    """
    if not norms:
        return []
    means, variances = ([_widened(getattr(norm, name)) for norm in norms] for name in ("running_mean", "running_var"))
    scales = torch._foreach_rsqrt(torch._foreach_add(variances, [norm.eps for norm in norms]))
    _apply(torch._foreach_mul_, scales, [norm.weight for norm in norms])
    shifts = torch._foreach_neg(torch._foreach_mul(means, scales))
    _apply(torch._foreach_add_, shifts, [norm.bias for norm in norms])
    biases = shifts
    if any(shift.dtype != dtype for shift in shifts):
        biases = tuple(torch.empty_like(shift, dtype=dtype) for shift in shifts)
        torch._foreach_copy_(biases, shifts)
    return list(map(FoldedNorm, scales, shifts, biases))


def _widened(vector: Tensor) -> Tensor:
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def _apply(operation: Callable[..., None], targets: Sequence[Tensor], operands: Iterable[Tensor | None]) -> None:
    """Change the targets that have an operand, in place."""
    pairs = [(target, each.detach()) for target, each in zip(targets, operands, strict=True) if each is not None]
    if pairs:
        operation(*zip(*pairs, strict=True))
