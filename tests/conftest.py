"""What all tests share: the one table of tolerances, the seed, and how hypothesis searches."""

import os

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# The largest error that a result may have, relative to the largest expected number.
TOLERANCES = {
    # Sums of many products: their order is the kernel's choice.
    "reduction": {
        torch.float64: 1e-10,  # 1e-16 per operation, up to thousands of them, and room for BLAS
        torch.float32: 1e-4,  # 6e-8 per operation, up to thousands of them, and cancellation within a sum
        torch.float16: 4e-3,  # 2**-11 for each rounding: of the operands, of the output, of what an epilogue adds
        torch.bfloat16: 3e-2,  # the same with 2**-8
    },
    # A handful of operations per element.
    "elementwise": {
        torch.float64: 1e-14,
        torch.float32: 1e-6,  # a few roundings of 6e-8
        torch.float16: 1e-3,  # one rounding
        torch.bfloat16: 8e-3,  # one rounding
    },
}


def assert_close(actual: Tensor, expected: Tensor, kind: str = "reduction") -> None:
    """Equal up to the tolerance of the coarser dtype of the two; infinities and NaN must agree."""
    tolerance = max(TOLERANCES[kind][tensor.dtype] for tensor in (actual, expected))
    actual, expected = actual.double(), expected.double()
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * (scale or 1.0), equal_nan=True)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """The same numbers, whatever the dtype."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_dtype=False)


# These need Triton's interpreter, which is chosen before the import: test_interpreted.py runs them.
collect_ignore = [] if "TRITON_INTERPRET" in os.environ else ["interpreted"]

DEVICES = (
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
)


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that there is: what is shown on one must hold on all."""
    return torch.device(request.param)


# Every run tries the same examples; HYPOTHESIS_PROFILE=search tries many new ones.
settings.register_profile("same", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
