"""`pgd_step` against the same formula in plain PyTorch, eager and compiled.

    python benchmarks/bench_pgd_step.py [--device cuda] [--out FILE.csv]
    make bench

All sides are public functions as users call them. The bound is the time of a copy of as many bytes: a step moves 16
bytes an element, since it reads three tensors and writes one, or 14 if the gradient is bfloat16. On a GPU each side is
a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial

import harness
import pytest
import torch
from harness import Case, compiled, label_of
from torch import Tensor

from sparse_adv.ops import pgd_step, reference

ALPHA, EPS = 2 / 255, 8 / 255
SHAPES = {
    "cpu": [(128, 3, 32, 32), (1024, 3, 32, 32), (64, 3, 224, 224)],
    "cuda": [(128, 3, 32, 32), (512, 3, 32, 32), (512, 3, 224, 224)],
}
TOY = (2, 3, 8, 8)
VARIANTS = {"linf": torch.float32, "l2": torch.float32, "linf, bfloat16 gradient": torch.bfloat16}
"""The variants that are measured, with the dtype of the gradient."""
SIDES = ("ours", "eager", "compile")  # a bfloat16 gradient without "compile", to save the seconds of compiling


def images(shape: Sequence[int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Adversarial images, their gradient and the clean images."""
    torch.manual_seed(0)
    clean = torch.rand(*shape, device=device)
    return (clean + 0.02 * torch.randn_like(clean)).clamp(0, 1), torch.randn_like(clean), clean


def case_of(
    op: str, functions: Mapping[str, Callable], moved: int, images: Tensor, *others: Tensor, **numbers: object
) -> Case:
    """The case for functions with the same operands, which move this many bytes; for all ops of an attack."""
    labels = {"op": op, "shape": label_of(images.shape), "dtype": "float32"}
    sides = {name: partial(function, images, *others, **numbers) for name, function in functions.items()}
    rounds = 30 if images.device.type == "cpu" else 9
    return Case(labels, sides, moved=moved, rounds=rounds, warmup=3, capture=True)


def of_each_shape(case: Callable[[tuple[int, ...], str, bool], Case], device: str, quick: bool) -> Iterator[Case]:
    """The cases of an op of an attack, one for each shape."""
    for shape in [TOY] if quick else SHAPES[device]:
        yield case(shape, device, quick)


@lru_cache(maxsize=1)
def case(shape: tuple[int, ...], variant: str, device: str = "cpu", quick: bool = False) -> Case:
    """The case of one shape, after a check that our result is right."""
    adv, grad, clean = images(shape, device)
    grad = grad.to(VARIANTS[variant])
    tensors, numbers = (adv, grad, clean), {"alpha": ALPHA, "eps": EPS, "norm": variant.split(",")[0]}
    torch.testing.assert_close(pgd_step(*tensors, **numbers), reference.pgd_step(*tensors, **numbers))
    functions = {"ours": pgd_step, "eager": reference.pgd_step}
    if grad.dtype == torch.float32:
        functions["compile"] = compiled(reference.pgd_step, quick)
    return case_of(f"pgd_step {variant}", functions, 3 * clean.nbytes + grad.nbytes, *tensors, **numbers)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in [TOY] if quick else SHAPES[device]:
        for variant in VARIANTS:
            yield case(shape, variant, device, quick)


main = partial(harness.main, cases, __doc__, devices=tuple(SHAPES))


@pytest.mark.parametrize(
    ("variant", "side"),
    [(v, side) for v, dtype in VARIANTS.items() for side in SIDES if dtype == torch.float32 or side != "compile"],
)
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=label_of)
def test_pgd_step(timed, quick, shape, variant, side):
    timed(case(TOY if quick else shape, variant, quick=quick), side)


if __name__ == "__main__":
    main()
