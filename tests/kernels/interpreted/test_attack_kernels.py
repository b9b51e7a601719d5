"""The Triton kernels of `pgd_step` and `random_start`, interpreted: the numbers of the CPU's ops."""

import math

import pytest
import torch
from helpers.convolution_cases import LAYOUTS
from helpers.moved_images import assert_moved_alike, step_images
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adv.kernels import pgd_step, random_start
from sparse_adv.ops import reference

OPS = torch.ops.sparse_adv
DTYPES = (torch.float32, torch.float64, torch.float16)  # interpreted, a cast to bfloat16 does not round
SHAPES = ((5, 3, 7, 9), (2, 3, 40, 40), (1, 1), (0, 3, 4, 4), (3,), (), (2, 5000))


norms = st.sampled_from(("linf", "l2"))
dtypes = st.sampled_from(DTYPES)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # NumPy's, of planted NaN and zeros
@settings(max_examples=15)
@given(st.sampled_from(SHAPES), dtypes, dtypes, norms, st.integers(0, 99))
def test_the_step(shape, dtype, grad_dtype, norm, seed):
    adv, grad, clean = step_images(shape, dtype, seed)
    grad = grad.to(grad_dtype)
    if grad.numel():
        grad.view(-1)[seed % grad.numel()] = (0.0, math.nan, math.inf, -math.inf)[seed % 4]
        clean.view(-1)[seed // 2 % clean.numel()] = (0.5, math.nan)[seed % 2] if norm == "linf" else 0.5
    eps = (0.05, 0.3, math.inf)[seed % 3]
    expected = reference.pgd_step(adv, grad, clean, 0.1, eps, norm)
    step = (0.1, eps, norm == "l2", 0.0, 1.0)
    assert_moved_alike(pgd_step.pgd_step(adv, grad, clean, *step), expected, norm)
    moved = adv.clone()
    pgd_step.pgd_step_(moved, grad, clean, *step)
    assert_moved_alike(moved, expected, norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["contiguous", "channels_last"])
def test_the_step_takes_any_layout(layout, other, norm):
    adv, grad, clean = step_images((3, 3, 8, 6), torch.float32)
    step = (0.1, 0.2, norm == "l2", 0.0, 1.0)
    expected = OPS.pgd_step(adv, grad, clean, *step)
    adv, grad, clean = LAYOUTS[layout](adv), LAYOUTS[other](grad), LAYOUTS[layout](clean)
    actual = pgd_step.pgd_step(adv, grad, clean, *step)
    assert_moved_alike(actual, expected, norm)
    assert actual.stride() == torch.empty_like(adv).stride()
    pgd_step.pgd_step_(adv, grad, clean, *step)
    assert_moved_alike(adv, expected, norm)


@settings(max_examples=30)
@given(st.sampled_from(SHAPES), dtypes, norms, st.integers(-(2**63), 2**62))
def test_the_start(shape, dtype, norm, key):
    _, _, clean = step_images(shape, dtype, key % 100)
    seed = torch.tensor([key, key // 3])
    expected = OPS.random_start(clean, seed, 0.3, norm == "l2", 0.0, 1.0)
    actual = random_start.random_start(clean, seed, 0.3, norm == "l2", 0.0, 1.0)
    if dtype == torch.float64:
        assert_close(actual, expected, "elementwise")
    else:
        assert_moved_alike(actual, expected, norm)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_start_takes_any_layout(layout, norm):
    _, _, clean = step_images((3, 3, 8, 6), torch.float32)
    seed = torch.tensor([5, 6])
    expected = OPS.random_start(clean, seed, 0.3, norm == "l2", 0.0, 1.0)
    assert_moved_alike(
        random_start.random_start(LAYOUTS[layout](clean), seed, 0.3, norm == "l2", 0.0, 1.0), expected, norm
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 2)}, "grad must have the sizes of adv"),
        ({"clean": torch.zeros(2, 3, dtype=torch.int32)}, "clean must be float64, float32"),
    ],
)
def test_arguments_that_the_cuda_ops_refuse_are_refused(change, message):
    step = {"adv": torch.zeros(2, 3), "grad": torch.zeros(2, 3), "clean": torch.zeros(2, 3), "l2": False}
    with pytest.raises(RuntimeError, match=message):
        pgd_step.pgd_step(**{**step, **change}, alpha=0.1, eps=0.1, lo=0.0, hi=1.0)
