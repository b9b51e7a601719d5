"""`pgd_step` against plain PyTorch, eager and compiled: `pytest benchmarks/bench_pgd_step.py --benchmark-enable -s`."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import interleaved
from torch import Tensor

from sparse_adv.ops import pgd_step, reference

ALPHA, EPS = 2 / 255, 8 / 255
SHAPES = [(128, 3, 32, 32), (1024, 3, 32, 32), (64, 3, 224, 224)]
ROUNDS = 30
RIVALS: dict[str, Callable[..., Tensor]] = {
    "sparse_adv": pgd_step,
    "eager": reference.pgd_step,
    "compile": torch.compile(reference.pgd_step),
}


def images(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    clean = torch.rand(shape)
    return (clean + 0.02 * torch.randn(shape)).clamp(0, 1), torch.randn(shape), clean


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def tensors(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    tensors = images(request.param)
    assert torch.equal(pgd_step(*tensors, ALPHA, EPS), reference.pgd_step(*tensors, ALPHA, EPS))
    return tensors


@pytest.mark.parametrize("rival", RIVALS)
def test_linf_step(benchmark, tensors, rival):
    benchmark.group = str(tuple(tensors[0].shape))
    benchmark(RIVALS[rival], *tensors, ALPHA, EPS)


def test_ratio_of_interleaved_medians(tensors):
    sides = {name: partial(step, *tensors, ALPHA, EPS) for name, step in RIVALS.items()}
    medians = {name: times["median"] for name, times in interleaved(sides, ROUNDS).items()}
    ratios = ", ".join(f"{name} {medians[name] / medians['sparse_adv']:.2f}x" for name in ("eager", "compile"))
    print(f"\npgd_step {tuple(tensors[0].shape)}: {medians['sparse_adv'] * 1e6:.0f} us; {ratios} of that time")
