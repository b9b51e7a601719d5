"""`random_start` against the start of a PGD attack as published code writes it, eager and compiled.

    python benchmarks/bench_random_start.py [--device cuda] [--out FILE.csv]
    make bench

All sides are public functions as users call them. The bound is the time of a copy of as many bytes: a start moves 8
bytes an element, since it reads one tensor and writes one. On a GPU each side is a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache, partial

import harness
import pytest
import torch
from bench_pgd_step import EPS, SHAPES, SIDES, TOY, case_of, of_each_shape
from harness import Case, compiled, label_of
from torch import Tensor

from sparse_adv.ops import random_start


def uniform_start(clean: Tensor) -> Tensor:
    """The start of TRADES, MadryLab's and Wong's repositories."""
    return (clean + torch.empty_like(clean).uniform_(-EPS, EPS)).clamp(0, 1)


@lru_cache(maxsize=1)
def case(shape: tuple[int, ...], device: str = "cpu", quick: bool = False) -> Case:
    torch.manual_seed(0)
    clean = torch.rand(shape, device=device)
    seed = torch.tensor([1, 0], device=device)
    functions = {
        "ours": partial(random_start, eps=EPS, seed=seed),
        "eager": uniform_start,
        "compile": compiled(uniform_start, quick),
    }
    return case_of("random_start linf", functions, 2 * clean.nbytes, clean)


cases = partial(of_each_shape, case)
main = partial(harness.main, cases, __doc__, devices=tuple(SHAPES))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=label_of)
def test_random_start(timed, quick, shape, side):
    timed(case(TOY if quick else shape, quick=quick), side)


if __name__ == "__main__":
    main()
