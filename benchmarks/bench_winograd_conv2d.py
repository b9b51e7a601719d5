"""`winograd_conv2d` against the direct convolution of PyTorch, in all passes, float32 on a CPU.

    python benchmarks/bench_winograd_conv2d.py [--out FILE.csv]
    make bench

The layers are those of a CIFAR ResNet-18 at batch 64, 3x3 with stride 1. Ours is channels_last, PyTorch's is measured
in both layouts. Our forward is `winograd_conv2d` with the transformation of its weights, and without it ("engine": an
attack transforms the weights once for all its steps); grad_input likewise. The engine chooses the tiles. The bound is
the time of the remaining multiplications: 36 for each pair of channels and 16 pixels, or 16 for 4 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import harness
import pytest
import torch
from bench_batch_norm_act import SHAPES
from convolutions import DENSE, dense
from harness import Case, label_of
from timing import Side
from torch import nn

from sparse_adv import ops
from sparse_adv.engine.fastest_kernel import winograd_tile

TOY = (64, 16, 8, 8)
SIDES = {
    "forward": ("ours", "engine", *DENSE),
    "grad_input": ("ours", "engine", *DENSE),
    "grad_weight": ("ours", *DENSE),
}


@lru_cache(maxsize=1)
def case(shape: tuple[int, int, int, int], pass_: str, tile: int | None = None) -> Case:
    """The case of one pass, after a check that our result is right."""
    torch.manual_seed(0)
    batch, channels, height, width = shape
    x, grad = torch.randn(2, *shape)
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    weight = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    tile = tile or winograd_tile(nn.Conv2d(channels, channels, 3, padding=1, device="meta"), shape)
    assert tile is not None
    operators = torch.ops.sparse_adv
    sides: dict[str, Side]
    if pass_ == "grad_weight":
        sides = {"ours": lambda: operators.winograd_conv2d_grad_weight(grad, x, (1, 1), tile)}
    else:
        transposed = pass_ == "grad_input"
        images, transformed = (
            grad if transposed else x,
            ops.winograd_conv2d_weight(weight, tile=tile, transposed=transposed),
        )

        def engine() -> torch.Tensor:
            ops.winograd_conv2d_out(images, transformed, out=out)
            return out

        sides = {
            "ours": lambda: operators.winograd_conv2d(images, weight, None, (1, 1), tile, transposed),
            "engine": engine,
        }
    for side, layout in DENSE.items():
        sides[side] = partial(dense, pass_, *(tensor.contiguous(memory_format=layout) for tensor in (x, grad, weight)))
    expected = sides["dense"]()
    for function in sides.values():
        assert (function() - expected).norm() < 1e-4 * expected.norm()
    labels = {"op": "winograd_conv2d", "pass": pass_, "shape": label_of(shape), "tile": tile}
    products = (tile + 2) ** 2 * -(-height // tile) * -(-width // tile)
    return Case(labels, sides, [*DENSE], macs=batch * channels * channels * products)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in [TOY] if quick else SHAPES[device]:
        for pass_ in ops.PASSES:
            yield case(shape, pass_)


main = partial(harness.main, cases, __doc__)


@pytest.mark.parametrize("pass_, side", [(pass_, side) for pass_ in ops.PASSES for side in SIDES[pass_]])
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=label_of)
def test_winograd_conv2d(timed, quick, shape, pass_, side):
    timed(case(TOY if quick else shape, pass_), side)


if __name__ == "__main__":
    main()
