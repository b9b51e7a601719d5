"""The Triton kernels of `pgd_step` and `random_start` on a GPU: the numbers of the registered ops and of the reference.

They are registered only where the CUDA C++ ops are not built; here they are called directly, and run in any case.
"""

import pytest
import torch
from helpers.convolution_cases import LAYOUTS
from helpers.moved_images import assert_moved_alike, step_images
from helpers.tolerances import assert_close

from sparse_adv.ops import reference

pytest.importorskip("triton", reason="Triton is not installed")

from sparse_adv.kernels import pgd_step, random_start

OPS = torch.ops.sparse_adv
SHAPES = {"in registers": (5, 3, 7, 9), "streamed": (2, 3, 47, 49)}  # a block holds 4096 elements of an image at most

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize("norm", ["linf", "l2"]),
    pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str),
    pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other"]),
    pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES),
]


@pytest.mark.parametrize("eps", [0.2, 50.0], ids=["projected", "within the ball"])
def test_the_step(shape, layout, dtype, norm, eps):
    images = step_images(shape, dtype)
    step = (0.1, eps, norm == "l2", 0.0, 1.0)
    expected = reference.pgd_step(*images, 0.1, eps, norm)
    adv, grad, clean = (LAYOUTS[layout](tensor.cuda()) for tensor in images)
    registered = OPS.pgd_step(adv, grad, clean, *step)
    moved = pgd_step.pgd_step(adv, grad.contiguous(), clean, *step)
    pgd_step.pgd_step_(adv, grad, clean, *step)
    assert moved.stride() == registered.stride()
    for actual in (moved, adv):
        assert_moved_alike(actual, registered, norm)
        assert_moved_alike(actual.cpu(), expected, norm)


def test_the_start(shape, layout, dtype, norm):
    clean, seed = step_images(shape, dtype)[2], torch.tensor([-(2**60), 2**40])
    start = (0.3, norm == "l2", 0.0, 1.0)
    expected = reference.random_start(clean, seed, 0.3, norm)
    clean, seed = LAYOUTS[layout](clean.cuda()), seed.cuda()
    registered = OPS.random_start(clean, seed, *start)
    actual = random_start.random_start(clean, seed, *start)
    assert actual.stride() == registered.stride()
    for other in (registered, expected.cuda()):
        if dtype == torch.float64:  # an FMA may round otherwise
            assert_close(actual, other, "elementwise")
        else:
            assert_moved_alike(actual, other, norm)
