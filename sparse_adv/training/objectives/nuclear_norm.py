"""The nuclear norm of a matrix and its gradient, by matrix products and inverses.

PyTorch's nuclear norm decomposes the matrix. On a GPU the host waits for that, and for a matrix with NaN it raises a
linear algebra error, although training should report that it diverged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_SMALLEST = 1e-6
"""Singular values above this share of the Frobenius norm count in full, smaller ones in part."""


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Return the sum of the singular values of a matrix, with its gradient, computed in float64.

    With the decomposition A = U S V^T, the gradient is the polar factor U V^T, and the norm is <U V^T, A>.

    Args:
        matrix: float tensor [rows, columns].

    Returns:
        A scalar of the dtype of the matrix, at least float32.

    Source: Nakatsukasa et al., "Optimizing Halley's iteration for computing the matrix polar decomposition" (SIAM
    J. Matrix Anal. Appl. 2010), equations 3.1 to 3.9 and 3.24.

    Examples:
        >>> round(nuclear_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])).item(), 4)
        7.0
    """
    return _NuclearNorm.apply(matrix)


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        factor = _polar_factor(matrix)
        ctx.save_for_backward(factor)
        ctx.dtype = matrix.dtype
        return (factor * matrix).sum().to(torch.promote_types(matrix.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        return (gradients[0] * factor).to(ctx.dtype)


def _polar_factor(matrix: Tensor) -> Tensor:
    """U V^T of a matrix; 0 for a matrix of zeros."""
    if matrix.shape[0] < matrix.shape[1]:
        return _polar_factor(matrix.T).T
    x = matrix.double()
    x = x / x.norm().clamp_min(torch.finfo(torch.float64).tiny)
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    least = _SMALLEST
    while least < 1 - 1e-12:  # the coefficients, and so the number of iterations, are the same for every matrix
        d = (4 * (1 - least**2) / least**4) ** (1 / 3)
        root = math.sqrt(1 + d)
        a = root + math.sqrt(8 - 4 * d + 8 * (2 - least**2) / (least**2 * root)) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        inverse, _ = torch.linalg.inv_ex(one + c * (x.T @ x))
        x = b / c * x + (a - b / c) * (x @ inverse)
        least = min(1.0, least * (a + b * least**2) / (1 + c * least**2))
    return x
