"""`random_start` against the start of a PGD attack as published code writes it, eager and compiled.

    python benchmarks/bench_random_start.py [--device cuda] [--out FILE.csv]
    make bench

All sides are public functions as users call them. The bound is the time of a copy of as many bytes: a start moves 8
bytes an element, since it reads one tensor and writes one. On a GPU each side is a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import harness
import pytest
import torch
from bench_pgd_step import EPS, SHAPES, SIDES, TOY, compiled
from harness import Case, label_of
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
    sides = {
        "ours": partial(random_start, clean, EPS, "linf", seed),
        "eager": partial(uniform_start, clean),
        "compile": partial(compiled(uniform_start, quick), clean),
    }
    labels = {"op": "random_start linf", "shape": label_of(shape), "dtype": "float32"}
    rounds = 30 if device == "cpu" else 9
    return Case(labels, sides, SIDES[1:], moved=2 * clean.nbytes, rounds=rounds, warmup=3, capture=True)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in [TOY] if quick else SHAPES[device]:
        yield case(shape, device, quick)


main = partial(harness.main, cases, __doc__, devices=tuple(SHAPES))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=label_of)
def test_random_start(timed, quick, shape, side):
    timed(case(TOY if quick else shape, quick=quick), side)


if __name__ == "__main__":
    main()
