"""`batch_norm_act` against BatchNorm, addition and ReLU of PyTorch, eager and compiled, forward and backward.

    python benchmarks/bench_batch_norm_act.py [--out FILE.csv]
    make bench

The images are the activations of a CIFAR ResNet-18 at batch 64, NCHW and channels_last, float32. The bound is the time
of a copy of as many bytes: forward reads the input (and the residual) and writes the output, backward reads gradient
and input and writes the gradient of the input (and that of the residual).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import harness
import pytest
import torch
from bench_pgd_step import compiled
from harness import Case, label_of
from torch import Tensor

from sparse_adv.ops import batch_norm_act, reference

SHAPES = [(64, 64, 32, 32), (64, 128, 16, 16), (64, 256, 8, 8), (64, 512, 4, 4)]
TOY = (4, 3, 4, 4)
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "backward")
SIDES = ("ours", "eager", "compile")


class Operands(NamedTuple):
    """Leaves of autograd; the residual may be absent."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None


def operands(shape: Sequence[int], format: str, has_residual: bool) -> Operands:
    torch.manual_seed(0)
    images = [torch.randn(*shape).contiguous(memory_format=FORMATS[format]) for _ in range(1 + has_residual)]
    vectors = torch.rand(shape[1]), torch.randn(shape[1])
    input, *rest = [tensor.requires_grad_() for tensor in images]
    return Operands(input, *(vector.requires_grad_() for vector in vectors), *(rest or [None]))


def run(function: Callable[..., Tensor], leaves: Operands) -> Tensor:
    return function(leaves.input, leaves.weight, leaves.bias, residual=leaves.residual)


def side(function: Callable[..., Tensor], leaves: Operands, pass_: str, grad: Tensor) -> Callable[[], object]:
    """What is timed: backward on one forward pass."""
    if pass_ == "forward":
        return torch.no_grad()(partial(run, function, leaves))
    inputs = [leaf for leaf in leaves if leaf is not None]
    return partial(torch.autograd.grad, run(function, leaves), inputs, grad, retain_graph=True)


@lru_cache(maxsize=1)
def case(shape: tuple[int, ...], format: str, has_residual: bool, pass_: str, quick: bool = False) -> Case:
    """Asserts that ours is right."""
    leaves = operands(shape, format, has_residual)
    torch.testing.assert_close(run(batch_norm_act, leaves), run(reference.batch_norm_act, leaves), rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(leaves.input)
    functions = {
        "ours": batch_norm_act,
        "eager": reference.batch_norm_act,
        "compile": compiled(reference.batch_norm_act, quick),
    }
    sides = {name: side(function, leaves, pass_, grad) for name, function in functions.items()}
    name = "batch_norm_act with residual" if has_residual else "batch_norm_act"
    labels = {"op": name, "pass": pass_, "shape": label_of(shape), "layout": format, "dtype": "float32"}
    moved = grad.nbytes * ((2 if pass_ == "forward" else 3) + has_residual)
    return Case(labels, sides, ["eager", "compile"], moved=moved, rounds=9, warmup=3)


def cases(quick: bool = False) -> Iterator[Case]:
    for shape in [TOY] if quick else SHAPES:
        for format in FORMATS:
            for has_residual in (False, True):
                for pass_ in PASSES:
                    yield case(shape, format, has_residual, pass_, quick)


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.start(harness.argument_parser(__doc__), arguments)
    harness.measure(cases(options.quick), options)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=label_of)
def test_batch_norm_act(timed, quick, shape, pass_, side):
    timed(case(TOY if quick else shape, "NCHW", True, pass_, quick), side)


if __name__ == "__main__":
    main()
