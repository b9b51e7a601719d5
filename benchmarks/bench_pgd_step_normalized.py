"""`pgd_step_normalized` against the same formula in plain PyTorch, eager and compiled.

    python benchmarks/bench_pgd_step_normalized.py [--device cuda] [--out FILE.csv]
    make bench

All sides are public functions as users call them. The bound is the time of a copy of as many bytes: 18 an element,
since the step reads three tensors and writes one in float32 and one in bfloat16. On a CPU ours is two passes. On a GPU
each side is a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache, partial

import harness
import pytest
import torch
from bench_pgd_step import ALPHA, EPS, SHAPES, SIDES, TOY, case_of, images, of_each_shape
from harness import Case, compiled, label_of
from torch import Tensor

from sparse_adv.ops import pgd_step_normalized, reference


def plain(*tensors: Tensor, **numbers: float) -> tuple[Tensor, Tensor]:
    """The reference, with the network's input in channels_last."""
    adv, normalized = reference.pgd_step_normalized(*tensors, **numbers)
    return adv, normalized.contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=1)
def case(shape: tuple[int, ...], device: str = "cpu", quick: bool = False) -> Case:
    """The case of one shape, after a check that our result is right."""
    adv, grad, clean = images(shape, device)
    mean, std = torch.full((2, shape[1]), 0.25, device=device)
    tensors, numbers = (adv, grad, clean, mean, std), {"alpha": ALPHA, "eps": EPS}
    # The bfloat16 tensor may differ in its last bit.
    ours, expected = pgd_step_normalized(*tensors, **numbers), plain(*tensors, **numbers)
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-5)
    functions = dict(zip(SIDES, (pgd_step_normalized, plain, compiled(plain, quick)), strict=True))
    return case_of("pgd_step_normalized linf", functions, 18 * clean.numel(), *tensors, **numbers)


cases = partial(of_each_shape, case)
main = partial(harness.main, cases, __doc__, devices=tuple(SHAPES))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=label_of)
def test_pgd_step_normalized(timed, quick, shape, side):
    timed(case(TOY if quick else shape, quick=quick), side)


if __name__ == "__main__":
    main()
