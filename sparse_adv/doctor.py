"""Checks an installation: what is there, and whether every op agrees with plain PyTorch, forward and backward."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import sparse_adv
from sparse_adv import ops
from sparse_adv.ops import reference

TOLERANCE = 1e-5
"""Relative: sums of some hundred float32 products differ by rounding, not by more."""


def run() -> int:
    """Print what is there and check every op; 0 if all is well, 1 if not."""
    for name, value in facts().items():
        print(f"{name:<16}{value}")
    failures = []
    for name, check in CHECKS.items():
        begin = time.perf_counter()
        try:
            error = check()
        except Exception as reason:  # a doctor reports whatever breaks
            verdict = f"FAILED: {type(reason).__name__}: {reason}"
        else:
            verdict = "ok" if error <= TOLERANCE else f"FAILED: differs from the reference by {error:.2g}"
        print(f"{name:<36}{1e3 * (time.perf_counter() - begin):8.1f} ms  {verdict}")
        if verdict != "ok":
            failures.append(name)
    print("SUCCESS" if not failures else f"FAILURE: {', '.join(failures)}")
    return 1 if failures else 0


def facts() -> dict[str, str]:
    """Versions, and what the ops would use."""
    built = ops.build_facts()
    cuda = (
        f"{torch.cuda.get_device_name()} (torch built for {torch.version.cuda})" if torch.cuda.is_available() else "no"
    )
    return {
        "sparse_adv": f"{sparse_adv.__version__} (built with {built['compiler']})",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "instruction set": ops.cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "ops": ", ".join(op for op in OPS if hasattr(torch.ops.sparse_adv, op)),
        "CUDA": cuda,
        "ops on CUDA": ops.cuda_ops(),
    }


def _masked_conv2d(block: tuple[int, int], path: str) -> float:
    """Forward with every part of the epilogue, and all gradients, on one kernel path."""
    noise = torch.Generator().manual_seed(0)
    x = torch.rand(2, 12, 7, 9, generator=noise)
    weight = torch.randn(16, 12, 3, 3, generator=noise)
    kept = torch.rand(16 // block[0], 12 // block[1], 3, 3, generator=noise) < 0.3
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    bias, scale = torch.randn(2, 16, generator=noise)
    residual = torch.randn(2, 16, 7, 9, generator=noise)
    pattern = ops.set_kernels(ops.compile_pattern(mask, block), forward=path, grad_input=path, grad_weight=path)

    def results(op: Callable[..., Tensor], structure: Tensor | ops.Pattern) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, scale, residual)]
        y = op(leaves[0], leaves[1], structure, leaves[2], 1, 1, scale=leaves[3], residual=leaves[4], relu=True)
        return [y.detach(), *torch.autograd.grad(y.square().mean(), leaves)]

    return _difference(results(ops.masked_conv2d, pattern), results(reference.masked_conv2d, mask))


def _pgd_step(norm: str) -> float:
    noise = torch.Generator().manual_seed(0)
    clean, adv = torch.rand(2, 3, 2, 5, 7, generator=noise)
    grad = torch.randn(3, 2, 5, 7, generator=noise)
    step = (grad, clean, 0.1, 0.3, norm)
    expected = reference.pgd_step(adv, *step)
    return _difference([ops.pgd_step(adv, *step), ops.pgd_step_(adv.clone(), *step)], [expected, expected])


def _random_start(norm: str) -> float:
    clean = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    seed = torch.tensor([7, 0])
    return _difference([ops.random_start(clean, 0.3, norm, seed)], [reference.random_start(clean, seed, 0.3, norm)])


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor; a NaN is infinitely far away."""
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(actual, expected, strict=True)]
    return float(torch.stack(errors).nan_to_num(nan=float("inf")).max())


OPS = (
    "masked_conv2d",
    "masked_conv2d_grad_input",
    "masked_conv2d_grad_weight",
    "pgd_step",
    "pgd_step_",
    "pgd_step_normalized",
    "random_start",
)
CHECKS: dict[str, Callable[[], float]] = {
    **{
        f"masked_conv2d {block} {path}": partial(_masked_conv2d, block, path)
        for block in ((1, 1), (4, 1))
        for path in ("sparse", "dense")
    },
    **{f"pgd_step {norm}": partial(_pgd_step, norm) for norm in ("linf", "l2")},
    **{f"random_start {norm}": partial(_random_start, norm) for norm in ("linf", "l2")},
}
