"""`max_pool2d_out` and `max_pool2d_grad_input_out` against PyTorch's max pooling.

    python benchmarks/bench_max_pool2d.py [--out FILE.csv]
    make bench

The images are those that a VGG-16 pools at batch 64: windows of 2 x 2, NCHW and channels_last, float32. The bound is
the time of a copy of as many bytes: forward reads the input and writes output and index, backward the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import harness
import pytest
import torch
import torch.nn.functional as F
from bench_batch_norm_act import FORMATS, SHAPES, TOY
from harness import Case, label_of

from sparse_adv import ops

WINDOW = (2, 2)
FORWARD, BACKWARD = PASSES = ("forward", "backward")
SIDES = ("ours", "eager")


@lru_cache(maxsize=1)
def case(shape: tuple[int, ...], format: str, pass_: str) -> Case:
    """The case of one pass, after a check that our result is right."""
    torch.manual_seed(0)
    x = torch.randn(*shape).to(memory_format=FORMATS[format]).requires_grad_()
    image, expected = x.detach(), F.max_pool2d(x, WINDOW)
    grad = torch.randn_like(expected)
    out, index, grad_input = torch.empty_like(grad), torch.empty_like(grad, dtype=torch.uint8), torch.empty_like(image)
    ops.max_pool2d_out(image, WINDOW, out=out, index=index)
    ops.max_pool2d_grad_input_out(grad, index, WINDOW, out=grad_input)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(grad_input, *torch.autograd.grad(expected, x, grad, retain_graph=True))
    sides: dict[str, Callable[[], object]]
    if pass_ == FORWARD:
        sides = {
            "ours": lambda: ops.max_pool2d_out(image, WINDOW, out=out, index=index),
            "eager": lambda: F.max_pool2d(image, WINDOW, return_indices=True),
        }
    else:
        sides = {
            "ours": lambda: ops.max_pool2d_grad_input_out(grad, index, WINDOW, out=grad_input),
            "eager": lambda: torch.autograd.grad(expected, x, grad, retain_graph=True),
        }
    labels = {"op": "max_pool2d_out", "pass": pass_, "shape": label_of(shape), "layout": format, "dtype": "float32"}
    return Case(labels, sides, moved=image.nbytes + out.nbytes + index.nbytes, rounds=9, warmup=3)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for shape in [TOY] if quick else SHAPES[device]:
        for format in FORMATS:
            for pass_ in PASSES:
                yield case(shape, format, pass_)


main = partial(harness.main, cases, __doc__)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=label_of)
def test_max_pool2d(timed, quick, shape, pass_, side):
    timed(case(TOY if quick else shape, "NCHW", pass_), side)


if __name__ == "__main__":
    main()
