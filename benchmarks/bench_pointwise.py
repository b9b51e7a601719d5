"""`pointwise_out`, the engine's BatchNorm in eval mode, addition and ReLU in one pass, against PyTorch.

    python benchmarks/bench_pointwise.py [--out FILE.csv]
    make bench

Forward is scale, bias, residual and ReLU with its gate, as after a convolution; backward is the residual and the gate.
The images are the activations of a CIFAR ResNet-18 at batch 64, NCHW, float32. PyTorch also writes to given memory; it
keeps the output of the ReLU where the op keeps a bit. The bound is the time of a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import harness
import pytest
import torch
from bench_batch_norm_act import SHAPES, TOY
from harness import Case, compiled, label_of
from torch import Tensor

from sparse_adv import ops

FORWARD, BACKWARD = PASSES = ("forward", "backward")
SIDES = ("ours", "eager", "compile")


def eager_forward(x: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return torch.relu(x * scale[:, None, None] + bias[:, None, None] + residual)


def eager_backward(grad: Tensor, residual: Tensor, output: Tensor) -> Tensor:
    return (grad + residual) * (output > 0)


@lru_cache(maxsize=1)
def case(shape: tuple[int, ...], pass_: str, quick: bool = False) -> Case:
    """The case of one pass, after a check that our result is right."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape)
    scale, bias = torch.randn(2, shape[1])
    out, expected = torch.empty_like(x), eager_forward(x, scale, bias, residual)
    gate = ops.empty_gate(out)
    ops.pointwise_out(x, scale, bias, residual, relu=True, gate_out=gate, out=out)
    torch.testing.assert_close(out, expected)
    if pass_ == FORWARD:
        function, operands = eager_forward, (x, scale, bias, residual)

        def ours() -> None:
            ops.pointwise_out(x, scale, bias, residual, relu=True, gate_out=gate, out=out)

    else:
        function, operands = eager_backward, (x, residual, expected)

        def ours() -> None:
            ops.pointwise_out(x, None, None, residual, gate=gate, out=out)

        ours()
        torch.testing.assert_close(out, eager_backward(*operands))
    fused = compiled(function, quick)
    sides = {"ours": ours, "eager": lambda: function(*operands), "compile": lambda: fused(*operands)}
    labels = {"op": "pointwise_out", "pass": pass_, "shape": label_of(shape), "dtype": "float32"}
    return Case(labels, sides, moved=3 * x.nbytes + gate.nbytes, rounds=9, warmup=3)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in [TOY] if quick else SHAPES[device]:
        for pass_ in PASSES:
            yield case(shape, pass_, quick)


main = partial(harness.main, cases, __doc__)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=label_of)
def test_pointwise(timed, quick, shape, pass_, side):
    timed(case(TOY if quick else shape, pass_, quick), side)


if __name__ == "__main__":
    main()
