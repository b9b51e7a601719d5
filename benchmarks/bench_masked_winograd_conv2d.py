"""`masked_winograd_conv2d_out` against the direct sparse kernel and the dense convolutions, float32 on a CPU.

    python benchmarks/bench_masked_winograd_conv2d.py [--out FILE.csv]
    make bench

The layers are those of a CIFAR ResNet-18 at batch 64, 3x3 with stride 1; the masks prune whole filters in blocks.
"ours" gets transformed filters, as in an attack, "direct" gets packed ones, and "winograd" is this library's dense op
on channels_last images. The bound is the time of the remaining multiplications: 36 for each live filter and 16 pixels.
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

from sparse_adv import masks, ops

TOY = (64, 16, 8, 8)
PASSES = ("forward", "grad_input")
BLOCKS = [(4, 4, 3, 3), (2, 2, 3, 3), (1, 1, 3, 3)]
DENSITIES = [0.4, 0.1]
SIDES = ("ours", "direct", "winograd", *DENSE)


@lru_cache(maxsize=1)
def case(shape: tuple[int, int, int, int], pass_: str, block: tuple[int, int, int, int], density: float) -> Case:
    """The case of one pass, after a check that our results are right."""
    torch.manual_seed(0)
    batch, channels, height, width = shape
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    (mask,) = masks.prune(layer, density, block).values()
    weight, transposed = layer.weight.detach() * mask, pass_ == "grad_input"
    x = torch.randn(shape)
    images, last = torch.empty_like(x), x.contiguous(memory_format=torch.channels_last)
    out, dense_out = torch.empty_like(x), torch.empty_like(last)
    pattern = ops.set_kernels(ops.pack_pattern(ops.compile_pattern(mask, block), weight), "sparse", "sparse")
    live = ops.masked_winograd_conv2d_weight(weight, pattern, transposed=transposed)
    transformed = ops.winograd_conv2d_weight(weight, tile=4, transposed=transposed)
    direct = ops.masked_conv2d_grad_input_out if transposed else ops.masked_conv2d_out

    def into(result: torch.Tensor, function: Side) -> Side:
        def side() -> torch.Tensor:
            function()
            return result

        return side

    sides: dict[str, Side] = {
        "ours": into(out, lambda: ops.masked_winograd_conv2d_out(x, live, out=out)),
        "direct": into(images, lambda: direct(x, weight, pattern, padding=1, out=images)),
        "winograd": into(dense_out, lambda: ops.winograd_conv2d_out(last, transformed, out=dense_out)),
    }
    for side, layout in DENSE.items():  # the images are the input, or the gradient of the output
        sides[side] = partial(dense, pass_, *(tensor.contiguous(memory_format=layout) for tensor in (x, x, weight)))
    expected = sides["dense"]().clone()
    for function in sides.values():
        assert (function() - expected).norm() < 1e-4 * expected.norm()
    labels = {"op": "masked_winograd_conv2d", "pass": pass_, "shape": label_of(shape)}
    labels |= {"mask": f"block {block}, density {density}"}
    macs = batch * live.values.numel() * -(-height // 4) * -(-width // 4)
    return Case(labels, sides, macs=macs)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in [TOY] if quick else SHAPES[device]:
        for pass_ in PASSES:
            for block in BLOCKS[:1] if quick else BLOCKS:
                for density in DENSITIES[-1:] if quick else DENSITIES:
                    yield case(shape, pass_, block, density)


main = partial(harness.main, cases, __doc__)


@pytest.mark.parametrize("pass_, side", [(pass_, side) for pass_ in PASSES for side in SIDES])
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=label_of)
def test_masked_winograd_conv2d(timed, quick, shape, pass_, side):
    timed(case(TOY if quick else shape, pass_, BLOCKS[0], DENSITIES[-1]), side)


if __name__ == "__main__":
    main()
