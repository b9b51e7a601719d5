"""`batch_norm_act` against BatchNorm, addition and ReLU of PyTorch, eager and compiled, forward and backward.

    python benchmarks/bench_batch_norm_act.py [--device cuda] [--out FILE.csv]
    make bench

The images are the activations of a CIFAR ResNet-18: on a CPU at batch 64, NCHW and channels_last, float32; on a GPU at
batch 128, channels_last, bfloat16, each side a CUDA graph in which both passes are captured together. The bound is the
time of a copy of as many bytes: forward reads the input (and the residual) and writes the output, backward reads
gradient and input and writes the gradient of the input (and that of the residual).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import harness
import pytest
import torch
from harness import Case, compiled, label_of
from torch import Tensor

from sparse_adv.ops import batch_norm_act, reference

SHAPES = {
    "cpu": [(64, 64, 32, 32), (64, 128, 16, 16), (64, 256, 8, 8), (64, 512, 4, 4)],
    "cuda": [(128, 64, 32, 32), (128, 512, 4, 4)],
}
TOY = (4, 3, 4, 4)
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
FORMATS_OF = {"cpu": tuple(FORMATS), "cuda": ("channels_last",)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
PASSES = {"cpu": (FORWARD, BACKWARD), "cuda": (FORWARD, BOTH)}
TENSORS = {FORWARD: 2, BACKWARD: 3, BOTH: 5}
"""Number of tensors that a pass moves, without a residual's."""
SIDES = ("ours", "eager", "compile")  # on a GPU "compile" only with a residual, to save the seconds of compiling


class Operands(NamedTuple):
    """Leaves of autograd; the residual may be absent."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None


def operands(shape: Sequence[int], format: str, has_residual: bool, device: str) -> Operands:
    torch.manual_seed(0)
    options = {"dtype": DTYPES[device], "memory_format": FORMATS[format]}
    images = [torch.randn(*shape, device=device).to(**options) for _ in range(1 + has_residual)]
    vectors = torch.rand(shape[1], device=device), torch.randn(shape[1], device=device)
    input, *rest = [tensor.requires_grad_() for tensor in images]
    return Operands(input, *(vector.requires_grad_() for vector in vectors), *(rest or [None]))


def run(function: Callable[..., Tensor], leaves: Operands) -> Tensor:
    return function(leaves.input, leaves.weight, leaves.bias, residual=leaves.residual)


def side(function: Callable[..., Tensor], leaves: Operands, pass_: str, grad: Tensor) -> Callable[[], object]:
    """The timed call; backward is timed alone, on one forward pass."""
    if pass_ == FORWARD:
        return torch.no_grad()(partial(run, function, leaves))
    inputs = [leaf for leaf in leaves if leaf is not None]
    if pass_ == BOTH:
        return lambda: torch.autograd.grad(run(function, leaves), inputs, grad)
    return partial(torch.autograd.grad, run(function, leaves), inputs, grad, retain_graph=True)


@lru_cache(maxsize=1)
def case(
    shape: tuple[int, ...], format: str, has_residual: bool, pass_: str, device: str = "cpu", quick: bool = False
) -> Case:
    """The case of one pass, after a check that our result is right."""
    leaves = operands(shape, format, has_residual, device)
    error = 1e-4 if leaves.input.dtype == torch.float32 else 4e-2
    torch.testing.assert_close(
        run(batch_norm_act, leaves), run(reference.batch_norm_act, leaves), rtol=error, atol=error
    )
    grad = torch.randn_like(leaves.input)
    functions = {"ours": batch_norm_act, "eager": reference.batch_norm_act}
    if device == "cpu" or has_residual:
        functions["compile"] = compiled(reference.batch_norm_act, quick)
    sides = {name: side(function, leaves, pass_, grad) for name, function in functions.items()}
    name = "batch_norm_act with residual" if has_residual else "batch_norm_act"
    dtype = str(DTYPES[device]).removeprefix("torch.")
    labels = {"op": name, "pass": pass_, "shape": label_of(shape), "layout": format, "dtype": dtype}
    moved = grad.nbytes * (TENSORS[pass_] + has_residual * (2 if pass_ == BOTH else 1))
    return Case(labels, sides, moved=moved, rounds=9, warmup=3, capture=True)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in [TOY] if quick else SHAPES[device]:
        for format in FORMATS_OF[device]:
            for has_residual in (False, True):
                for pass_ in PASSES[device]:
                    yield case(shape, format, has_residual, pass_, device, quick)


main = partial(harness.main, cases, __doc__, devices=tuple(SHAPES))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("pass_", PASSES["cpu"])
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=label_of)
def test_batch_norm_act(timed, quick, shape, pass_, side):
    timed(case(TOY if quick else shape, "NCHW", True, pass_, quick=quick), side)


if __name__ == "__main__":
    main()
